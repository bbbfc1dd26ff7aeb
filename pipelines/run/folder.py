"""Files of a run, in a folder or, where it lies at an address, in its working copy.

runs/NAME/  config.yaml  identity.json  metrics.jsonl  validation.jsonl  alarms.jsonl  events.jsonl
log.jsonl  ranking.json  summary.json  trace.json  ledger/  shards.jsonl  quarantine.parquet
wandb-id  samples/  teacher-clips/  checkpoints/step-000200/  generator/  best/  evaluation.json
report.html
"""

import json
import os
import secrets
import subprocess
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType
from typing import Any

from cluster.files import (
    open_store,
    opened_store,
    real_path,
    require_writable,
    store_address,
    write_whole,
)
from cluster.logs import ANY, Kind, append_line, every_line, flush_log, is_number, read_lines
from cluster.redaction import has_user, without_secrets
from cluster.storage import write_text
from cluster.storage_errors import storage_errors
from pipelines.config.recipe_files import RUN_RECIPE
from pipelines.run.places import local_of, require_written_out, shared_place
from pipelines.run.publisher import Publisher, publisher_of
from pipelines.run.working_copy import PATIENCE
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

TRACKED_PACKAGES = ("sgmd", "torch", "ray", "diffusers", "transformers", "pyarrow", "numpy")


def file_inside(root: Path, name: str | Path) -> Path | None:
    """Path of a regular file that lies in a folder, links resolved; None for any other.

    A run folder may come from elsewhere: `../` and links in it must not lead to other files.
    """
    try:
        path = (root / name).resolve()
        return path if path.is_relative_to(root.resolve()) and path.is_file() else None
    except (OSError, ValueError, RuntimeError):
        return None


REVISION_VARIABLE = "SGMD_GIT_REVISION"
"""Environment variable of submitted jobs: the revision of the tree that was uploaded."""

_JOB_FOLDER = "runtime_resources/working_dir_files/"
"""Part of the path in which Ray unpacks the working directory of a job."""


def require_inside(folder: Path, *names: str, option: str = "--output") -> None:
    """Checks that what a command writes into a folder stays in it.

    A run folder may come from elsewhere: a link in it must not lead the results to other files.

    Args:
        folder: The folder, where it is a path; of an address nothing is checked.
        names: What is written there.
        option: Names another place for it.

    Raises:
        ConfigError: A link leads out of the folder.
    """
    if store_address(folder):
        return
    root = real_path(folder)
    for name in names:
        found = real_path(folder / name)
        if not found.is_relative_to(root):
            raise ConfigError(
                f"writing to {folder / name}",
                f"a link that leads to {found}",
                f"a place inside {root}",
                f"Remove the link, or name another place with {option}",
            )


def require_lasting_folder(folder: str | Path, setting: str) -> None:
    """Checks that what is written to a folder outlasts this process.

    Args:
        folder: As it was given: a path or an address.
        setting: Setting or option that gave it.

    Raises:
        ConfigError: It lies in the package folder of a Ray job, is an address with a user or of a
            kind that is not known, or names a variable or a user's home.
    """
    attempted = f"writing to {without_secrets(str(folder))} ({setting})"
    require_written_out(folder, attempted)
    if address := store_address(folder):
        _require_address(address, attempted)
    elif _JOB_FOLDER in f"{Path(folder).absolute()}/":
        raise ConfigError(
            attempted,
            "a folder inside the package of this Ray job, which Ray deletes with the job",
            "an absolute path on a disk that outlasts the job, or an address",
            f"Submit again with {setting} there: s3://bucket/runs, or /mnt/runs on a shared disk",
        )


def _require_address(address: str, attempted: str) -> None:
    if has_user(address):
        raise ConfigError(
            attempted,
            "a user or a key in the address",
            "an address without",
            "Put keys into the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY",
        )
    try:
        open_store(address)
    except ConfigError as error:
        raise ConfigError(attempted, error.found, error.expected, error.remedy) from error


def require_on_disk(folder: str | Path, setting: str) -> None:
    """Checks that a folder is on a disk, as commands need it that write to no address yet.

    Raises:
        ConfigError: It is an address.
    """
    if store_address(folder):
        raise ConfigError(
            f"writing to {without_secrets(str(folder))} ({setting})",
            "an address of an object store",
            "a folder on a disk that every process of the command reaches",
            "Write to a disk, and copy it to the address afterwards",
        )


def require_output_folder(folder: str | Path, setting: str, *, is_file: bool = False) -> None:
    """Checks before a long job that its results can be written to a place and outlast it.

    Args:
        folder: A path or an address.
        setting: Setting or option that gave it.
        is_file: It is a file to write instead.

    Raises:
        ConfigError: As `require_lasting_folder` and `cluster.files.require_writable`.
        StorageError: An object store takes no object there.
    """
    require_lasting_folder(folder, setting)
    if not (address := store_address(folder)):
        require_writable(folder, setting, is_file=is_file)
        return
    if is_file:
        address = address.rpartition("/")[0]
    attempted = f"writing to {address} ({setting})"
    with opened_store(address, attempted, PATIENCE) as (files, path):
        probe = f"{path}/.probe-{secrets.token_hex(4)}"
        write_whole(probe, b"sgmd", files)
        files.rm_file(probe)


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


def versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers of a run."""
    found: dict[str, str] = {}
    for name in TRACKED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_revision(source: Path = Path(__file__).parent) -> str:
    """Revision of a source tree, marked `+changes` when it has any; empty outside of git.

    A submitted job has no `.git`; `sgmd submit` sends the revision along.

    Args:
        source: A folder of the tree; by default of this one.
    """
    if REVISION_VARIABLE in os.environ:
        return os.environ[REVISION_VARIABLE]
    try:
        revision = _git(source, "rev-parse", "HEAD")
        changes = _git(source, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{revision}+changes" if changes else revision


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)
    return result.stdout.strip()
