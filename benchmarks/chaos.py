"""A storm of faults over one run without a person, and what each kind of fault costs.

    sgmd shapes data/shapes
    python benchmarks/chaos.py --faults 20 --seed 0 --output chaos.json

A calm run and a stormy one are made of the recipe `tiny`, in pools, with its captions on an S3
server on loopback. A command like that of a job scheduler starts the stormy run again
(`--resume auto`) whenever its process has ended. A fault is drawn by its number from the seed and
comes at an iteration of its own, where the run first reaches it:

    kill             SIGKILL of a role, the text encoder, the feed or the validator
    freeze           SIGSTOP of one of these
    driver           SIGKILL of the run's own process
    driver, torn     the same, and the newest checkpoint loses half of a file
    server frozen    the S3 server stands still for some seconds
    server restarted it is killed and started again

Seconds lost by a fault: from the fault to the first iteration beyond all earlier ones, less the
calm run's median iteration. Compared at the end: every tensor of the last checkpoint, the losses of
every iteration and the ledger of the samples.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from documents import write_document
from safetensors.torch import load_file

from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.distillation import run as runs
from pipelines.distillation.groups import Groups
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.run.observer import RunObserver
from pipelines.run.records import IterationRecord

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.helpers.s3_server import S3Access, serve_s3  # noqa: E402

GROUPS = ("generator", "fake_score", "teacher", "text", "feed", "validator")
_FIRST, _EVERY, _LAST = 4, 5, 6
"""Iterations before the first fault, between two, and after the last."""
_FROZEN_SERVER_S = 8.0
_LONGEST_S = 3000.0


def storm(num_faults: int, seed: int) -> dict[int, str]:
    """Faults by iteration; each kind comes as often as any other, in a drawn order."""
    kinds = [f"kill {name}" for name in GROUPS]
    kinds += [f"freeze {name}" for name in ("generator", "teacher", "validator")]
    kinds += ["driver", "driver, torn", "server frozen", "server restarted"]
    drawn = random.Random(seed)
    order: list[str] = []
    while len(order) < num_faults:
        order += drawn.sample(kinds, len(kinds))
    return {_FIRST + _EVERY * number: kind for number, kind in enumerate(order[:num_faults])}


def recipe(folder: Path, name: str, num_iterations: int, data: str) -> DistillConfig:
    """The run; a validation and a checkpoint every ten iterations."""
    settings = (
        f"name={name}",
        f"output={folder}",
        f"iterations={num_iterations}",
        "topology.mode=pools",
        "batch={size: 4, micro_batches: 2}",
        f"data.train={data}/train",
        f"data.validation={data}/held_out",
        "data.s3={checksums: when_required, read_timeout_s: 5}",
        "validation={every: 10, num_captions: 4, teacher_steps: 2}",
        "checkpoint={every: 10, keep: 3, keep_best: 0}",
        "alarms.stop=[]",
        "recovery.failures_per_hour=1000",
    )
    return load_recipe("tiny", settings)


class Storm(RunObserver):
    """Strikes when the run reaches an iteration, once each; writes down when each was reached.

    Args:
        faults: Kind by iteration.
        folder: Where the storm keeps its books, which outlive the process.
        groups: Filled when the run has opened them.
        checkpoints: Folder of the run's checkpoints.
    """

    def __init__(
        self, faults: dict[int, str], folder: Path, groups: list[Groups], checkpoints: Path
    ) -> None:
        self._faults = faults
        self._book = folder / "storm.jsonl"
        self._groups = groups
        self._checkpoints = checkpoints
        self._struck = {line["iteration"] for line in read_book(folder) if "kind" in line}

    def iteration(self, record: IterationRecord) -> None:
        """Notes an iteration, and strikes if a fault is due."""
        self._write({"reached": record.iteration, "time": time.time()})
        kind = self._faults.get(record.iteration)
        if kind is None or record.iteration in self._struck:
            return
        self._struck.add(record.iteration)
        self._write({"iteration": record.iteration, "kind": kind, "time": time.time()})
        what, _, whom = kind.partition(" ")
        if kind.startswith("driver"):
            if kind.endswith("torn"):
                self._tear()
            os.kill(os.getpid(), signal.SIGKILL)
        elif what in ("kill", "freeze"):
            (group,) = [group for group in self._groups[-1].all if group.name == whom]
            number = signal.SIGKILL if what == "kill" else signal.SIGSTOP
            # In the middle of the next iteration, where there is work to lose.
            process = group.process_ids()[0]
            threading.Timer(0.05, os.kill, (process, number)).start()

    def _tear(self) -> None:
        whole = sorted(self._checkpoints.glob("step-*/manifest.json"))
        if whole:
            part = next(whole[-1].parent.glob("generator/*.safetensors"))
            with part.open("r+b") as file:
                file.truncate(part.stat().st_size // 2)

    def _write(self, line: dict[str, Any]) -> None:
        with self._book.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_book(folder: Path) -> list[dict[str, Any]]:
    """The lines that a storm has written."""
    book = folder / "storm.jsonl"
    return [json.loads(line) for line in book.read_text().splitlines()] if book.exists() else []


def make_run(config: DistillConfig, faults: dict[int, str], folder: Path) -> None:
    """Makes the run or goes on with it, under a storm; in a process of its own."""
    opened: list[Groups] = []
    original = runs.open_groups

    @contextmanager
    def open_groups(*arguments: Any, **options: Any) -> Iterator[Groups]:  # noqa: ANN401
        with original(*arguments, **options) as groups:
            opened.append(groups)
            yield groups

    runs.open_groups = open_groups
    run = RunFolder(config.run_folder)
    observer = Storm(faults, folder, opened, run.checkpoints)
    runs.distill(config, resume=run.config.exists(), observer=observer)


class Server:
    """The S3 server, and the faults that befall it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._access = S3Access()
        self._context: Any = None
        self.environment: dict[str, str] = {}

    def start(self) -> None:
        """Starts it on its port."""
        self._context = serve_s3(self._root, self._access)
        self.environment = self._context.__enter__().environment

    def stop(self) -> None:
        """Ends it."""
        self._context.__exit__(None, None, None)

    def freeze(self) -> None:
        """Stops it for some seconds."""
        for process in _children_named("rclone"):
            os.kill(process, signal.SIGSTOP)
            threading.Timer(_FROZEN_SERVER_S, os.kill, (process, signal.SIGCONT)).start()


