"""Files of a run, in a folder or, where it lies at an address, in its working copy.

runs/NAME/  config.yaml  identity.json  metrics.jsonl  validation.jsonl  alarms.jsonl  events.jsonl
log.jsonl  ranking.json  summary.json  trace.json  ledger/  shards.jsonl  quarantine.parquet
wandb-id  samples/  teacher-clips/  checkpoints/step-000200/  generator/  best/  evaluation.json
report.html
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from cluster.logs import ANY, Kind, append_line, every_line, flush_log, is_number, read_lines
from cluster.storage import write_text
from cluster.storage_errors import storage_errors
from pipelines.config.recipe_files import RUN_RECIPE
from pipelines.run.places import local_of, shared_place
from pipelines.run.publisher import Publisher, publisher_of
from sgmd_core.errors import CheckpointError, ConfigError

_NUMBERS: Mapping[str, Kind] = {ANY: is_number}
_FIELDS: Mapping[str, Mapping[str, Kind]] = {
    "metrics.jsonl": {
        "iteration": int,
        "seconds": {"total": is_number, ANY: is_number},
        "losses": _NUMBERS,
        "data_wait_s": is_number,
        "samples_seen": int,
        "grad_norms?": _NUMBERS,
        "lag?": _NUMBERS,
        "stale_calls?": int,
    },
    "validation.jsonl": {
        "iteration": int,
        "figures": _NUMBERS,
        "intervals?": {ANY: [is_number, is_number]},
        "influences?": {ANY: [is_number]},
    },
    "alarms.jsonl": {"iteration": int},
    "events.jsonl": {"time": str, "kind": str, "cause": str},
    "log.jsonl": {"time": str, "level": str, "message": str},
    "shards.jsonl": {
        "shards?": [[str, int, (NoneType, [int])]],
        "last?": bool,
        "rows?": {ANY: [int]},
        "faults?": {ANY: str},
    },
}
"""Fields of every line of a log; a line without one of them is broken."""

_COUNTED = "shards.jsonl"
TEACHER_CLIPS = "teacher-clips"
"""Folder of the teacher's measured clips, in a run or in a sweep."""


