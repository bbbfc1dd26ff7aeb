"""Plots of the study in closed-form worlds, as SVG files.

WORLD-energy    energy distance against forwards: one curve a variant, means over seeds
WORLD-samples   samples of the first seed beside the truth's, where they have two dimensions
"""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from cluster.storage import write_text
from pipelines.media.charts import Axis, Plane, linear_axis, log_axis
from pipelines.media.plot_files import (
    FRAME,
    GREY,
    axis_titles,
    colour_class,
    colour_legend,
    dot,
    polyline,
    svg_file,
)
from pipelines.study.gaussians.distilling import mixture_of
from pipelines.study.gaussians.measuring import ENERGY, Truth
from pipelines.study.gaussians.tables import GaussianResults
from pipelines.study.results import spread

_PANEL, _GAP, _COLUMNS = 170, 14, 4
_TRUTH_POINTS = 400


def write_gaussian_plots(folder: Path, results: GaussianResults) -> list[Path]:
    """Writes the plots of every world; returns their paths."""
    paths: list[Path] = []
    for world, settings in results.config.worlds.items():
        plots = {"energy": energy_plot(results, world)}
        if settings.dim == 2:
            plots["samples"] = samples_plot(results, world)
        for name, svg in plots.items():
            paths.append(folder / f"{world}-{name}.svg")
            write_text(str(paths[-1]), svg)
    return paths


def energy_plot(results: GaussianResults, world: str) -> str:
    """Energy distance along the runs; the rule is the distance of two sets of the truth."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for cell in results.of(world):
        means = [(point.forwards, spread(point.figures[ENERGY])) for point in cell.points]
        curves[cell.variant] = [(x, y.mean) for x, y in means if y is not None and y.mean > 0]
    shown = [point for curve in curves.values() for point in curve]
    if not shown:
        return svg_file(f"{world}: no variant stayed finite", [])
    x_axis = linear_axis(0, max(x for x, _ in shown))
    y_axis = log_axis(min(y for _, y in shown), max(y for _, y in shown))
    plane = Plane(x_axis, y_axis, FRAME)
    parts = plane.grid()
    for place, (variant, curve) in enumerate(curves.items()):
        css = colour_class(place)
        parts.append(polyline(curve, plane, css))
        parts += [dot(x, y, plane, css, variant) for x, y in curve]
    title = f"{world}: energy distance to the truth, means over {results.config.num_seeds} seeds"
    entries = [(variant, colour_class(place)) for place, variant in enumerate(curves)]
    titles = axis_titles("forward passes over a batch", "squared energy distance")
    return svg_file(title, [*parts, *titles, *colour_legend(entries)])


def samples_plot(results: GaussianResults, world: str) -> str:
    """Samples of the first seed of each variant, in one panel each, the truth first."""
    mixture = mixture_of(results.config.worlds[world])
    truth = Truth(mixture, _TRUTH_POINTS).samples(0).tolist()
    panels: list[tuple[str, Sequence[Sequence[float]], str]] = [("truth", truth, f"c{GREY}")]
    for place, cell in enumerate(results.of(world)):
        panels.append((cell.variant, cell.samples, colour_class(place)))
    reach = 1.6 * max(max(abs(value) for value in point) for point in truth)
    axis = linear_axis(-reach, reach)
    parts: list[str] = []
    for place, (label, shown, css) in enumerate(panels):
        row, column = divmod(place, _COLUMNS)
        left, top = 16 + column * (_PANEL + _GAP), FRAME.top + row * (_PANEL + 34)
        parts.append(
            f'<rect x="{left}" y="{top}" width="{_PANEL}" height="{_PANEL}" fill="none" '
            f'class="grid"/><text x="{left}" y="{top + _PANEL + 16}">{escape(label)}</text>'
        )
        parts += [_point(point, axis, left, top, css) for point in shown]
    rows = math.ceil(len(panels) / _COLUMNS)
    title = f"{world}: samples of seed 0"
    return svg_file(title, parts, height=FRAME.top + rows * (_PANEL + 34) + 8)


def _point(point: Sequence[float], axis: Axis, left: float, top: float, css: str) -> str:
    """A sample in its panel; one outside of it is drawn at its edge."""
    x, y = (min(1.0, max(0.0, axis.place(value))) for value in point)
    return (
        f'<circle class="dot seed {css}" cx="{left + x * _PANEL:.1f}" '
        f'cy="{top + (1 - y) * _PANEL:.1f}" r="1.6"/>'
    )