def _children_named(name: str) -> list[int]:
    found = subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "-f", name], capture_output=True, text=True, check=False
    )
    return [int(line) for line in found.stdout.split()]


def ride_out(
    folder: Path, name: str, faults: dict[int, str], num_iterations: int, server: Server
) -> tuple[float, int]:
    """Starts a run again until it has ended well; returns its seconds and its starts."""
    began_s, starts, met = time.monotonic(), 0, 0
    arguments = [str(folder), name, str(num_iterations), json.dumps(faults)]
    while True:
        starts += 1
        with (folder / f"{name}-{starts}.log").open("w") as log:
            command = [sys.executable, __file__, "--child", *arguments]
            environment = {**os.environ, **server.environment}
            child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
            while child.poll() is None:
                time.sleep(0.2)
                met = _strike_server(folder, met, server)
                if time.monotonic() - began_s > _LONGEST_S:
                    child.kill()
                    raise SystemExit(f"{name} has not ended in {_LONGEST_S:.0f} s: see {folder}")
        if child.returncode == 0:
            return time.monotonic() - began_s, starts
        if child.returncode != -signal.SIGKILL:
            raise SystemExit(f"{name} ended with {child.returncode}: see {log.name}")


def _strike_server(folder: Path, met: int, server: Server) -> int:
    """Does to the server what the storm has ordered; returns how many lines were read."""
    lines = read_book(folder)
    for line in lines[met:]:
        if line.get("kind") == "server frozen":
            server.freeze()
        elif line.get("kind") == "server restarted":
            server.stop()
            server.start()
    return len(lines)


