"""A study's plots as SVG files: seen in a browser and in Markdown, without a script or a library.

    quality-seconds, quality-forwards   Frechet distance along the runs, means over seeds
    motion-frechet                      one dot a run: how much its clips move, how far they are
    cost                                seconds of an iteration, by role and stage

Colours follow the reader's light or dark scheme; a variant has one colour in all plots.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from cluster.storage import write_text
from pipelines.media.charts import Plane, linear_axis, number
from pipelines.media.plot_files import (
    FRAME,
    LIGHT,
    axis_titles,
    colour_class,
    colour_legend,
    dot,
    polyline,
    rule,
    svg_file,
)
from pipelines.planning.passes import role_of
from pipelines.study.results import StudyResult, mean_curve
from pipelines.study.tables import stage_costs
from workers.samplings import FLOOR, REFERENCE, TEACHER_FEW

QUALITY = "frechet"
MOTION = "flow_top"

_BAR, _BAR_GAP = 22, 14
_SHADES = (1.0, 0.75, 0.5, 0.3, 0.2)


def write_plots(folder: Path, result: StudyResult) -> list[Path]:
    """Writes those plots that there is something to show in; returns their paths."""
    plots = {
        "quality-seconds": quality_plot(result, by_seconds=True),
        "quality-forwards": quality_plot(result, by_seconds=False),
        "motion-frechet": motion_plot(result),
        "cost": cost_plot(result),
    }
    paths: list[Path] = []
    for name, svg in plots.items():
        if svg:
            paths.append(folder / f"{name}.svg")
            write_text(str(paths[-1]), svg)
    return paths


def quality_plot(result: StudyResult, *, by_seconds: bool) -> str:
    """Distance against cost: one curve a variant, from the untrained generator on."""
    start = result.teacher[TEACHER_FEW][QUALITY]
    curves: dict[str, list[tuple[float, float]]] = {}
    for variant in result.variants:
        found = mean_curve(result.of(variant), QUALITY)
        points = [(at.seconds if by_seconds else at.units, value) for at, value in found]
        if points:
            curves[variant] = [(0.0, start), *points]
    if not curves:
        return ""
    floor = result.teacher[FLOOR][QUALITY]
    x_axis = linear_axis(0, max(x for points in curves.values() for x, _ in points))
    y_axis = linear_axis(0, max(start, *(y for points in curves.values() for _, y in points)))
    plane = Plane(x_axis, y_axis, FRAME)
    parts = [*plane.grid(), *rule(floor, plane, "teacher, other seeds")]
    for variant, points in curves.items():
        css = _colour(result, variant)
        parts.append(polyline(points, plane, css))
        parts += [dot(x, y, plane, css, variant) for x, y in points[1:]]
    what = "seconds of training" if by_seconds else "forward passes over a batch"
    return svg_file(
        f"Fréchet distance to the teacher against {what}",
        [*parts, *axis_titles(what, "Fréchet distance"), *_legend(result, list(curves))],
    )


def motion_plot(result: StudyResult) -> str:
    """Motion against distance: a small dot a seed, a large one for their mean."""
    ends = {
        variant: [(p.figures[QUALITY], p.figures[MOTION]) for p in result.ends(variant)]
        for variant in result.variants
    }
    ends = {variant: points for variant, points in ends.items() if points}
    if not ends:
        return ""
    below = result.teacher[REFERENCE][MOTION] or 1.0
    shown = {name: [(x, y / below) for x, y in points] for name, points in ends.items()}
    start = (result.teacher[TEACHER_FEW][QUALITY], result.teacher[TEACHER_FEW][MOTION] / below)
    everywhere = [point for points in shown.values() for point in points] + [start]
    x_axis = linear_axis(0, max(x for x, _ in everywhere))
    y_axis = linear_axis(
        min(0.9, *(y for _, y in everywhere)), max(1.0, *(y for _, y in everywhere))
    )
    plane = Plane(x_axis, y_axis, FRAME)
    parts = [*plane.grid(), *rule(1.0, plane, "teacher")]
    parts.append(dot(*start, plane, "c7", "teacher, few steps", radius=6))
    for variant, points in shown.items():
        css = _colour(result, variant)
        parts += [dot(x, y, plane, f"seed {css}", variant) for x, y in points]
        mean = [sum(axis) / len(points) for axis in zip(*points, strict=True)]
        parts.append(dot(mean[0], mean[1], plane, css, f"{variant}, mean", radius=6))
    titles = axis_titles("Fréchet distance", "motion (flow, top 5 %) over the teacher's")
    legend = _legend(result, list(shown), extra=("teacher, few steps", "c7"))
    return svg_file("Motion against Fréchet distance", [*parts, *titles, *legend])


def cost_plot(result: StudyResult) -> str:
    """Seconds of an iteration as one bar a variant, its stages by role."""
    costs = {variant: stage_costs(result, variant) for variant in result.variants}
    costs = {variant: stages for variant, stages in costs.items() if stages}
    if not costs:
        return ""
    roles = list(dict.fromkeys(role_of(name) for stages in costs.values() for name in stages))
    x_axis = linear_axis(0, max(sum(stages.values()) for stages in costs.values()))
    left, bottom = 170, FRAME.top + len(costs) * (_BAR + _BAR_GAP)
    scale = (FRAME.width - left - 20) / x_axis.high
    parts: list[str] = []
    for tick in x_axis.ticks:
        x = round(left + tick * scale, 1)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{FRAME.top - 8}" y2="{bottom}"/>')
        parts.append(f'<text class="x" x="{x}" y="{bottom + 16}">{x_axis.label(tick)}</text>')
    parts.append(
        f'<text class="x" x="{left + (FRAME.width - left) / 2:.0f}" y="{bottom + 36}">'
        "busy seconds of an iteration</text>"
    )
    for row, (variant, stages) in enumerate(costs.items()):
        y = FRAME.top + row * (_BAR + _BAR_GAP)
        parts.append(f'<text class="y" x="{left - 8}" y="{y + 15}">{escape(variant)}</text>')
        at = float(left)
        for role in roles:
            own = sorted(((s, n) for n, s in stages.items() if role_of(n) == role), reverse=True)
            for rank, (seconds, name) in enumerate(own):
                width = round(seconds * scale, 1)
                shade = _SHADES[min(rank, len(_SHADES) - 1)]
                parts.append(
                    f'<rect class="bar c{roles.index(role) % len(LIGHT)}" x="{at:.1f}" y="{y}" '
                    f'width="{width}" height="{_BAR}" fill-opacity="{shade}">'
                    f"<title>{escape(variant)}, {escape(name)}: {number(seconds)} s</title></rect>"
                )
                at += width
    for place, role in enumerate(roles):
        x = left + place * 130
        parts.append(
            f'<rect class="bar c{place % len(LIGHT)}" x="{x}" y="{bottom + 50}" width="12" '
            f'height="12"/><text x="{x + 18}" y="{bottom + 61}">{escape(role)}</text>'
        )
    return svg_file("Seconds of an iteration by role and stage", parts, height=bottom + 76)


def _legend(
    result: StudyResult, variants: Sequence[str], extra: tuple[str, str] | None = None
) -> list[str]:
    entries = [(variant, _colour(result, variant)) for variant in variants]
    return colour_legend([*entries, extra] if extra else entries)


def _colour(result: StudyResult, variant: str) -> str:
    return colour_class(result.variants.index(variant))
