"""A run to compare one's own with: recorded once with several seeds, compared with by anyone.

    python benchmarks/reference_run.py record RUN ... --output docs/reference-run
    python benchmarks/reference_run.py compare RUN

`record` takes runs of one recipe that differ in their seeds alone, and writes `reference-run.json`
and two plots. `compare` puts a run beside them: losses of the first iterations against the same
seed's, which differ by rounding alone; then losses and figures against the range over the seeds.
"""

import argparse
import json
import math
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from pipelines.config.recipe import load_recipe
from pipelines.media.charts import Plane, linear_axis
from pipelines.media.plot_files import (
    FRAME,
    axis_titles,
    colour_class,
    colour_legend,
    polyline,
    svg_file,
)
from pipelines.run.differences import value_differences
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.run.revision import git_revision, versions

RECORD = "reference-run.json"
DEFAULT = Path(__file__).parents[1] / "docs" / "reference-run" / RECORD

LOSSES = ("fisher", "negative_residual", "tracking")
FIGURES = (
    "frechet",
    "flow_top_ratio",
    "saturation_ratio",
    "sharpness_ratio",
    "diversity_ratio",
    "colour",
    "shape",
    "direction",
)
NUM_FIRST = 5
"""Iterations whose losses are kept one by one."""
WINDOW = 20
"""Iterations over which losses are averaged."""
# Rounding of other kernels grows by the iteration; another setting moves the first loss by more.
_ROUNDING = 1e-3
# Beyond the range over the seeds, in its widths: three seeds are few.
_MARGIN = 1.0


def read_run(folder: Path) -> dict[str, Any]:
    """Figures that are kept of a run."""
    run = RunFolder(folder)
    config = load_recipe(str(run.config))
    lines = read_jsonl(run.metrics)
    windows = [lines[start : start + WINDOW] for start in range(0, len(lines), WINDOW)]
    return {
        "seed": config.seed,
        "settings": {
            key: value for key, value in config.deciding_settings.items() if key != "seed"
        },
        "first": {name: [line["losses"][name] for line in lines[:NUM_FIRST]] for name in LOSSES},
        "losses": {
            name: {
                str(window[-1]["iteration"] + 1): fmean(line["losses"][name] for line in window)
                for window in windows
                if len(window) == WINDOW
            }
            for name in LOSSES
        },
        "figures": {
            name: {
                str(line["iteration"]): line["figures"][name]
                for line in read_jsonl(run.validation)
                if name in line["figures"]
            }
            for name in FIGURES
        },
    }


def record(folders: Sequence[Path], output: Path) -> None:
    """Writes the record and its plots."""
    runs = [read_run(folder) for folder in folders]
    settings = runs[0]["settings"]
    for folder, run in zip(folders, runs, strict=True):
        if different := value_differences(settings, run["settings"]):
            sys.exit(f"{folder} has other settings than {folders[0]}: {'; '.join(different)}")
    output.mkdir(parents=True, exist_ok=True)
    content = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.machine(),
        "git_revision": git_revision(),
        "versions": versions(),
        "settings": settings,
        "runs": [{k: v for k, v in run.items() if k != "settings"} for run in runs],
    }
    (output / RECORD).write_text(json.dumps(content, indent=1) + "\n")
    for name, title, y_title in (
        ("losses", "Tracking loss, means over 20 iterations", "loss"),
        ("figures", "Fréchet distance to the teacher", "Fréchet distance"),
    ):
        key = "tracking" if name == "losses" else "frechet"
        svg = plot(title, y_title, {f"seed {run['seed']}": run[name][key] for run in runs})
        (output / f"{key}.svg").write_text(svg)
    for run in runs:
        curve = run["figures"]["frechet"]
        best, end = min(curve.values()), list(curve.values())[-1]
        print(f"seed {run['seed']}: best {best:.4f}, end {end:.4f}, {end / best:.2f} of the best")


def plot(title: str, y_title: str, curves: Mapping[str, Mapping[str, float]]) -> str:
    """Curves over iterations as an SVG file."""
    points = {label: [(float(x), y) for x, y in curve.items()] for label, curve in curves.items()}
    every = [point for curve in points.values() for point in curve]
    x_axis = linear_axis(0, max(x for x, _ in every))
    y_axis = linear_axis(0, max(y for _, y in every))
    plane = Plane(x_axis, y_axis, FRAME)
    parts = [*plane.grid(), *axis_titles("iterations", y_title)]
    for place, curve in enumerate(points.values()):
        parts.append(polyline(curve, plane, colour_class(place)))
    legend = [(label, colour_class(place)) for place, label in enumerate(points)]
    return svg_file(title, [*parts, *colour_legend(legend)])


def compare(folder: Path, reference: Path) -> int:
    """Prints a run beside the record; returns how many lines are out of their range."""
    known, run = json.loads(reference.read_text()), read_run(folder)
    if different := value_differences(known["settings"], run["settings"]):
        print(f"other settings than the record's: {'; '.join(different)}")
    out = 0
    same = [each for each in known["runs"] if each["seed"] == run["seed"]]
    for name in LOSSES if same else ():
        pairs = zip(run["first"][name], same[0]["first"][name], strict=False)
        off = max(abs(own - theirs) / abs(theirs) for own, theirs in pairs)
        out += off > _ROUNDING
        print(
            f"{name}, first {NUM_FIRST} iterations, seed {run['seed']}: at most {off:.1e} off"
            f" ({'rounding' if off <= _ROUNDING else 'MORE THAN ROUNDING'})"
        )
    if not same:
        seeds = ", ".join(str(each["seed"]) for each in known["runs"])
        print(f"seed {run['seed']} was not recorded (but {seeds}): no losses one by one")
    print(f"{'':24} {'iteration':>9} {'here':>9}   recorded, least to most")
    for kind in ("losses", "figures"):
        for name, curve in run[kind].items():
            for place, value in curve.items():
                recorded = [
                    each[kind][name][place] for each in known["runs"] if place in each[kind][name]
                ]
                if recorded:
                    out += tell(name, place, value, recorded)
    print(f"{out} out of range")
    return out


def tell(name: str, place: str, value: float, recorded: Sequence[float]) -> bool:
    """Prints one line; returns whether the value is out of range."""
    low, high = min(recorded), max(recorded)
    reach = _MARGIN * max(high - low, 0.02 * max(abs(low), abs(high)))
    is_out = not math.isfinite(value) or not low - reach <= value <= high + reach
    note = "  OUT OF RANGE" if is_out else ""
    print(f"{name:24} {place:>9} {value:9.4f}   {low:.4f} to {high:.4f}{note}")
    return is_out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("record", help="write a record of runs that differ in their seeds")
    made.add_argument("runs", nargs="+", type=Path)
    made.add_argument("--output", type=Path, default=DEFAULT.parent)
    compare = commands.add_parser("compare", help="put a run beside the record")
    compare.add_argument("run", type=Path)
    compare.add_argument("--reference", type=Path, default=DEFAULT)
    given = parser.parse_args()
    if given.command == "record":
        record(given.runs, given.output)
    else:
        sys.exit(1 if compare(given.run, given.reference) else 0)


if __name__ == "__main__":
    main()