def seconds_lost(folder: Path, usual_s: float) -> dict[str, list[float]]:
    """Seconds by kind of fault: until the run was further than before, less an iteration."""
    lines = read_book(folder)
    found: dict[str, list[float]] = {}
    for place, line in enumerate(lines):
        if "kind" in line:
            beyond = next(
                other["time"]
                for other in lines[place:]
                if other.get("reached", -1) > line["iteration"]
            )
            found.setdefault(line["kind"], []).append(beyond - line["time"] - usual_s)
    return found


def differences(calm: RunFolder, stormy: RunFolder, last: int) -> list[str]:
    """Whatever is not the same in both runs, by name."""
    found: list[str] = []
    folders = [run.checkpoints / f"step-{last:06d}" for run in (calm, stormy)]
    parts = {path.relative_to(folders[0]) for path in folders[0].rglob("*.safetensors")}
    for part in sorted(parts):
        one, other = (load_file(folder / part) for folder in folders)
        found += [f"{part}: {key}" for key in one if not one[key].equal(other[key])]
    losses = [
        [(line["iteration"], line["losses"]) for line in _metrics(run)] for run in (calm, stormy)
    ]
    if losses[0] != losses[1]:
        found.append("losses")
    ledgers = [
        {path.name: path.read_text() for path in sorted(run.ledger.glob("*.jsonl"))}
        for run in (calm, stormy)
    ]
    if ledgers[0] != ledgers[1]:
        found.append("ledger")
    return found


def _metrics(run: RunFolder) -> list[dict[str, Any]]:
    return read_jsonl(run.metrics)


def measure(data: Path, num_faults: int, seed: int, folder: Path) -> dict[str, Any]:
    """Makes both runs and compares them."""
    faults = storm(num_faults, seed)
    num_iterations = _FIRST + _EVERY * num_faults + _LAST
    bucket = folder / "s3" / "clips"
    bucket.parent.mkdir(parents=True)
    shutil.copytree(data, bucket)
    server = Server(bucket.parent)
    server.start()
    try:
        (folder / "books-calm").mkdir()
        calm_s, _ = ride_out(folder / "books-calm", "calm", {}, num_iterations, server)
        (folder / "books-stormy").mkdir()
        stormy_s, starts = ride_out(
            folder / "books-stormy", "stormy", faults, num_iterations, server
        )
    finally:
        server.stop()
    runs_of = [
        RunFolder(recipe(folder / f"books-{name}", name, num_iterations, "s3://clips").run_folder)
        for name in ("calm", "stormy")
    ]
    usual_s = statistics.median(line["seconds"]["total"] for line in _metrics(runs_of[0]))
    lost = seconds_lost(folder / "books-stormy", usual_s)
    events = read_jsonl(runs_of[1].events)
    return {
        "settings": {"faults": num_faults, "seed": seed, "iterations": num_iterations},
        "results": {
            "differences": differences(*runs_of, num_iterations),
            "starts": starts,
            "seconds_calm": calm_s,
            "seconds_stormy": stormy_s,
            "iteration_s": usual_s,
            "seconds_lost": {
                kind: {"median": statistics.median(times), "longest": max(times), "n": len(times)}
                for kind, times in sorted(lost.items())
            },
            "events": {
                kind: sum(event["kind"] == kind for event in events)
                for kind in sorted({event["kind"] for event in events})
            },
        },
    }


def main() -> None:
    """Runs the benchmark, or a run of it."""
    if sys.argv[1:2] == ["--child"]:
        folder, name, num_iterations, faults = sys.argv[2:]
        config = recipe(Path(folder), name, int(num_iterations), "s3://clips")
        numbered = {int(iteration): kind for iteration, kind in json.loads(faults).items()}
        make_run(config, numbered, Path(folder))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/shapes"))
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep both runs here")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        found = measure(arguments.data, arguments.faults, arguments.seed, folder.absolute())
    write_document("chaos", found, arguments.output)
    if found["results"]["differences"]:
        raise SystemExit(f"the runs differ: {', '.join(found['results']['differences'])}")


if __name__ == "__main__":
    main()
