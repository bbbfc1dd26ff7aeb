"""A storm of faults over one run without a person, and what each kind of fault costs.

    python benchmarks/chaos.py --faults 20 --seed 0 --output chaos.json
    python benchmarks/chaos_page.py chaos.json        table and plot of docs/reliability.md

A calm run and two stormy ones are made of the recipe `tiny`, in pools, with its captions on an S3
server on loopback. A command like that of a job scheduler starts a stormy run again
(`--resume auto`) whenever its process has ended of a fault that was ordered. A fault is drawn by
its number from the seed and comes at an iteration of its own, where the run first reaches it:

    kill             SIGKILL of a role, the text encoder, the feed or the validator
    freeze           SIGSTOP of one of these
    driver           SIGKILL of the run's own process
    driver, torn     the same, and the newest checkpoint loses half of a file
    server frozen    the S3 server stands still for some seconds
    server restarted it is ended, and started again some seconds later
    server busy      it answers 503 SlowDown for some seconds
    disk full        nothing more fits on the disk of the run's folder, until some seconds after the
                     run has ended of it

The second stormy run stands on a Ray cluster of two machines, with fake score and validator on the
second one:

    machine          SIGKILL of the second machine's raylet; another comes some seconds later

Seconds lost by a fault: those of the stormy run from the fault to the next one, or as many
iterations after the last, less those that the calm run takes for the same iterations. Compared at
the end: every tensor of the last checkpoint, the losses of every iteration and the ledger of the
samples. The exit code is 1 if any of these differs or an ordered fault has not struck.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from chaos_faults import (
    EVERY,
    FIRST,
    LAST,
    MACHINE,
    SAVES_EVERY,
    StormyRun,
    make_run,
    not_struck,
    order_faults,
)
from chaos_world import ROOT, Disk, Machines, Server, write_clips
from documents import write_document
from safetensors.torch import load_file

from pipelines.data.stream.ledger import Ledger
from pipelines.run.folder import read_jsonl

_LONGEST_S = 1800.0
_FULL_DISK = ("StorageError", "Free space there")
"""Words of the error of a full disk."""


class Ride:
    """A run that is started again until it has ended well.

    Args:
        run: The run.
        server: Where its captions are.
        disk: Where its folder is.
        machines: The cluster that it joins; None: one of its own.
    """

    def __init__(
        self, run: StormyRun, server: Server, disk: Disk, machines: Machines | None = None
    ) -> None:
        self._run = run
        self._server = server
        self.disk = disk
        self._machines = machines
        self._num_read = 0
        self._ordered: Counter[str] = Counter()
        self.ends: list[str] = []
        self.seconds = 0.0

    def make(self) -> None:
        """Makes the run.

        Raises:
            SystemExit: It has ended of something that the storm has not ordered, or takes too long.
        """
        began_s = time.monotonic()
        while (code := self._start(began_s)) != 0:
            self.ends.append(self._cause(code))
            self._ordered[self.ends[-1]] -= 1
        self.seconds = time.monotonic() - began_s

    @property
    def log(self) -> Path:
        """Output of the latest process of the run."""
        return Path(self._run.folder) / f"{self._run.name}-{len(self.ends) + 1}.log"

    def _start(self, began_s: float) -> int:
        command = [sys.executable, str(Path(__file__).with_name("chaos.py")), "--child"]
        environment = {**os.environ, **self._server.environment}
        if self._machines is not None:
            environment |= self._machines.environment
        with self.log.open("w") as log:
            child = subprocess.Popen(
                [*command, self._run.to_json()], cwd=ROOT, env=environment, stdout=log, stderr=log
            )
            while child.poll() is None:
                time.sleep(0.2)
                self.disk.look()
                self._strike(child.pid)
                if time.monotonic() - began_s > _LONGEST_S:
                    child.kill()
                    raise SystemExit(f"no end after {_LONGEST_S:.0f} s: see {self.log}")
        # What it wrote last, before it was killed.
        self._strike(child.pid)
        return child.returncode

    def _strike(self, process: int) -> None:
        """Does what the storm has ordered."""
        lines = self._run.book()
        for line in lines[self._num_read :]:
            kind = line.get("kind", "")
            self._ordered[kind.partition(",")[0]] += 1
            if kind.startswith("server"):
                self._server.strike(kind)
            elif kind == "disk full":
                self.disk.fill(process)
            elif kind == MACHINE:
                assert self._machines is not None, "a machine is lost on a cluster of two only"
                self._machines.lose()
        self._num_read = len(lines)

    def _cause(self, code: int) -> str:
        """The ordered fault that a process has ended of."""
        if code == -signal.SIGKILL and self._ordered["driver"]:
            return "driver"
        said = self.log.read_text()
        if all(words in said for words in _FULL_DISK) and (
            self._ordered["disk full"] or self.disk.is_full
        ):
            self.disk.meet()
            while self.disk.is_full:
                time.sleep(0.2)
                self.disk.look()
            return "disk full"
        raise SystemExit(f"{self._run.name} ended with {code}: see {self.log}")


def seconds_lost(stormy: StormyRun, calm: StormyRun) -> dict[str, list[float]]:
    """Seconds of each fault, by kind; see the top of this file."""
    usual, reached = _first_times(calm), _first_times(stormy)
    iterations = sorted(stormy.faults)
    found: dict[str, list[float]] = {}
    for number, iteration in enumerate(iterations):
        last = next(iter(iterations[number + 1 :]), iteration + EVERY)
        took_s, usually_s = (times[last] - times[iteration] for times in (reached, usual))
        found.setdefault(stormy.faults[iteration], []).append(took_s - usually_s)
    return found


def _first_times(run: StormyRun) -> dict[int, float]:
    """Time at which each iteration was first reached."""
    found: dict[int, float] = {}
    for line in run.book():
        if "reached" in line:
            found.setdefault(line["reached"], line["time"])
    return found


def differences(stormy: StormyRun, calm: StormyRun) -> list[str]:
    """Names of all that the stormy run has not as the calm one has it."""
    found: list[str] = []
    last = f"step-{stormy.num_iterations:06d}"
    folders = [run.run_folder.checkpoints / last for run in (calm, stormy)]
    parts = {path.relative_to(folder) for folder in folders for path in _weights(folder)}
    for part in sorted(parts):
        one, other = (
            load_file(folder / part) if (folder / part).exists() else {} for folder in folders
        )
        same = {key for key in one.keys() & other.keys() if one[key].equal(other[key])}
        found += [f"{part}: {key}" for key in sorted((one.keys() | other.keys()) - same)]
    if not parts:
        found.append(f"no checkpoint {last}")
    expected = _losses(calm)[: stormy.num_iterations]
    return found + ["losses"] * (_losses(stormy) != expected)


def _weights(folder: Path) -> list[Path]:
    return list(folder.rglob("*.safetensors"))


def _losses(run: StormyRun) -> list[tuple[int, Any]]:
    lines = read_jsonl(run.run_folder.metrics)
    return [(line["iteration"], line["losses"]) for line in lines]


def samples(stormy: StormyRun, calm: StormyRun) -> dict[str, Any]:
    """Samples that the stormy run has used, and by iteration lost or used twice."""
    used, expected = (_used(run, stormy.num_iterations) for run in (stormy, calm))
    lost, repeated = expected - used, used - expected
    return {"used": used.total(), "lost": lost.total(), "repeated": repeated.total()}


def _used(run: StormyRun, num_iterations: int) -> Counter[tuple[int, int, str]]:
    """Number of uses of each sample, with iteration and place in the batch."""
    return Counter(
        (entry.iteration, place, name)
        for entry in Ledger(run.run_folder.ledger).entries()
        if entry.iteration < num_iterations
        for place, name in enumerate(entry.sample_ids)
    )


def missed(stormy: StormyRun, ends: Sequence[str]) -> list[str]:
    """Ordered faults that have not struck, with their iterations.

    Args:
        stormy: The run.
        ends: Faults that its processes have ended of.
    """
    # The driver writes its own down before: what proves it is the end of the process.
    drivers = sum(line.get("kind", "").startswith("driver") for line in stormy.book())
    return not_struck(stormy, stormy.num_iterations) + ["driver"] * (drivers - ends.count("driver"))


def compare(ride: Ride, stormy: StormyRun, calm: StormyRun) -> dict[str, Any]:
    """Effects of a storm."""
    events = Counter(event["kind"] for event in read_jsonl(stormy.run_folder.events))
    lost = seconds_lost(stormy, calm)
    without_effect = missed(stormy, ride.ends)
    return {
        "iterations": stormy.num_iterations,
        "faults": len(stormy.faults) - len(without_effect),
        "missed": without_effect,
        "differences": differences(stormy, calm),
        "samples": samples(stormy, calm),
        "ends": ride.ends,
        "disk": ride.disk.how,
        "seconds": ride.seconds,
        "seconds_lost": {kind: [round(s, 2) for s in lost[kind]] for kind in sorted(lost)},
        "events": dict(sorted(events.items())),
    }


def problems(storms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Findings that must not be in storms, as `compare` returns them, by name of the run."""
    found: list[str] = []
    for name, storm in storms.items():
        found += [f"{name}: {what} differs" for what in storm["differences"]]
        found += [f"{name}: {what} has not struck" for what in storm["missed"]]
        for fate in ("lost", "repeated"):
            if storm["samples"][fate]:
                found.append(f"{name}: {storm['samples'][fate]} samples {fate}")
    return found


