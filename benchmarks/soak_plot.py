"""Small multiples of a soak: one row a process, one column a quantity, faults as lines."""

from collections.abc import Mapping, Sequence

Curves = Mapping[tuple[str, str], Mapping[int, Sequence[tuple[int, float]]]]

_COLUMNS = (("memory_mb", "memory, MB"), ("descriptors", "descriptors"), ("threads", "threads"))
_OF_RUN = (
    ("store_mb", "object store, MB"),
    ("objects", "objects in it"),
    ("processes", "processes"),
)
_ORDER = (
    *("driver", "generator", "fake_score", "teacher", "text", "feed", "validator"),
    *("raylet", "control service"),
)
_LEFT, _TOP, _GAP, _BOTTOM = 126, 24, 46, 26
_WIDE, _HIGH = 170, 46
_LINE, _FAULT, _WORDS = "#4269d0", "#ff725c", "#333"


def draw(curves: Curves, faults: Sequence[int]) -> str:
    """Returns the curves as an SVG of its own, readable on a light and on a dark page.

    Args:
        curves: (iteration, value) by part and quantity, then by process.
        faults: Their iterations.
    """
    parts = [part for part in _ORDER if (part, "memory_mb") in curves]
    rows = [[(part, quantity, part) for quantity, _ in _COLUMNS] for part in parts]
    rows.append([("run", quantity, words) for quantity, words in _OF_RUN])
    last = max((points[-1][0] for own in curves.values() for points in own.values()), default=1)
    width = _LEFT + len(_COLUMNS) * (_WIDE + _GAP)
    height = _TOP + len(rows) * (_HIGH + 18) + _BOTTOM + 14
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for column, (_, words) in enumerate(_COLUMNS):
        lines.append(_text(_LEFT + column * (_WIDE + _GAP), _TOP - 10, words))
    for number, row in enumerate(rows):
        # The last row has quantities of its own, with their names above.
        top = _TOP + number * (_HIGH + 18) + 18 * (number == len(rows) - 1)
        is_last = number == len(rows) - 1
        lines.append(_text(_LEFT - 36, top + _HIGH / 2 + 4, "all" if is_last else row[0][2], "end"))
        for column, (part, quantity, words) in enumerate(row):
            left = _LEFT + column * (_WIDE + _GAP)
            if is_last:
                lines.append(_text(left, top - 5, words))
            lines += _panel(left, top, curves.get((part, quantity), {}), faults, last)
    lines.append(_text(width - _GAP, height - 4, f"iterations 0 to {last:,}", "end"))
    return "\n".join([*lines, "</svg>\n"])


def _panel(
    left: float,
    top: float,
    processes: Mapping[int, Sequence[tuple[int, float]]],
    faults: Sequence[int],
    last: int,
) -> list[str]:
    values = [value for points in processes.values() for _, value in points]
    highest = 1.15 * max(values, default=1.0) or 1.0

    def across(iteration: int) -> float:
        return left + _WIDE * iteration / max(1, last)

    bottom = top + _HIGH
    lines = [
        f'<path d="M{across(fault):.1f} {top}V{bottom}" stroke="{_FAULT}" stroke-opacity="0.35"/>'
        for fault in faults
        if fault <= last
    ]
    lines.append(f'<path d="M{left} {top}V{bottom}H{left + _WIDE}" fill="none" stroke="#bbb"/>')
    lines.append(_text(left - 4, top + 8, f"{highest:,.0f}", "end"))
    lines.append(_text(left - 4, bottom, "0", "end"))
    for points in processes.values():
        path = " ".join(
            f"{across(iteration):.1f},{bottom - _HIGH * value / highest:.1f}"
            for iteration, value in points
        )
        lines.append(f'<polyline points="{path}" fill="none" stroke="{_LINE}" stroke-width="1.3"/>')
    return lines


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{_WORDS}">{words}</text>'