class RunFolder:
    """The files of one run: paths in its folder, or in the working copy of an address.

    `places.shared_place` says where one of them lies for other processes: checkpoints, generators
    and samples are written there. `str()` of it is the place of the run, as users name it.

    Args:
        root: Path of the run, or an address that this process has a working copy of.

    Raises:
        ConfigError: There is no working copy.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = local_of(root)
        self.config = self.root / RUN_RECIPE
        self.identity = self.root / "identity.json"
        self.metrics = self.root / "metrics.jsonl"
        self.validation = self.root / "validation.jsonl"
        self.alarms = self.root / "alarms.jsonl"
        self.events = self.root / "events.jsonl"
        self.log = self.root / "log.jsonl"
        self.stacks = self.root / "stacks"
        self.ranking = self.root / "ranking.json"
        self.summary = self.root / "summary.json"
        self.trace = self.root / "trace.json"
        self.ledger = self.root / "ledger"
        self.quarantine = self.root / "quarantine.parquet"
        self.shards = self.root / "shards.jsonl"
        self.sets = self.root / "sets"
        self.samples = self.root / "samples"
        self.teacher_clips = self.root / TEACHER_CLIPS
        self.checkpoints = self.root / "checkpoints"
        self.generator = self.root / "generator"
        self.best = self.root / "best"

    def __str__(self) -> str:
        return shared_place(self.root)

    def of_set(self, number: int) -> "RunFolder":
        """Place of the books of a set of captions: the run's own for the first, 0."""
        return RunFolder(self.sets / str(number)) if number else self

    def make(self) -> None:
        """Makes the folder of a set, where it is not there yet."""
        with storage_errors(f"making {self}"):
            self.root.mkdir(parents=True, exist_ok=True)

    @property
    def _sets_of_captions(self) -> list["RunFolder"]:
        return [self, *(RunFolder(path) for path in sorted(self.sets.glob("*")))]

    @property
    def publisher(self) -> Publisher:
        """The publisher of the run; that of a run on a disk does nothing."""
        return publisher_of(self.root)

    def create(self, config_yaml: str) -> None:
        """Makes a new run's folder and writes its resolved configuration.

        Raises:
            ConfigError: A run of this name exists already; nothing is overwritten.
        """
        self.require_free()
        self.samples.mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        # Empty says that none was raised; no file, that none was looked out for.
        self.alarms.touch()
        write_text(str(self.config), config_yaml)

    def require_free(self) -> None:
        """Checks that no run of this name exists.

        Raises:
            ConfigError: There is one; nothing is overwritten.
        """
        if self.config.exists():
            raise ConfigError(
                f"starting a new run in {self}",
                "a run of that name is already there",
                "a name that is free",
                "Choose another one with name=..., go on with --resume "
                f"{self}, or delete the folder",
            )

    def require(
        self,
        attempted: str = "resuming",
        remedy: str = "Check the path; without --resume a new run is started",
    ) -> None:
        """Checks that there is a run.

        Raises:
            CheckpointError: There is no run here.
        """
        if not self.config.exists():
            raise CheckpointError(
                f"{attempted} {self}",
                "no config.yaml there" + ("" if self.root.is_dir() else ", and no such folder"),
                "the folder of an earlier run",
                remedy,
            )

    def rewind(self, iteration: int, on_broken: Callable[[str], None] | None = None) -> None:
        """Drops what was logged for iterations that a resumed run will make again.

        Events are history and stay.

        Args:
            iteration: The first of them.
            on_broken: Called with one sentence of each log in which lines were broken.
        """
        # Metrics name the updates made before them, the others the updates they have seen.
        for path, first_dropped in (
            (self.metrics, iteration),
            (self.validation, iteration + 1),
            (self.alarms, iteration + 1),
        ):
            lines = read_jsonl(path, on_broken)
            kept = [line for line in lines if line["iteration"] < first_dropped]
            if path.exists():
                write_text(str(path), "".join(json.dumps(line) + "\n" for line in kept))
        for one in self._sets_of_captions:
            one._end_shards_whole(on_broken)

    def _end_shards_whole(self, on_broken: Callable[[str], None] | None) -> None:
        """Drops what a power loss has broken at the end of shards.jsonl.

        Among lines that follow it, it would leave none of them their places.
        """
        if not self.shards.exists():
            return
        lines = (json.dumps(line, ensure_ascii=False) for line in read_jsonl(self.shards))
        whole = "".join(f"{line}\n" for line in lines)
        num_broken = self.shards.stat().st_size - len(whole.encode())
        if num_broken:
            write_text(str(self.shards), whole)
            if on_broken is not None:
                on_broken(f"{self.shards}: {num_broken} broken bytes at its end left out")

    def flush(self) -> None:
        """Flushes the logs to the disk, before a checkpoint that they lead to is committed.

        Those of a run at an address are then there, with all other files.

        Raises:
            StorageError: The disk or the store does not take them.
            LeaseLostError: Another process has taken the run at the address over.
        """
        for path in (self.metrics, self.validation, self.alarms, self.events):
            flush_log(path)
        for one in self._sets_of_captions:
            for path in (one.shards, *one.ledger.glob("*.jsonl")):
                flush_log(path)
        self.publisher.flush()


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Adds one line to a log of a run."""
    append_line(path, record)


def read_jsonl(path: Path, on_broken: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """All whole lines of a log of a run.

    Args:
        path: The log.
        on_broken: Called with one sentence where lines were left out; None: a warning is logged.

    Raises:
        CheckpointError: A line of shards.jsonl is broken, whose lines are counted by their places.
    """
    fields = _FIELDS.get(path.name, {})
    if path.name == _COUNTED:
        return every_line(path, fields)
    return read_lines(path, fields, on_broken) if on_broken else read_lines(path, fields)