def run_of(folder: Path, name: str, faults: Mapping[int, str]) -> StormyRun:
    """A run as long as its faults take, and to the next save."""
    num_saves = math.ceil((max(faults) + LAST) / SAVES_EVERY)
    return StormyRun(str(folder / name), name, num_saves * SAVES_EVERY, faults)


def ride(run: StormyRun, server: Server) -> Ride:
    """Makes a run; on two machines if one is to be lost."""
    Path(run.folder).mkdir()
    disk = Disk(run.disk, may_fill="disk full" in run.faults.values())
    with ExitStack() as stack:
        stack.callback(disk.close)
        machines = None
        if run.is_on_two_machines:
            machines = Machines(server.environment)
            stack.callback(machines.close)
        ridden = Ride(run, server, disk, machines)
        ridden.make()
    return ridden


def measure(
    faults: Mapping[int, str], num_machines: int, folder: Path, calm_settings: Sequence[str] = ()
) -> dict[str, Any]:
    """Makes all runs below a folder, and compares them.

    Args:
        faults: Those of the run on one machine: kind by iteration.
        num_machines: Losses of a second machine.
        folder: Place of the runs.
        calm_settings: Settings of the recipe that the calm run alone has.
    """
    lost = {FIRST + 2 * EVERY * number: MACHINE for number in range(num_machines)}
    named = {"pools": faults, "machines": lost}
    runs = [run_of(folder, name, given) for name, given in named.items() if given]
    longest = max(run.num_iterations for run in runs)
    calm = StormyRun(str(folder / "calm"), "calm", longest, {}, calm_settings)
    server = Server(folder / "s3")
    write_clips(folder / "s3")
    server.start()
    try:
        seconds_calm = ride(calm, server).seconds
        storms = {run.name: compare(ride(run, server), run, calm) for run in runs}
    finally:
        server.stop()
    return {
        "settings": {"faults": len(faults) + num_machines},
        "results": {
            "seconds_calm": seconds_calm,
            "requests_refused": server.num_refused,
            "storms": storms,
            "problems": problems(storms),
        },
    }


def main() -> None:
    """Runs the benchmark, or a run of it."""
    if sys.argv[1:2] == ["--child"]:
        make_run(StormyRun.from_json(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--faults", type=int, default=20, help="in pools on one machine")
    parser.add_argument("--machines", type=int, default=2, help="losses of a second machine")
    parser.add_argument("--kinds", type=json.loads, help="kind by iteration instead, as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    faults = order_faults(given.faults, given.seed)
    if given.kinds is not None:
        faults = {int(iteration): kind for iteration, kind in given.kinds.items()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(faults, given.machines, folder)
    found["settings"]["seed"] = given.seed
    write_document("chaos", found, given.output)
    if found["results"]["problems"]:
        raise SystemExit("\n".join(found["results"]["problems"]))


if __name__ == "__main__":
    main()
