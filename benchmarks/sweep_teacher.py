"""Memory and seconds of a sweep whose trials share one teacher, against copies of their own.

    python benchmarks/sweep_teacher.py --data data/shapes --output sweep_teacher.json

The same grid of trials is run twice through `sgmd sweep` with pools: with `sweep.share_teacher`,
and with a teacher and a text encoder a trial. Memory is the proportional set size (shared pages
count in parts) of the sweep's process and all below it, Ray's own services included, sampled every
half second. The losses of every trial are compared bit by bit.

The networks of the embedded world are small: what a process costs, and not its weights, is what is
saved here. With real networks the weights come on top (`sgmd plan` says how much).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from documents import write_document

_EVERY_S = 0.5


def command(arguments: argparse.Namespace, folder: Path, shares: bool) -> list[str]:
    """The sweep of one way."""
    grid = [round(0.05 * (index + 1), 2) for index in range(arguments.trials)]
    return [
        *(sys.executable, "-m", "pipelines.cli", "sweep", "tiny", "--json"),
        f"data.train={arguments.data}/train",
        f"data.validation={arguments.data}/held_out",
        f"output={folder}",
        f"sweep.grid={{objective.lambda_nr: {grid}}}",
        "sweep.settings={topology.mode: pools, batch.size: 4}",
        f"sweep.iterations={arguments.iterations}",
        f"sweep.concurrent_trials={arguments.at_once}",
        f"sweep.share_teacher={str(shares).lower()}",
        "validation.num_captions=8",
        "validation.teacher_steps=4",
    ]


def tree_mb(process: psutil.Process) -> tuple[float, int]:
    """Proportional set size of a process and all below it, and how many they are."""
    total, count = 0.0, 0
    for each in [process, *process.children(recursive=True)]:
        with suppress(psutil.Error, OSError):
            total += each.memory_full_info().pss / 2**20
            count += 1
    return total, count


def measure(arguments: argparse.Namespace, shares: bool) -> dict[str, Any]:
    """Runs one sweep to its end."""
    folder = Path(tempfile.mkdtemp(prefix="sweep-teacher-"))
    began_s = time.monotonic()
    with (folder / "out.json").open("w") as out, (folder / "err.txt").open("w") as err:
        running = subprocess.Popen(
            command(arguments, folder, shares), stdout=out, stderr=err, env=dict(os.environ)
        )
        samples = []
        while running.poll() is None:
            with suppress(psutil.Error):
                samples.append(tree_mb(psutil.Process(running.pid)))
            time.sleep(_EVERY_S)
    if running.returncode:
        raise SystemExit((folder / "err.txt").read_text())
    result = json.loads((folder / "out.json").read_text())
    losses = {
        str(trial["settings"]): [
            json.loads(line)["losses"]
            for line in Path(trial["run_folder"], "metrics.jsonl").read_text().splitlines()
        ]
        for trial in result["trials"]
    }
    shutil.rmtree(folder)
    return {
        "seconds": round(time.monotonic() - began_s, 1),
        "seconds_of_training": round(sum(trial["seconds"] for trial in result["trials"]), 1),
        "peak_pss_mb": round(max(mb for mb, _ in samples)),
        "most_processes": max(count for _, count in samples),
        "losses": losses,
    }


def main() -> None:
    """Measures both ways and writes them down."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="data/shapes")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    shared, separate = (measure(arguments, shares) for shares in (True, False))
    same = shared.pop("losses") == separate.pop("losses")
    measured = {
        "trials": arguments.trials,
        "at_once": arguments.at_once,
        "iterations": arguments.iterations,
        "results": {"shared": shared, "separate": separate, "losses_are_equal": same},
    }
    write_document("sweep_teacher", measured, arguments.output)


if __name__ == "__main__":
    main()
