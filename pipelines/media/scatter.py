"""Points, bands and parallel coordinates as inline SVG, styled as `pipelines.media.charts` is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from pipelines.media.charts import (
    VIEW_BOX,
    Plane,
    linear_axis,
    log_axis,
    number,
)

_NOTHING = '<p class="missing">No finite values were recorded.</p>'
_BAND_POINTS, _LEAST_FOR_BAND = 41, 6
_BANDWIDTH = 0.12
_NORMAL_95 = 1.96
_MARGIN, _GAP, _TALL = 46, 150, 230


@dataclass(frozen=True, slots=True)
class Dot:
    """One point of a picture.

    Attributes:
        x: Place.
        y: Place.
        label: Text under the pointer.
        css: Class of the style sheet: `c0` filled, `faint` hollow.
        interval: Ends of a bar through it; None draws none.
    """

    x: float
    y: float
    label: str
    css: str = "c0"
    interval: tuple[float, float] | None = None


def scatter(
    dots: Sequence[Dot],
    *,
    log_x: bool = False,
    band: bool = False,
    path: Sequence[tuple[float, float]] = (),
    names: str = "",
) -> str:
    """Draws points.

    Args:
        dots: Those that are not finite are left out.
        log_x: Horizontal axis by powers of ten; every place is above 0.
        band: Draw a smoothed mean of the filled points with its 95 % band.
        path: A line through these places.
        names: Text for readers that see no pictures.
    """
    dots = [dot for dot in dots if math.isfinite(dot.x) and math.isfinite(dot.y)]
    if not dots:
        return _NOTHING
    ends = [end for dot in dots for end in dot.interval or ()]
    x_axis = (log_axis if log_x else linear_axis)(min(d.x for d in dots), max(d.x for d in dots))
    y_axis = linear_axis(min([*ends, *(d.y for d in dots)]), max([*ends, *(d.y for d in dots)]))
    plane = Plane(x_axis, y_axis)
    parts = [
        f'<svg viewBox="{VIEW_BOX}" role="img" aria-label="{escape(names, quote=True)}">',
        *plane.grid(),
    ]
    if band:
        parts += _band([dot for dot in dots if dot.css == "c0"], plane)
    if path:
        places = " L".join(f"{plane.x(x)} {plane.y(y)}" for x, y in path)
        parts.append(f'<path class="line c1" d="M{places}"/>')
    for dot in dots:
        x, y = plane.x(dot.x), plane.y(dot.y)
        if dot.interval is not None:
            low, high = (plane.y(end) for end in dot.interval)
            parts.append(
                f'<line class="{dot.css} whisker" x1="{x}" x2="{x}" y1="{low}" y2="{high}"/>'
            )
        parts.append(
            f'<circle class="dot {dot.css}" cx="{x}" cy="{y}" r="3.2">'
            f"<title>{escape(dot.label)}</title></circle>"
        )
    return "".join([*parts, "</svg>"])


def smoothed(places: Sequence[float], values: Sequence[float], at: float) -> tuple[float, float]:
    """Weighted mean near a place, and its standard error.

    Args:
        places: From 0 to 1.
        values: At these places.
        at: Where.
    """
    weights = [math.exp(-0.5 * ((place - at) / _BANDWIDTH) ** 2) for place in places]
    total = sum(weights)
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / total
    spread = sum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True)) / total
    effective = total**2 / sum(w * w for w in weights)
    return mean, math.sqrt(spread / max(effective - 1, 0.5))


def _band(dots: Sequence[Dot], plane: Plane) -> list[str]:
    if len(dots) < _LEAST_FOR_BAND:
        return []
    x_axis, y_axis = plane.x_axis, plane.y_axis
    places, values = [x_axis.place(dot.x) for dot in dots], [dot.y for dot in dots]
    first, last = min(places), max(places)
    left, right = plane.frame.left, plane.frame.right
    line: list[str] = []
    upper: list[str] = []
    lower: list[str] = []
    for index in range(_BAND_POINTS):
        at = first + (last - first) * index / (_BAND_POINTS - 1)
        mean, error = smoothed(places, values, at)
        x = f"{left + at * (right - left):.1f}"
        line.append(f"{x} {plane.y(mean)}")
        for side, sign in ((upper, 1), (lower, -1)):
            end = mean + sign * _NORMAL_95 * error
            side.append(f"{x} {plane.y(min(max(end, y_axis.low), y_axis.high))}")
    around = " L".join([*upper, *reversed(lower)])
    return [
        f'<path class="band" d="M{around}Z"/>',
        f'<path class="line c0" d="M{" L".join(line)}"/>',
    ]


@dataclass(frozen=True, slots=True)
class Scale:
    """One upright axis of parallel coordinates.

    Attributes:
        name: Title.
        places: Place of each line on it, from 0 to 1; NaN where the line passes it by.
        low: Label of its lower end.
        high: Label of its upper end.
    """

    name: str
    places: Sequence[float]
    low: str
    high: str


def parallel_coordinates(
    scales: Sequence[Scale], labels: Sequence[str], shades: Sequence[float]
) -> str:
    """Draws one line a row over several upright axes.

    Args:
        scales: The axes.
        labels: Text under the pointer, one a row.
        shades: 0 is drawn boldly, 1 faintly; one a row.
    """
    if not scales or not labels:
        return _NOTHING
    width = 2 * _MARGIN + _GAP * (len(scales) - 1)
    top, bottom = 24, _TALL - 22
    xs = [_MARGIN + _GAP * index for index in range(len(scales))]
    parts = [
        f'<svg viewBox="0 0 {width} {_TALL}" role="img" style="width: {1.4 * width:.0f}px" '
        f'aria-label="{escape(", ".join(scale.name for scale in scales), quote=True)}">'
    ]
    for row in sorted(range(len(labels)), key=lambda row: -shades[row]):
        places = [
            f"{x} {bottom - scale.places[row] * (bottom - top):.1f}"
            for x, scale in zip(xs, scales, strict=True)
            if math.isfinite(scale.places[row])
        ]
        css = "c1" if shades[row] == 0 else "c0"
        opacity = 1 if shades[row] == 0 else 0.65 - 0.5 * shades[row]
        parts.append(
            f'<path class="line {css}" style="opacity: {opacity:.2f}" d="M{" L".join(places)}">'
            f"<title>{escape(labels[row])}</title></path>"
        )
    for x, scale in zip(xs, scales, strict=True):
        parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>')
        for text, y in ((scale.name, 9), (scale.high, 21), (scale.low, _TALL - 6)):
            parts.append(f'<text class="x" x="{x}" y="{y}">{escape(text)}</text>')
    return "".join([*parts, "</svg>"])


def interval_words(interval: tuple[float, float] | None) -> str:
    """An interval in brackets; nothing where there is none."""
    return "" if interval is None else f"[{number(interval[0])}, {number(interval[1])}]"
