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
from pipelines.evaluation.result import FLOOR, REFERENCE, TEACHER_FEW
from pipelines.media.charts import Axis, linear_axis, number
from pipelines.study.passes import role_of
from pipelines.study.results import StudyResult, mean_curve
from pipelines.study.tables import stage_costs

QUALITY = "frechet"
MOTION = "flow_top"

_WIDTH, _HEIGHT = 760, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 230, 40, 52
_BAR, _BAR_GAP = 22, 14
_LIGHT = ("2563d4", "c2500f", "14805a", "8b3fc4", "8a6700", "0b7f8e", "b8336a", "59616f")
_DARK = ("7daaff", "ff9f6b", "58d3a0", "c99af3", "e3bc52", "5fd2df", "f28bb2", "a0a8b5")
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
    parts = _plane(x_axis, y_axis)
    parts += _rule(floor, y_axis, "teacher, other seeds")
    for variant, points in curves.items():
        css = _colour(result, variant)
        path = " ".join(f"{_x(x, x_axis)},{_y(y, y_axis)}" for x, y in points)
        parts.append(f'<polyline class="line {css}" points="{path}"/>')
        parts += [_dot(x, y, x_axis, y_axis, css, variant) for x, y in points[1:]]
    what = "seconds of training" if by_seconds else "forward passes over a batch"
    return _svg(
        f"Fréchet distance to the teacher against {what}",
        [*parts, *_axis_titles(what, "Fréchet distance"), *_legend(result, list(curves))],
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
    parts = [*_plane(x_axis, y_axis), *_rule(1.0, y_axis, "teacher")]
    parts.append(_dot(*start, x_axis, y_axis, "c7", "teacher, few steps", radius=6))
    for variant, points in shown.items():
        css = _colour(result, variant)
        parts += [_dot(x, y, x_axis, y_axis, f"seed {css}", variant) for x, y in points]
        mean = [sum(axis) / len(points) for axis in zip(*points, strict=True)]
        parts.append(_dot(mean[0], mean[1], x_axis, y_axis, css, f"{variant}, mean", radius=6))
    titles = _axis_titles("Fréchet distance", "motion (flow, top 5 %) over the teacher's")
    legend = _legend(result, list(shown), extra=("teacher, few steps", "c7"))
    return _svg("Motion against Fréchet distance", [*parts, *titles, *legend])


def cost_plot(result: StudyResult) -> str:
    """Seconds of an iteration as one bar a variant, its stages by role."""
    costs = {variant: stage_costs(result, variant) for variant in result.variants}
    costs = {variant: stages for variant, stages in costs.items() if stages}
    if not costs:
        return ""
    roles = list(dict.fromkeys(role_of(name) for stages in costs.values() for name in stages))
    x_axis = linear_axis(0, max(sum(stages.values()) for stages in costs.values()))
    left, bottom = 170, _TOP + len(costs) * (_BAR + _BAR_GAP)
    scale = (_WIDTH - left - 20) / x_axis.high
    parts: list[str] = []
    for tick in x_axis.ticks:
        x = round(left + tick * scale, 1)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP - 8}" y2="{bottom}"/>')
        parts.append(f'<text class="x" x="{x}" y="{bottom + 16}">{x_axis.label(tick)}</text>')
    parts.append(
        f'<text class="x" x="{left + (_WIDTH - left) / 2:.0f}" y="{bottom + 36}">'
        "busy seconds of an iteration</text>"
    )
    for row, (variant, stages) in enumerate(costs.items()):
        y = _TOP + row * (_BAR + _BAR_GAP)
        parts.append(f'<text class="y" x="{left - 8}" y="{y + 15}">{escape(variant)}</text>')
        at = float(left)
        for role in roles:
            own = sorted(((s, n) for n, s in stages.items() if role_of(n) == role), reverse=True)
            for rank, (seconds, name) in enumerate(own):
                width = round(seconds * scale, 1)
                shade = _SHADES[min(rank, len(_SHADES) - 1)]
                parts.append(
                    f'<rect class="bar c{roles.index(role) % len(_LIGHT)}" x="{at:.1f}" y="{y}" '
                    f'width="{width}" height="{_BAR}" fill-opacity="{shade}">'
                    f"<title>{escape(variant)}, {escape(name)}: {number(seconds)} s</title></rect>"
                )
                at += width
    for place, role in enumerate(roles):
        x = left + place * 130
        parts.append(
            f'<rect class="bar c{place % len(_LIGHT)}" x="{x}" y="{bottom + 50}" width="12" '
            f'height="12"/><text x="{x + 18}" y="{bottom + 61}">{escape(role)}</text>'
        )
    return _svg("Seconds of an iteration by role and stage", parts, height=bottom + 76)


