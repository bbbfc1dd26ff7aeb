"""A long run with a fault every 200 iterations, and what each of its processes takes meanwhile.

    python benchmarks/soak.py --output soak.json --plot docs/soak.svg
    python benchmarks/soak.py --folder runs/soak --only-judge       what is known by now

The recipe `tiny` in pools, with batches of four. The fault is SIGKILL of a drawn role, the text
encoder, the feed or the validator; its process is replaced. Every few seconds one line is added to
FOLDER/samples.jsonl, so that a soak that breaks leaves what it has found:

    memory_mb      private resident memory; pages of the object store count apart
    pss_mb         proportional set size: shared pages count in parts
    descriptors    open files, sockets and pipes
    threads

of the run's own process (driver), of each role, text encoder, feed and validator, and of Ray's
control service and raylet; besides content and objects of the object store, and all processes below
the driver.

Growth is the slope over iterations, least squares with one slope and a level of its own for each
process that had the same part, without the first iterations of each. A quantity is flat if its
growth in 1,000 iterations is below the limit.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from chaos_faults import GROUPS, StormyRun, make_run, not_struck
from chaos_world import ROOT, write_clips
from documents import write_document
from soak_plot import draw
from store_use import store_use

from pipelines.run.folder import read_jsonl
from pipelines.run.observer import RunObserver
from pipelines.run.records import IterationRecord

LIMITS = {
    "memory_mb": 20.0,
    "pss_mb": 20.0,
    "descriptors": 5.0,
    "threads": 2.0,
    "store_mb": 20.0,
    "objects": 20.0,
    "processes": 1.0,
}
"""Growth in 1,000 iterations up to which a quantity counts as flat."""

_OF_RAY = {"gcs_server": "control service", "raylet": "raylet"}
_OF_RUN = "run"
"""Place of quantities that belong to no single process."""


class Sampler(RunObserver):
    """Writes down what the processes of the run take, from a thread of its own.

    Args:
        path: One line a sample.
        every_s: Seconds between two.
    """

    def __init__(self, path: Path, every_s: float) -> None:
        self._path = path
        self._every_s = every_s
        self._iteration = -1
        self._thread = threading.Thread(target=self._work, name="sampler", daemon=True)

    def iteration(self, record: IterationRecord) -> None:
        """Begins with the first iteration."""
        self._iteration = record.iteration
        if not self._thread.is_alive():
            self._thread.start()

    def _work(self) -> None:
        while True:
            try:
                line = self._sample()
            except Exception as error:
                # A process that ends while it is looked at; Ray while a role is replaced.
                line = {"problem": f"{type(error).__name__}: {error}"}
            with self._path.open("a") as file:
                file.write(json.dumps({"iteration": self._iteration, "time": time.time()} | line))
                file.write("\n")
            time.sleep(self._every_s)

    def _sample(self) -> dict[str, Any]:
        below = psutil.Process().children(recursive=True)
        parts = {"driver": os.getpid(), **_roles({process.pid for process in below})}
        for process in below:
            if process.name() in _OF_RAY:
                parts[_OF_RAY[process.name()]] = process.pid
        store = store_use()
        return {
            "processes": len(below),
            "store_mb": store.num_bytes / 2**20,
            "objects": store.num_objects,
            "parts": {name: _look(pid) for name, pid in parts.items()},
        }


def _roles(living: set[int]) -> dict[str, int]:
    """Process by group, as the processes themselves report it."""
    from cluster.ray.failures import open_processes
    from cluster.ray.progress import read_report

    found: dict[str, int] = {}
    for actor, (group, _) in open_processes().items():
        report = read_report(actor)
        if report is not None and report.pid in living:
            found[group] = report.pid
    return found


def _look(pid: int) -> dict[str, float]:
    folder = Path(f"/proc/{pid}")
    sizes = _kilobytes(folder / "status")
    process = psutil.Process(pid)
    return {
        "pid": pid,
        "memory_mb": (sizes["RssAnon"] + sizes["RssFile"]) / 1024,
        "pss_mb": _kilobytes(folder / "smaps_rollup")["Pss"] / 1024,
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
    }


def _kilobytes(path: Path) -> dict[str, int]:
    lines = [line.split() for line in path.read_text().splitlines()]
    return {line[0].rstrip(":"): int(line[1]) for line in lines if line[2:] == ["kB"]}


def curves(
    samples: list[dict[str, Any]],
) -> dict[tuple[str, str], dict[int, list[tuple[int, float]]]]:
    """(iteration, value) by part and quantity, then by process."""
    found: dict[tuple[str, str], dict[int, list[tuple[int, float]]]] = {}
    for sample in samples:
        for part, quantity, pid, value in _values(sample):
            own = found.setdefault((part, quantity), {}).setdefault(pid, [])
            own.append((sample["iteration"], value))
    return found


def _values(sample: Mapping[str, Any]) -> Iterator[tuple[str, str, int, float]]:
    for quantity in ("processes", "store_mb", "objects"):
        if quantity in sample:
            yield _OF_RUN, quantity, 0, sample[quantity]
    for part, taken in sample.get("parts", {}).items():
        for quantity, value in taken.items():
            if quantity != "pid":
                yield part, quantity, taken["pid"], value


def growth(
    processes: Mapping[int, list[tuple[int, float]]], warm_up: int, shortest: int
) -> dict[str, float] | None:
    """Growth in 1,000 iterations, its standard error, and over how many iterations it is known.

    None where processes have been seen, after their warm-up, for less than `shortest` together.
    """
    covariance = variance = squares = span = 0.0
    free = -1
    for points in processes.values():
        first = points[0][0]
        warm = [point for point in points if point[0] >= first + warm_up]
        if len(warm) < 3:
            continue
        mean_x, mean_y = (statistics.fmean(column) for column in zip(*warm, strict=True))
        covariance += sum((x - mean_x) * (y - mean_y) for x, y in warm)
        variance += sum((x - mean_x) ** 2 for x, _ in warm)
        squares += sum((y - mean_y) ** 2 for _, y in warm)
        span += warm[-1][0] - warm[0][0]
        free += len(warm) - 1
    if span < shortest or not variance or free < 1:
        return None
    slope = covariance / variance
    left = max(0.0, squares - slope * covariance)
    error = (left / free / variance) ** 0.5
    return {"per_1000": 1000 * slope, "error": 1000 * error, "iterations": span}


def judge(samples: list[dict[str, Any]], warm_up: int, shortest: int) -> dict[str, Any]:
    """Growth and verdict by part and quantity, and whether all is flat."""
    verdicts: dict[str, dict[str, Any]] = {}
    for (part, quantity), processes in curves(samples).items():
        values = [value for points in processes.values() for _, value in points]
        found: dict[str, Any] = {
            "processes": len(processes),
            "median": statistics.median(values),
            "max": max(values),
        }
        grown = growth(processes, warm_up, shortest)
        if grown is None:
            found["verdict"] = "too short"
        else:
            is_flat = grown["per_1000"] <= LIMITS[quantity]
            found |= grown | {"verdict": "flat" if is_flat else "grows"}
        verdicts.setdefault(part, {})[quantity] = found
    stated = [found["verdict"] for own in verdicts.values() for found in own.values()]
    return {
        "flat": bool(stated) and all(verdict == "flat" for verdict in stated),
        "grows": [
            f"{part}: {quantity}"
            for part, own in verdicts.items()
            for quantity, found in own.items()
            if found["verdict"] == "grows"
        ],
        "parts": verdicts,
    }


def evaluate(run: StormyRun, warm_up: int, shortest: int) -> dict[str, Any]:
    """Figures of a soak, finished or not."""
    samples = _lines(_samples_path(run))
    metrics = read_jsonl(run.run_folder.metrics)
    took = [line["seconds"]["total"] for line in metrics]
    third = max(1, len(took) // 3)
    reached = [line["time"] for line in run.book() if "reached" in line]
    events = [event["kind"] for event in read_jsonl(run.run_folder.events)]
    return {
        "iterations": len(metrics),
        "faults": [line for line in run.book() if "kind" in line],
        "missed": not_struck(run, len(metrics)),
        "events": {kind: events.count(kind) for kind in sorted(set(events))},
        "samples": len(samples),
        "problems": [line["problem"] for line in samples if "problem" in line],
        "seconds": reached[-1] - reached[0] if reached else 0.0,
        "iteration_s": {
            name: statistics.median(part) if part else None
            for name, part in (("first_third", took[:third]), ("last_third", took[-third:]))
        },
        **judge(samples, warm_up, shortest),
    }


def _samples_path(run: StormyRun) -> Path:
    return Path(run.folder) / "samples.jsonl"


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines; the last one may be torn."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def soak(folder: Path, num_iterations: int, every: int, seed: int) -> StormyRun:
    """The run, and its faults."""
    drawn = random.Random(seed)
    faults = {at: f"kill {drawn.choice(GROUPS)}" for at in range(every, num_iterations, every)}
    settings = (
        f"data.train={folder}/clips/train",
        f"data.validation={folder}/clips/held_out",
        "validation={every: 100, num_captions: 4, teacher_steps: 2}",
        "checkpoint={every: 50, keep: 2, keep_best: 1}",
    )
    return StormyRun(str(folder), "soak", num_iterations, faults, settings)


def make(run: StormyRun, every_s: float) -> int:
    """Makes the run in a process of its own; returns its exit code."""
    command = [sys.executable, __file__, "--child", run.to_json(), str(every_s)]
    with (Path(run.folder) / "run.log").open("a") as log:
        return subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=False).returncode


def main() -> None:
    """Runs the benchmark, or the run of it."""
    if sys.argv[1:2] == ["--child"]:
        run = StormyRun.from_json(sys.argv[2])
        make_run(run, Sampler(_samples_path(run), float(sys.argv[3])))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--fault-every", type=int, default=200)
    parser.add_argument("--sample-every-s", type=float, default=5.0)
    parser.add_argument("--warm-up", type=int, default=200, help="iterations of a process")
    parser.add_argument("--shortest", type=int, default=300, help="iterations to judge by")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep run and samples here")
    parser.add_argument("--only-judge", action="store_true", help="what FOLDER has by now")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).absolute()
        run = soak(folder, given.iterations, given.fault_every, given.seed)
        code = 0
        if not given.only_judge:
            write_clips(folder)
            code = make(run, given.sample_every_s)
        found = evaluate(run, given.warm_up, given.shortest)
        log = (folder / "run.log").read_text()[-3000:] if code else ""
        if given.plot:
            given.plot.write_text(draw(curves(_lines(_samples_path(run))), list(run.faults)))
    settings = {
        "iterations": given.iterations,
        "fault_every": given.fault_every,
        "warm_up": given.warm_up,
        "shortest": given.shortest,
        "limits_per_1000": LIMITS,
    }
    write_document("soak", {"settings": settings, "results": found}, given.output)
    if code:
        raise SystemExit(f"the run ended with {code}:\n{log}")
    stated = [("these faults have not struck", "missed"), ("these grow", "grows")]
    if problems := [f"{words}: {', '.join(found[key])}" for words, key in stated if found[key]]:
        raise SystemExit("; ".join(problems))


if __name__ == "__main__":
    main()
