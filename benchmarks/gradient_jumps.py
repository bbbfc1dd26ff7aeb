"""Jumps of the gradient norms that runs have recorded, and whether anything breaks up.

    tar xJf docs/study-open/runs.tar.xz -C /tmp
    python benchmarks/gradient_jumps.py /tmp/open-study/*

A jump is a norm over the median of the twenty before it; the table has the largest of each role and
its iteration, counted from 0, and the largest residual contraction over its median from iteration
20 on. A run without 21 iterations has no jump.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

BEFORE = 20
ROLES = ("generator", "fake_score")


def largest_jump(norms: Sequence[float]) -> tuple[float, int]:
    """Largest norm over the median of those before it, and its place."""
    jumps = [
        (norms[at] / statistics.median(norms[at - BEFORE : at]), at)
        for at in range(BEFORE, len(norms))
    ]
    return max(jumps, default=(float("nan"), -1))


def row(folder: Path) -> list[str]:
    """Line of the table for a run."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    cells = [folder.name, str(len(records))]
    for role in ROLES:
        jump, at = largest_jump([each["grad_norms"][role] for each in records])
        cells.append(f"{jump:.1f} at {at}")
    tracking = [each["losses"]["residual_contraction"] for each in records[BEFORE:]]
    growth = max(tracking) / statistics.median(tracking) if tracking else float("nan")
    return [*cells, f"{growth:.1f}"]


def main() -> None:
    """Prints a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    print("run", "iterations", *ROLES, "tracking, over its median", sep="\t")
    for folder in parser.parse_args().runs:
        print(*row(folder), sep="\t")


if __name__ == "__main__":
    main()
