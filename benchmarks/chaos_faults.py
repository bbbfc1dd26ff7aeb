"""The faults of a storm, and the run that they befall: what happens in the run's own process."""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.distillation import run as runs
from pipelines.distillation.groups import Groups
from pipelines.run.folder import RunFolder
from pipelines.run.observer import Observers, RunObserver
from pipelines.run.records import IterationRecord

GROUPS = ("generator", "fake_score", "teacher", "text", "feed", "validator")
KINDS = (
    *(f"kill {name}" for name in GROUPS),
    *(f"freeze {name}" for name in ("generator", "teacher", "validator")),
    "driver",
    "driver, torn",
    "server frozen",
    "server restarted",
    "server busy",
    "disk full",
)
MACHINE = "machine"
"""The fault of a cluster of two machines."""

SECOND_MACHINE = ("fake_score", "validator")
"""The groups on the machine that is lost."""

FIRST, EVERY, LAST = 4, 5, 12
"""Iterations before the first fault, between two, and after the last, which the run must still have
captions to read for."""

SAVES_EVERY = 10
_APART = 5
"""Faults until a kind comes again, or another befalls a process that was frozen: by then the first
one is over."""

_MID_ITERATION_S = 0.05


@dataclass(frozen=True)
class StormyRun:
    """A run, and the faults that it meets.

    Attributes:
        folder: Where the storm keeps its books, and the run its folder below `disk`.
        name: Of the run.
        num_iterations: Its length.
        faults: Kind by iteration, each met when the run first reaches it.
        settings: What it has otherwise than the storm's runs.
    """

    folder: str
    name: str
    num_iterations: int
    faults: Mapping[int, str]
    settings: Sequence[str] = ()

    @classmethod
    def from_json(cls, text: str) -> "StormyRun":
        """Reads what `to_json` has written."""
        stored = json.loads(text)
        faults = {int(iteration): kind for iteration, kind in stored.pop("faults").items()}
        return cls(faults=faults, **stored)

    def to_json(self) -> str:
        """Writes it as one argument of a command."""
        return json.dumps(asdict(self))

    @property
    def is_on_two_machines(self) -> bool:
        """True if one of them is to be lost."""
        return MACHINE in self.faults.values()

    @property
    def disk(self) -> Path:
        """Place of all that the run writes."""
        return Path(self.folder) / "disk"

    @property
    def run_folder(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(self.disk / self.name)

    def config(self) -> DistillConfig:
        """The recipe `tiny` in pools; a validation and a checkpoint every ten iterations."""
        # The calm run keeps all, for runs of other lengths to be compared with.
        keep = 3 if self.faults else self.num_iterations // SAVES_EVERY
        settings = [
            f"name={self.name}",
            f"output={self.disk}",
            f"iterations={self.num_iterations}",
            "topology.mode=pools",
            "batch={size: 4, micro_batches: 2}",
            "data.train=s3://clips/train",
            "data.validation=s3://clips/held_out",
            # A window is read for every second iteration, so that the server always matters.
            "data.shuffle={shards: 4, row_groups: 1}",
            "data.s3={checksums: when_required, read_timeout_s: 5}",
            f"validation={{every: {SAVES_EVERY}, num_captions: 4, teacher_steps: 2}}",
            f"checkpoint={{every: {SAVES_EVERY}, keep: {keep}, keep_best: 0}}",
            "alarms.stop=[]",
            "recovery.failures_per_hour=1000",
        ]
        if self.is_on_two_machines:
            # Their cluster comes by RAY_ADDRESS.
            for name in GROUPS:
                side = "right" if name in SECOND_MACHINE else "left"
                settings.append(f"topology.{name}.labels={{side: {side}}}")
        return load_recipe("tiny", [*settings, *self.settings])

    def book(self) -> list[dict[str, Any]]:
        """The lines that the storm has written: iterations reached, and faults."""
        path = _book_path(self.folder)
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _book_path(folder: str) -> Path:
    return Path(folder) / "storm.jsonl"


def order_faults(num_faults: int, seed: int) -> dict[int, str]:
    """Faults by iteration; each kind comes as often as any other, in a drawn order."""
    drawn = random.Random(seed)
    while True:
        order: list[str] = []
        while len(order) < num_faults:
            order += drawn.sample(KINDS, len(KINDS))
        if not any(_comes_too_soon(order, place) for place in range(len(order))):
            return {FIRST + EVERY * number: kind for number, kind in enumerate(order[:num_faults])}


def _comes_too_soon(order: Sequence[str], place: int) -> bool:
    kind, before = order[place], order[max(0, place - _APART) : place]
    if kind.endswith("torn") and FIRST + EVERY * place < 2 * SAVES_EVERY + EVERY:
        # There must be an older checkpoint to go back to.
        return True
    return kind in before or kind.replace("kill", "freeze") in before


def not_struck(run: StormyRun, num_iterations: int) -> list[str]:
    """Faults of the first iterations that have not struck, each with its iteration and why."""
    lines = run.book()
    struck = {line["iteration"] for line in lines if "kind" in line}
    causes = {line["iteration"]: line["missed"] for line in lines if "missed" in line}
    return [
        f"{causes.get(iteration, kind)} (iteration {iteration})"
        for iteration, kind in sorted(run.faults.items())
        if iteration < num_iterations and iteration not in struck
    ]


class Storm(RunObserver):
    """Strikes when the run reaches an iteration, once each; writes down what has happened when.

    Args:
        run: The run and its faults. Those of server, disk and machines are only written down, for
            the process outside that makes them.
        groups: Filled when the run has opened them.
    """

    def __init__(self, run: StormyRun, groups: list[Groups]) -> None:
        self._faults = run.faults
        self._book = _book_path(run.folder)
        self._groups = groups
        self._checkpoints = run.run_folder.checkpoints
        self._struck = {line["iteration"] for line in run.book() if "kind" in line}

    def iteration(self, record: IterationRecord) -> None:
        """Notes an iteration, and strikes if a fault is due."""
        self._write({"reached": record.iteration, "time": time.time()})
        kind = self._faults.get(record.iteration)
        if kind is None or record.iteration in self._struck:
            return
        self._struck.add(record.iteration)
        what, _, whom = kind.partition(" ")
        if what in ("kill", "freeze"):
            (group,) = [group for group in self._groups[-1].all if group.name == whom]
            number = signal.SIGKILL if what == "kill" else signal.SIGSTOP
            # In the middle of the next iteration, where there is work to lose.
            process = group.process_ids()[0]
            signalled = (record.iteration, kind, process, number)
            threading.Timer(_MID_ITERATION_S, self._signal, signalled).start()
            return
        if kind.endswith("torn"):
            self._tear()
        self._note(record.iteration, kind)
        if kind.startswith("driver"):
            os.kill(os.getpid(), signal.SIGKILL)

    def _signal(self, iteration: int, kind: str, process: int, number: int) -> None:
        """Strikes a process; the book says so only if there was one."""
        try:
            os.kill(process, number)
        except OSError as error:
            self._write({"iteration": iteration, "missed": f"{kind}: {error}"})
        else:
            self._note(iteration, kind)

    def _note(self, iteration: int, kind: str) -> None:
        self._write({"iteration": iteration, "kind": kind, "time": time.time()})

    def _tear(self) -> None:
        whole = sorted(self._checkpoints.glob("step-*/manifest.json"))
        if not whole:
            raise RuntimeError(f"there is no checkpoint in {self._checkpoints} yet to be torn")
        part = next(whole[-1].parent.glob("generator/*.safetensors"))
        with part.open("r+b") as file:
            file.truncate(part.stat().st_size // 2)

    def _write(self, line: dict[str, Any]) -> None:
        with self._book.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def make_run(run: StormyRun, *others: RunObserver) -> None:
    """Makes the run or goes on with it, under its storm; in a process of its own.

    Args:
        run: The run.
        others: Receive its events too.
    """
    opened: list[Groups] = []
    original = runs.open_groups

    @contextmanager
    def open_groups(*arguments: Any, **options: Any) -> Iterator[Groups]:  # noqa: ANN401
        with original(*arguments, **options) as groups:
            opened.append(groups)
            yield groups

    runs.open_groups = open_groups
    observer = Observers([Storm(run, opened), *others])
    runs.distill(run.config(), resume=run.run_folder.config.exists(), observer=observer)
