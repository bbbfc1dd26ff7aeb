"""Plots as SVG files: seen in a browser and in Markdown, without a script or a library.

One size and one set of colours for all; `c0`, `c1`, ... are the colours' classes.
"""

from collections.abc import Iterable, Sequence
from html import escape

from pipelines.media.charts import Frame, Plane, number

FRAME = Frame(760, 400, left=64, right=530, top=40, bottom=348, gap=8)
"""Of every plot; its legend lies right of the plane."""
LIGHT = ("2563d4", "c2500f", "14805a", "8b3fc4", "8a6700", "0b7f8e", "b8336a", "59616f")
DARK = ("7daaff", "ff9f6b", "58d3a0", "c99af3", "e3bc52", "5fd2df", "f28bb2", "a0a8b5")
GREY = len(LIGHT) - 1
"""Number of the colour for what is compared with."""


def colour_class(place: int) -> str:
    """Class of the colour of the curve at this place in its list; grey is left out."""
    return f"c{place % GREY}"


def colour_legend(entries: Sequence[tuple[str, str]]) -> list[str]:
    """Labels with the dots of their colour classes, right of the plane."""
    x = FRAME.right + 16
    parts: list[str] = []
    for row, (label, css) in enumerate(entries):
        y = FRAME.top + 8 + row * 20
        parts.append(f'<circle class="dot {css}" cx="{x}" cy="{y}" r="5"/>')
        parts.append(f'<text x="{x + 12}" y="{y + 4}">{escape(label)}</text>')
    return parts


def svg_file(title: str, parts: Sequence[str], height: int = FRAME.height) -> str:
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
    width, name = FRAME.width, escape(title, quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="{name}">'
        f"<style>{style}</style>"
        f'<rect class="page" width="{width}" height="{height}"/>'
        f'<text class="title" x="16" y="22">{escape(title)}</text>' + "".join(parts) + "</svg>\n"
    )


def axis_titles(x_title: str, y_title: str) -> list[str]:
    """Titles of both axes."""
    middle_x, middle_y = (FRAME.left + FRAME.right) / 2, (FRAME.top + FRAME.bottom) / 2
    return [
        f'<text class="x" x="{middle_x:.0f}" y="{FRAME.height - 12}">{escape(x_title)}</text>',
        f'<text class="x" transform="translate(16 {middle_y:.0f}) rotate(-90)">'
        f"{escape(y_title)}</text>",
    ]


def rule(value: float, plane: Plane, label: str) -> list[str]:
    """A dashed line at a value of the teacher's."""
    y, right = plane.y(value), FRAME.right
    return [
        f'<line class="rule" x1="{FRAME.left}" x2="{right}" y1="{y}" y2="{y}"/>',
        f'<text class="note y" x="{right - 4}" y="{y - 5}">{escape(label)}</text>',
    ]


def polyline(points: Iterable[tuple[float, float]], plane: Plane, css: str) -> str:
    """A line through points."""
    path = " ".join(f"{plane.x(x)},{plane.y(y)}" for x, y in points)
    return f'<polyline class="line {css}" points="{path}"/>'


def dot(x: float, y: float, plane: Plane, css: str, label: str, radius: float = 3.5) -> str:
    """A dot that says what it is under the pointer."""
    words = f"{label}: {number(x)}, {number(y)}"
    return (
        f'<circle class="dot {css}" cx="{plane.x(x)}" cy="{plane.y(y)}" r="{radius:g}">'
        f"<title>{escape(words)}</title></circle>"
    )
