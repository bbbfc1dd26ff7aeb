"""Plots as SVG files: seen in a browser and in Markdown, without a script or a library.

One size and one set of colours for all; `c0`, `c1`, ... are the colours' classes.
"""

from collections.abc import Sequence
from html import escape

from pipelines.media.charts import Axis, number

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 230, 40, 52
"""Margins of the plane."""
LIGHT = ("2563d4", "c2500f", "14805a", "8b3fc4", "8a6700", "0b7f8e", "b8336a", "59616f")
DARK = ("7daaff", "ff9f6b", "58d3a0", "c99af3", "e3bc52", "5fd2df", "f28bb2", "a0a8b5")
GREY = len(LIGHT) - 1
"""Number of the colour for what is compared with."""


def colour_class(place: int) -> str:
    """Class of the colour of the curve at this place in its list; grey is left out."""
    return f"c{place % GREY}"


def colour_legend(entries: Sequence[tuple[str, str]]) -> list[str]:
    """Labels with the dots of their colour classes, right of the plane."""
    x = WIDTH - RIGHT + 16
    parts: list[str] = []
    for row, (label, css) in enumerate(entries):
        y = TOP + 8 + row * 20
        parts.append(f'<circle class="dot {css}" cx="{x}" cy="{y}" r="5"/>')
        parts.append(f'<text x="{x + 12}" y="{y + 4}">{escape(label)}</text>')
    return parts


def svg_file(title: str, parts: Sequence[str], height: int = HEIGHT) -> str:
    """An SVG file with a title; its colours follow the reader's light or dark scheme."""
    light = "".join(f".c{i}{{--c:#{colour}}}" for i, colour in enumerate(LIGHT))
    dark = "".join(f".c{i}{{--c:#{colour}}}" for i, colour in enumerate(DARK))
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
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img" aria-label="{escape(title, quote=True)}">'
        f"<style>{style}</style>"
        f'<rect class="page" width="{WIDTH}" height="{height}"/>'
        f'<text class="title" x="16" y="22">{escape(title)}</text>' + "".join(parts) + "</svg>\n"
    )


def axes(x_axis: Axis, y_axis: Axis) -> list[str]:
    """Grid lines and the numbers of both axes."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts: list[str] = []
    for tick in y_axis.ticks:
        y = place_y(tick, y_axis)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="y" x="{LEFT - 8}" y="{y + 4}">{y_axis.label(tick)}</text>')
    for tick in x_axis.ticks:
        x = place_x(tick, x_axis)
        parts.append(f'<text class="x" x="{x}" y="{bottom + 18}">{x_axis.label(tick)}</text>')
    return parts


def axis_titles(x_title: str, y_title: str) -> list[str]:
    """Titles of both axes."""
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    return [
        f'<text class="x" x="{middle_x:.0f}" y="{HEIGHT - 12}">{escape(x_title)}</text>',
        f'<text class="x" transform="translate(16 {middle_y:.0f}) rotate(-90)">'
        f"{escape(y_title)}</text>",
    ]


def rule(value: float, axis: Axis, label: str) -> list[str]:
    """A dashed line at a value of the teacher's."""
    y, right = place_y(value, axis), WIDTH - RIGHT
    return [
        f'<line class="rule" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>',
        f'<text class="note y" x="{right - 4}" y="{y - 5}">{escape(label)}</text>',
    ]


def dot(
    x: float, y: float, x_axis: Axis, y_axis: Axis, css: str, label: str, radius: float = 3.5
) -> str:
    """A dot that says what it is under the pointer."""
    told = f"{label}: {number(x)}, {number(y)}"
    left, top = place_x(x, x_axis), place_y(y, y_axis)
    return (
        f'<circle class="dot {css}" cx="{left}" cy="{top}" r="{radius:g}">'
        f"<title>{escape(told)}</title></circle>"
    )


def place_x(value: float, axis: Axis) -> float:
    """Place of a value on the horizontal axis, in the file's units."""
    return round(LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT), 1)


def place_y(value: float, axis: Axis) -> float:
    """Place of a value on the vertical axis, in the file's units."""
    return round(HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM), 1)
