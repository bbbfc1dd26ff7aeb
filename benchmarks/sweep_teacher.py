"""Cost of a sweep whose trials share what is frozen, against trials or runs of their own.

    python benchmarks/sweep_teacher.py pools --data data/shapes --output sweep_teacher.json
    python benchmarks/sweep_teacher.py clips --data data/shapes --output sweep_clips.json

`pools`: the same trials with pools as a sweep with `sweep.share_teacher`, as a sweep with a teacher
and a text encoder a trial, and as separate runs of `sgmd distill`, as many at once. The losses of
every trial are compared bit by bit.

`clips`: a sweep of trials in one process each, which keeps the teacher's measured clips for all of
them, against one whose trials each sample their own; in turns.

CPU seconds and memory (proportional set size: shared pages count in parts) are those of all
processes, Ray's own included. The networks of the embedded world are small: what a process costs,
and not its weights, is what `pools` saves here. With real networks the weights come on top
(`sgmd plan` says how much).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from documents import write_document
from process_tree import MARK, ProcessTree

_EVERY_S = 0.5


def settings_of(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Settings that all ways have in common."""
    return [
        f"data.train={arguments.data}/train",
        f"data.validation={arguments.data}/held_out",
        f"output={folder}",
        f"validation.num_captions={arguments.captions}",
        f"validation.teacher_steps={arguments.teacher_steps}",
        "batch.size=4",
    ]


def sweep_command(arguments: argparse.Namespace, folder: Path, *settings: str) -> list[str]:
    """A sweep over weights."""
    return [
        *(sys.executable, "-m", "pipelines.cli", "sweep", "tiny", "--json"),
        *settings_of(arguments, folder),
        f"sweep.iterations={arguments.iterations}",
        f"sweep.concurrent_trials={arguments.at_once}",
        *settings,
    ]


def weights(arguments: argparse.Namespace) -> list[float]:
    """Weight of each trial."""
    return [round(0.05 * (index + 1), 2) for index in range(arguments.trials)]


def run_command(arguments: argparse.Namespace, folder: Path, weight: float) -> list[str]:
    """One run, as a trial makes it."""
    return [
        *(sys.executable, "-m", "pipelines.cli", "distill", "tiny", "--json"),
        *settings_of(arguments, folder),
        f"name=weight-{weight}",
        f"objective.lambda_nr={weight}",
        f"iterations={arguments.iterations}",
        f"validation.every={arguments.iterations}",
        f"checkpoint.every={arguments.iterations}",
        "checkpoint.keep=1",
        "checkpoint.keep_best=0",
        "topology.mode=pools",
    ]


def measure(commands: Sequence[list[str]], at_once: int, folder: Path) -> dict[str, Any]:
    """Runs commands to their end, so many at once.

    Raises:
        SystemExit: One failed.
    """
    mark = uuid4().hex
    processes, samples = ProcessTree(mark), [(0.0, 0)]
    waiting, running = list(enumerate(commands)), dict[Path, subprocess.Popen[bytes]]()
    began_s = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                number, command = waiting.pop(0)
                log = folder / f"{number}.txt"
                with log.open("w") as out:
                    running[log] = subprocess.Popen(
                        command, stdout=out, stderr=out, env={**os.environ, MARK: mark}
                    )
            processes.look()
            samples.append(processes.memory_mb())
            time.sleep(_EVERY_S)
            for log in [log for log, process in running.items() if process.poll() is not None]:
                if running.pop(log).returncode:
                    raise SystemExit(log.read_text())
    finally:
        processes.end()
    by_name = processes.seconds_by_name()
    return {
        "cpu_s": round(sum(by_name.values()), 1),
        "seconds": round(time.monotonic() - began_s, 1),
        "peak_pss_mb": round(max(mb for mb, _ in samples)),
        "most_processes": max(count for _, count in samples),
        "load": os.getloadavg()[0],
    }


def losses_below(folder: Path) -> dict[str, Any]:
    """Losses of every run below a folder, by its weight."""
    found: dict[str, Any] = {}
    for path in folder.rglob("metrics.jsonl"):
        config = (path.parent / "config.yaml").read_text()
        (weight,) = [
            line.split(":")[1].split("#")[0].strip()
            for line in config.splitlines()
            if line.strip().startswith("lambda_nr:")
        ]
        lines = path.read_text().splitlines()
        found[weight] = [json.loads(line)["losses"] for line in lines]
    return found


def measure_pools(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trials with one teacher, trials with copies, separate runs."""
    results: dict[str, Any] = {}
    losses: dict[str, Any] = {}
    for way in ("shared", "separate", "runs"):
        folder = Path(tempfile.mkdtemp(prefix="sweep-teacher-"))
        if way == "runs":
            commands = [run_command(arguments, folder, weight) for weight in weights(arguments)]
        else:
            grid = f"sweep.grid={{objective.lambda_nr: {weights(arguments)}}}"
            shares = f"sweep.share_teacher={str(way == 'shared').lower()}"
            pools = "sweep.settings={topology.mode: pools}"
            commands = [sweep_command(arguments, folder, grid, shares, pools)]
        results[way] = measure(commands, arguments.at_once, folder)
        losses[way] = losses_below(folder)
        shutil.rmtree(folder)
        print(way, results[way], file=sys.stderr)
    same = losses["shared"] == losses["separate"] == losses["runs"]
    return {**results, "losses_are_equal": same, "trials": len(losses["runs"])}


def measure_clips(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trials that share the teacher's measured clips, and trials that sample them, in turns."""
    turns: list[dict[str, Any]] = []
    for _ in range(arguments.turns):
        turn: dict[str, Any] = {}
        for way in ("kept", "sampled"):
            folder = Path(tempfile.mkdtemp(prefix="sweep-clips-"))
            own = [f"{folder}/clips-{index}" for index in range(arguments.trials)]
            same = [f"{own[0]}{'/.' * index}" for index in range(arguments.trials)]
            grid = own if way == "sampled" else same
            settings = f"sweep.grid={{validation.teacher_clips: {json.dumps(grid)}}}"
            command = sweep_command(
                arguments, folder, settings, "sweep.settings={topology.mode: local}"
            )
            turn[way] = measure([command], 1, folder)
            shutil.rmtree(folder)
            print(way, turn[way], file=sys.stderr)
        turns.append(turn)
    saved = [1 - turn["kept"]["cpu_s"] / turn["sampled"]["cpu_s"] for turn in turns]
    return {"turns": turns, "saved_share": {"median": statistics.median(saved), "each": saved}}


def main() -> None:
    """Measures and writes down."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("subject", choices=("pools", "clips"))
    parser.add_argument("--data", type=lambda text: Path(text).resolve(), default="data/shapes")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--captions", type=int, default=8)
    parser.add_argument("--teacher-steps", type=int, default=4)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    ways = {"pools": measure_pools, "clips": measure_clips}
    names = ("trials", "at_once", "iterations", "captions", "teacher_steps")
    settings = {name: getattr(arguments, name) for name in names}
    results = ways[arguments.subject](arguments)
    write_document(f"sweep_{arguments.subject}", {**settings, "results": results}, arguments.output)


if __name__ == "__main__":
    main()
