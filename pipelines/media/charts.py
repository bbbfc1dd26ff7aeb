"""Curves as inline SVG: seen without a library, a script or the network.

Colours, light and dark, come from the page's style sheet through the classes `c0`, `c1`, ... Long
curves are drawn twice, faint as recorded and bold as a running median, which a spike cannot bend.
The recorded points lie in `data-curves`, so that a page may show the values under a pointer.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import median

NUM_COLOURS = 6
_MAX_POINTS = 400
_SMOOTH_ABOVE = 40
_WINDOW_SHARE = 0.05
_NUM_TICKS = 4
_FIGURES = 4


@dataclass(frozen=True, slots=True)
class Series:
    """One curve; points that are not finite leave a gap.

    Attributes:
        label: Name in the legend.
        x: Positions, rising.
        y: Values.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True, slots=True)
class Mark:
    """A place on the horizontal axis where something happened.

    Attributes:
        x: Where.
        label: What.
    """

    x: float
    label: str


@dataclass(frozen=True, slots=True)
class Axis:
    """A range and its round numbers, linear or by powers of ten."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Returns the place of a value: 0 at the low end, 1 at the high end."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        return (self._scaled(value) - low) / (high - low)

    def label(self, tick: float) -> str:
        """A tick in words; on a linear axis with the decimals that tell neighbours apart."""
        step = self.ticks[1] - self.ticks[0]
        if self.log or not 1e-6 < step < 1e5:
            return number(tick)
        # The step is 1, 2 or 5 times a power of ten; what is below half of it is rounding.
        decimals = max(0, -math.floor(math.log10(step * 1.001)))
        return f"{round(tick, decimals) + 0.0:,.{decimals}f}"

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value


@dataclass(frozen=True, slots=True)
class Frame:
    """Places of the axes in a picture.

    Attributes:
        width: Of the picture.
        height: Of the picture.
        left: The vertical axis.
        right: End of the horizontal axis.
        top: End of the vertical axis.
        bottom: The horizontal axis.
        gap: Between an axis and its labels.
    """

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    gap: int


_FRAME = Frame(360, 200, left=48, right=350, top=10, bottom=176, gap=6)
VIEW_BOX = f"0 0 {_FRAME.width} {_FRAME.height}"
"""Coordinates of a picture."""


@dataclass(frozen=True, slots=True)
class Plane:
    """Two axes in a picture."""

    x_axis: Axis
    y_axis: Axis
    frame: Frame = _FRAME

    def x(self, value: float) -> float:
        """Horizontal place in the picture."""
        left, right = self.frame.left, self.frame.right
        return round(left + self.x_axis.place(value) * (right - left), 1)

    def y(self, value: float) -> float:
        """Vertical place in the picture."""
        top, bottom = self.frame.top, self.frame.bottom
        return round(bottom - self.y_axis.place(value) * (bottom - top), 1)

    def grid(self) -> list[str]:
        """Lines and labels of both axes."""
        frame, parts = self.frame, list[str]()
        for tick in self.y_axis.ticks:
            y, label = self.y(tick), self.y_axis.label(tick)
            parts.append(
                f'<line class="grid" x1="{frame.left}" x2="{frame.right}" y1="{y}" y2="{y}"/>'
            )
            parts.append(
                f'<text class="y" x="{frame.left - frame.gap}" y="{y + 4:.1f}">{label}</text>'
            )
        for tick in self.x_axis.ticks:
            place = f'x="{self.x(tick)}" y="{frame.bottom + frame.gap + 10}"'
            parts.append(f'<text class="x" {place}>{self.x_axis.label(tick)}</text>')
        return parts


def line_chart(series: Sequence[Series], *, log: bool = False, marks: Sequence[Mark] = ()) -> str:
    """Draws curves over one horizontal axis.

    Args:
        series: Curves; at most six colours are told apart. With more than two, the faint curves
            as recorded are left out.
        log: Vertical axis by powers of ten; used only where every value is positive.
        marks: Drawn as upright lines; those outside of the curves' range are left out.

    Returns:
        An `<svg>` element, or a line of text where there is not a single finite point.
    """
    points = [
        (x, y) for curve in series for x, y in zip(curve.x, curve.y, strict=True) if _finite(y)
    ]
    if not points:
        return '<p class="missing">No finite values were recorded.</p>'
    x_axis = linear_axis(min(x for x, _ in points), max(x for x, _ in points))
    values = [y for _, y in points]
    use_log = log and min(values) > 0
    y_axis = (log_axis if use_log else linear_axis)(min(values), max(values))
    plane, frame = Plane(x_axis, y_axis), _FRAME
    names = escape(", ".join(curve.label for curve in series), quote=True)
    curves = escape(json.dumps([_recorded(curve) for curve in series]), quote=True)
    parts = [
        f'<svg viewBox="{VIEW_BOX}" role="img" aria-label="{names}" '
        f'data-plane="{frame.left} {frame.right} {frame.top} {frame.bottom}" '
        f'data-range="{x_axis.low:g} {x_axis.high:g}" data-curves="{curves}">'
    ]
    parts += plane.grid()
    parts += _marks(marks, plane)
    for index, curve in enumerate(series):
        css = f"c{index % NUM_COLOURS}"
        parts += _curve(curve, css, plane, raw=len(series) <= 2)
    return "".join([*parts, "</svg>"])


def linear_axis(low: float, high: float) -> Axis:
    """A range whose ends and ticks are 1, 2 or 5 times a power of ten apart."""
    if high == low:
        spread = abs(high) * 0.1 or 1.0
        low, high = low - spread, high + spread
    rough = (high - low) / _NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(index * step for index in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def log_axis(low: float, high: float) -> Axis:
    """A range from one power of ten to another."""
    first = math.floor(math.log10(low))
    last = max(first + 1, math.ceil(math.log10(high)))
    stride = max(1, math.ceil((last - first) / (_NUM_TICKS + 1)))
    return Axis(
        10.0**first,
        10.0**last,
        tuple(10.0**power for power in range(first, last + 1, stride)),
        log=True,
    )


def running_median(
    values: Sequence[float], window: int, at: Sequence[int] | None = None
) -> list[float]:
    """Median of the finite values in a centred window; shorter at the ends.

    Args:
        values: All values.
        window: How many go into a median.
        at: Indices to take it at; None takes it everywhere.
    """
    half = window // 2
    smooth: list[float] = []
    for index in range(len(values)) if at is None else at:
        near = [v for v in values[max(0, index - half) : index + half + 1] if _finite(v)]
        smooth.append(median(near) if near else math.nan)
    return smooth


def thinned(values: Sequence[float], most: int) -> list[int]:
    """Indices of at most so many points that still show every spike.

    The range is cut into equal parts; the least and the greatest value of each part stay.
    """
    if len(values) <= most:
        return list(range(len(values)))
    num_parts = most // 2
    kept: set[int] = set()
    for part in range(num_parts):
        start = part * len(values) // num_parts
        inside = range(start, (part + 1) * len(values) // num_parts)
        ranked = [index for index in inside if _finite(values[index])] or [start]
        kept |= {min(ranked, key=lambda i: values[i]), max(ranked, key=lambda i: values[i])}
    return sorted(kept)


def number(value: float) -> str:
    """A number as a reader wants it: three figures, no needless zeros."""
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2g}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _recorded(curve: Series) -> dict[str, object]:
    """Returns the points that a page shows under the pointer: as recorded, null in a gap."""
    kept = thinned(curve.y, _MAX_POINTS)
    values = [float(f"{curve.y[i]:.{_FIGURES}g}") if _finite(curve.y[i]) else None for i in kept]
    return {"label": curve.label, "x": [curve.x[i] for i in kept], "y": values}


def _marks(marks: Sequence[Mark], plane: Plane) -> list[str]:
    """One line a pixel, whatever happened there: hundreds of alarms stay one red band."""
    labels: dict[int, list[str]] = {}
    for mark in marks:
        if plane.x_axis.low <= mark.x <= plane.x_axis.high:
            labels.setdefault(round(plane.x(mark.x)), []).append(mark.label)
    top, bottom = plane.frame.top, plane.frame.bottom
    return [
        f'<g class="mark"><title>{escape("; ".join(dict.fromkeys(texts)))}</title>'
        f'<line x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>'
        f'<path d="M{x - 4} {top - 6}h8l-4 7z"/></g>'
        for x, texts in sorted(labels.items())
    ]


def _curve(curve: Series, css: str, plane: Plane, *, raw: bool) -> list[str]:
    x, y = list(curve.x), list(curve.y)
    kept = thinned(y, _MAX_POINTS)
    if len(y) > _SMOOTH_ABOVE:
        places = [x[i] for i in kept]
        parts = [_path(places, [y[i] for i in kept], f"raw {css}", plane)] if raw else []
        smooth = running_median(y, max(5, round(len(y) * _WINDOW_SHARE)), kept)
        return [*parts, _path(places, smooth, f"line {css}", plane)]
    return [
        _path(x, y, f"line {css}", plane),
        *(
            f'<circle class="dot {css}" cx="{plane.x(at)}" cy="{plane.y(value)}" r="2.5">'
            f"<title>{escape(curve.label)} at {number(at)}: {number(value)}</title></circle>"
            for at, value in zip(x, y, strict=True)
            if _finite(value)
        ),
    ]


def _path(x: Sequence[float], y: Sequence[float], css: str, plane: Plane) -> str:
    steps: list[str] = []
    pen = "M"
    for at, value in zip(x, y, strict=True):
        if not _finite(value):
            pen = "M"
            continue
        steps.append(f"{pen}{plane.x(at)} {plane.y(value)}")
        pen = "L"
    return f'<path class="{css}" d="{"".join(steps)}"/>'


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
