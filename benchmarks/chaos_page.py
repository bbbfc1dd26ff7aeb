"""Table and plot of a storm, for docs/reliability.md, from what `chaos.py` has written.

python benchmarks/chaos_page.py chaos.json                     the table, to standard output
python benchmarks/chaos_page.py chaos.json --plot docs/storm.svg
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW, _BOTTOM = 720, 150, 40, 30, 22, 40


def lost_by_kind(found: Mapping[str, Any]) -> dict[str, list[float]]:
    """Seconds lost by each fault, by kind, of all storms; the kind that costs most first."""
    lost: dict[str, list[float]] = {}
    for storm in found["results"]["storms"].values():
        for kind, seconds in storm["seconds_lost"].items():
            lost.setdefault(kind, []).extend(seconds)
    return dict(sorted(lost.items(), key=lambda item: -statistics.median(item[1])))


def table(lost: Mapping[str, Sequence[float]]) -> str:
    """Returns one row a kind, as Markdown."""
    lines = ["| fault | times | median s lost | longest |", "|---|---|---|---|"]
    for kind, seconds in lost.items():
        middle, longest = statistics.median(seconds), max(seconds)
        lines.append(f"| {kind} | {len(seconds)} | {middle:.1f} | {longest:.1f} |")
    return "\n".join(lines) + "\n"


def draw(lost: Mapping[str, Sequence[float]]) -> str:
    """Returns an SVG, a line a kind, readable on a light and on a dark page."""
    height = _TOP + _ROW * len(lost) + _BOTTOM
    longest = max(max(seconds) for seconds in lost.values())
    step = next(each for each in (1, 2, 5, 10, 20, 50, 100) if longest / each < 10)
    end = step * (1 + longest // step)

    def across(seconds: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * max(0.0, seconds) / end

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number in range(int(end / step) + 1):
        x = across(number * step)
        parts.append(
            f'<path d="M{x:.1f} {_TOP - 8}V{height - _BOTTOM}" stroke="#ddd"/>'
            f'<text x="{x:.1f}" y="{height - _BOTTOM + 16}" text-anchor="middle" fill="#333">'
            f"{number * step}</text>"
        )
    for row, (kind, seconds) in enumerate(lost.items()):
        y = _TOP + _ROW * row + _ROW / 2
        parts.append(
            f'<text x="{_LEFT - 10}" y="{y + 4}" text-anchor="end" fill="#333">{kind}</text>'
            f'<path d="M{across(0):.1f} {y}H{across(max(seconds)):.1f}" stroke="#97bbf5"/>'
        )
        parts += [
            f'<circle cx="{across(each):.1f}" cy="{y}" r="4" fill="#4269d0" fill-opacity="0.7"/>'
            for each in seconds
        ]
    parts.append(
        f'<text x="{_WIDTH - _RIGHT}" y="{height - 8}" text-anchor="end" fill="#333">'
        "seconds lost by a fault</text>"
    )
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    """Writes the table and, if asked, the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("found", type=Path, help="what chaos.py has written")
    parser.add_argument("--plot", type=Path, help="write the plot here")
    given = parser.parse_args()
    lost = lost_by_kind(json.loads(given.found.read_text()))
    print(table(lost), end="")
    if given.plot:
        given.plot.write_text(draw(lost))


if __name__ == "__main__":
    main()