def _svg(title: str, parts: Sequence[str], height: int = _HEIGHT) -> str:
    light = "".join(f".c{i}{{--c:#{colour}}}" for i, colour in enumerate(_LIGHT))
    dark = "".join(f".c{i}{{--c:#{colour}}}" for i, colour in enumerate(_DARK))
    style = (
        "svg{--ink:#1a1e26;--faint:#59616f;--rule:#dfe3e9;--page:#fff}"
        f"{light}"
        "@media (prefers-color-scheme:dark){"
        f"svg{{--ink:#e9ebef;--faint:#a0a8b5;--rule:#2c3139;--page:#101216}}{dark}}}"
        "text{font:12px system-ui,sans-serif;fill:var(--ink)}"
        ".title{font-size:14px;font-weight:600}.x{text-anchor:middle}.y{text-anchor:end}"
        ".page{fill:var(--page)}.grid{stroke:var(--rule)}"
        ".rule{stroke:var(--faint);stroke-dasharray:4 4}.note{fill:var(--faint)}"
        ".line{fill:none;stroke:var(--c);stroke-width:2}.dot,.bar{fill:var(--c)}"
        ".seed{fill-opacity:.35}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img" aria-label="{escape(title, quote=True)}">'
        f"<style>{style}</style>"
        f'<rect class="page" width="{_WIDTH}" height="{height}"/>'
        f'<text class="title" x="16" y="22">{escape(title)}</text>' + "".join(parts) + "</svg>\n"
    )


def _plane(x_axis: Axis, y_axis: Axis) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts: list[str] = []
    for tick in y_axis.ticks:
        y = _y(tick, y_axis)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 8}" y="{y + 4}">{y_axis.label(tick)}</text>')
    for tick in x_axis.ticks:
        x = _x(tick, x_axis)
        parts.append(f'<text class="x" x="{x}" y="{bottom + 18}">{x_axis.label(tick)}</text>')
    return parts


def _axis_titles(x_title: str, y_title: str) -> list[str]:
    middle_x, middle_y = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _HEIGHT - _BOTTOM) / 2
    return [
        f'<text class="x" x="{middle_x:.0f}" y="{_HEIGHT - 12}">{escape(x_title)}</text>',
        f'<text class="x" transform="translate(16 {middle_y:.0f}) rotate(-90)">'
        f"{escape(y_title)}</text>",
    ]


def _rule(value: float, axis: Axis, label: str) -> list[str]:
    """A dashed line at a value of the teacher's."""
    y, right = _y(value, axis), _WIDTH - _RIGHT
    return [
        f'<line class="rule" x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}"/>',
        f'<text class="note y" x="{right - 4}" y="{y - 5}">{escape(label)}</text>',
    ]


def _legend(
    result: StudyResult, variants: Sequence[str], extra: tuple[str, str] | None = None
) -> list[str]:
    entries = [(variant, _colour(result, variant)) for variant in variants]
    entries += [extra] if extra else []
    x = _WIDTH - _RIGHT + 16
    parts: list[str] = []
    for row, (label, css) in enumerate(entries):
        y = _TOP + 8 + row * 20
        parts.append(f'<circle class="dot {css}" cx="{x}" cy="{y}" r="5"/>')
        parts.append(f'<text x="{x + 12}" y="{y + 4}">{escape(label)}</text>')
    return parts


def _dot(
    x: float, y: float, x_axis: Axis, y_axis: Axis, css: str, label: str, radius: float = 3.5
) -> str:
    told = f"{label}: {number(x)}, {number(y)}"
    return (
        f'<circle class="dot {css}" cx="{_x(x, x_axis)}" cy="{_y(y, y_axis)}" r="{radius:g}">'
        f"<title>{escape(told)}</title></circle>"
    )


def _colour(result: StudyResult, variant: str) -> str:
    return f"c{result.variants.index(variant) % (len(_LIGHT) - 1)}"


def _x(value: float, axis: Axis) -> float:
    return round(_LEFT + axis.place(value) * (_WIDTH - _LEFT - _RIGHT), 1)


def _y(value: float, axis: Axis) -> float:
    return round(_HEIGHT - _BOTTOM - axis.place(value) * (_HEIGHT - _TOP - _BOTTOM), 1)
