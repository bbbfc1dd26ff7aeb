"""Working copy of a folder at an address: a folder of this machine's disk with its small files.

    with working_copy("s3://bucket/runs/x") as folder:   logs, settings, samples, results
        ...                                              read and written like any folder
                                                         changed files are at the address now

Of a path, the folder itself is yielded. Checkpoints and model folders are never in a copy: whoever
makes one writes it to its place at the address (`pipelines.run.places.shared_place`), and whoever
wants one reads it there. While a run goes on, `pipelines.run.publisher` publishes the copy.
"""

import logging
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from cluster.errors import StorageError, StoreRefusedError
from cluster.files import write_whole
from cluster.folders import upload_file
from cluster.lease import LEASE_OBJECT
from cluster.s3.settings import S3Settings
from cluster.storage_errors import storage_errors
from cluster.stores import open_store, opened_store
from pipelines.config.recipe_files import RUN_RECIPE
from pipelines.run.log_parts import PARTS, LogParts, parts_in_order
from pipelines.run.places import is_path_inside, shared_place

EXPORTED_FOLDERS = frozenset({"generator", "best", "exports"})
BIG_FOLDERS = EXPORTED_FOLDERS | {"checkpoints"}
"""Folders of a run that are only at its address."""

PATIENCE = S3Settings(read_budget_s=20.0, read_timeout_s=10.0, max_attempts=3)
"""With requests about small files: a run would rather try again later than wait."""

_log = logging.getLogger(__name__)
_LOG = ".jsonl"
_AT_ONCE = 8
_TRIES = 3
_TAGS = ("ETag", "etag", "LastModified", "mtime", "created")

Stamp = tuple[Any, ...]


class WorkingCopy:
    """A local folder and the address that it stands for.

    Args:
        root: The local folder.
        address: The address.
        whole: The copy that this one is a part of; None: it is one of its own.
    """

    def __init__(self, root: Path, address: str, whole: "WorkingCopy | None" = None) -> None:
        self.root = root
        self.address = address
        self.keeps = False
        """Keeps the local folder when the copy is closed."""
        self._whole_root: Path = whole._whole_root if whole else root
        # By path: files whose content is at the address, where it came from, logs sent in parts.
        self._known: dict[Path, Stamp] = whole._known if whole else {}
        self._fetched: dict[Path, Stamp] = whole._fetched if whole else {}
        self._logs: dict[Path, LogParts] = whole._logs if whole else {}

    def part(self, root: Path) -> "WorkingCopy":
        """The copy of a folder inside of this one."""
        return self if root == self.root else WorkingCopy(root, shared_place(root), self)

    def fetch(self, without: Collection[str] = ()) -> None:
        """Brings the small files at the address here; those that are here already stay.

        Args:
            without: Folders that are not needed, besides `BIG_FOLDERS`.

        Raises:
            StorageError: The store cannot be read.
        """
        left_out = BIG_FOLDERS.union(without)
        for tries_left in reversed(range(_TRIES)):
            try:
                with storage_errors(f"reading {self.address}"):
                    self._fetch(left_out)
                return
            except StorageError as error:
                # A run that goes on there joins and renews its logs.
                if not tries_left or not isinstance(error.__cause__, FileNotFoundError):
                    raise

    def _fetch(self, left_out: frozenset[str]) -> None:
        files: Any
        files, root = open_store(self.address)
        listed = _listed(files, root, left_out)
        logs, there = _logs_among(listed)

        def fetch_one(name: str) -> None:
            stamp = (listed[name]["size"], *(listed[name].get(tag) for tag in _TAGS))
            if not self._has(name, stamp):
                self._take(name, files.cat_file(f"{root}/{name}"), stamp)

        def fetch_log(name: str) -> None:
            parts = logs[name]
            stamp = (parts[-1], listed[f"{name}{PARTS}/{parts[-1]}"]["size"])
            if not self._has(name, stamp):
                pieces = [files.cat_file(f"{root}/{name}{PARTS}/{part}") for part in parts]
                self._take(name, b"".join(pieces), stamp)
                self._log(self.root / name)

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(fetch_one, [name for name in there if name not in logs]))
            list(pool.map(fetch_log, logs))
        here = [path for path in self._fetched if path.is_relative_to(self.root)]
        for path in [path for path in here if self._name(path) not in {*there, *logs}]:
            path.unlink(missing_ok=True)
            del self._fetched[path]
            self._known.pop(path, None)

    def fetch_files(self, *paths: Path) -> None:
        """Brings single files here that another process has put at the address.

        Raises:
            StorageError: One is not there, or the store cannot be read.
        """
        for path in paths:
            place = shared_place(path)
            with opened_store(place, f"reading {place}", PATIENCE) as (files, name):
                write_whole(path, files.cat_file(name))
            self._known[path] = _stamp(path)

    def clear(self) -> None:
        """Deletes all that is at the address, and here what came from there.

        Raises:
            StorageError: The store refuses it.
        """
        with opened_store(self.address, f"deleting {self.address}") as (files, root):
            if files.isdir(root):
                files.rm(root, recursive=True)
        self.fetch()

    def discard(self, path: Path) -> None:
        """Deletes a file here and at the address, where it is there.

        Raises:
            StorageError: The store refuses it.
        """
        path.unlink(missing_ok=True)
        if path in self._known:
            place = shared_place(path)
            with opened_store(place, f"deleting {place}", PATIENCE) as (files, name):
                files.rm_file(name)
            self._known.pop(path, None)

    def changes(self, without: Collection[str] = ()) -> list[Path]:
        """Files whose content is not at the address.

        One that is gone here stays there: nothing of a run is deleted through its copy.

        Args:
            without: Folders that are not looked at.

        Raises:
            StoreRefusedError: The copy has been deleted, or its config.yaml.
        """
        self._require_here()
        left_out = BIG_FOLDERS.union(without)
        found: list[Path] = []
        for folder, folders, names in os.walk(self.root):
            folders[:] = [name for name in folders if name not in left_out and name[0] != "."]
            found += [Path(folder) / name for name in names if name[0] != "."]
        changed = []
        for path in sorted(found):
            with suppress(FileNotFoundError):
                if self._known.get(path) != _stamp(path):
                    changed.append(path)
        return changed

    def _require_here(self) -> None:
        gone, config = self._whole_root, self.root / RUN_RECIPE
        if gone.exists():
            gone = config if config in self._known and not config.exists() else None
        if gone is not None:
            raise StoreRefusedError(
                f"writing the files of {self.address}",
                f"{gone} is gone: another process has deleted it",
                "the working copy, as long as this process runs",
                f"What was published is whole at {self.address}; go on from there",
            )

    def publish(self, paths: Collection[Path] | None = None, *, in_parts: bool = False) -> None:
        """Brings files to the address.

        Args:
            paths: Which ones; None: `changes`.
            in_parts: Send what was added to logs alone; they are joined when they are sent whole.

        Raises:
            StorageError: The store does not take one; those before it are there.
        """
        for path in self.changes() if paths is None else paths:
            with storage_errors(f"writing {shared_place(path)}"):
                self._publish(path, in_parts=in_parts)

    def _publish(self, path: Path, *, in_parts: bool) -> None:
        files: Any
        files, name = patient_store(shared_place(path))
        log = self._log(path) if path.suffix == _LOG else None
        stamp, is_all = _stamp(path), True
        if log is None:
            upload_file(path, name, files)
        elif in_parts:
            is_all = log.send(path)
        else:
            log.join(path)
        if is_all:
            self._known[path] = stamp

    def join_logs(self) -> None:
        """Makes one object of each log that is at the address in parts.

        Raises:
            StorageError: As `publish`.
        """
        parted = (path for path, log in self._logs.items() if not log.is_joined)
        here = (path for path in parted if path.is_relative_to(self.root))
        self.publish(sorted(path for path in here if path.exists()))

    def _log(self, path: Path) -> LogParts:
        if path not in self._logs:
            self._logs[path] = LogParts(*patient_store(shared_place(path)))
        return self._logs[path]

    def _has(self, name: str, stamp: Stamp) -> bool:
        path = self.root / name
        return self._fetched.get(path) == stamp and path.exists()

    def _take(self, name: str, content: bytes, stamp: Stamp) -> None:
        path = self.root / name
        write_whole(path, content)
        self._fetched[path], self._known[path] = stamp, _stamp(path)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def _listed(files: Any, root: str, left_out: frozenset[str]) -> dict[str, Mapping[str, Any]]:  # noqa: ANN401
    """Facts of the objects below a folder, by relative path; without big folders and the lease.

    Keys are any text. One such as `x//etc/passwd`, which is not a path inside the folder, is left.
    """
    files.invalidate_cache()
    found: dict[str, Mapping[str, Any]] = {}
    strange: list[str] = []
    for path, facts in files.find(root, detail=True).items():
        name = str(path).removeprefix(f"{root}/")
        parts = PurePosixPath(name).parts
        if not is_path_inside(name):
            # Consoles mark a folder by an empty object with a slash at its end.
            strange += [name] if not name.endswith("/") or facts["size"] else []
            continue
        hidden = any(part.startswith(".") for part in parts)
        if not hidden and left_out.isdisjoint(parts[:-1]) and parts[-1] != LEASE_OBJECT:
            found[name] = facts
    if strange:
        _log.warning(
            "Left %d objects at %s that are not files inside of it, such as %r",
            len(strange),
            root,
            strange[0],
        )
    return found


def _logs_among(listed: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, list[str]], list[str]]:
    """Parts of each log that is in parts, in order; and the names of all whole objects."""
    sizes: dict[str, dict[str, int]] = {}
    whole: list[str] = []
    for name, facts in listed.items():
        folder, _, part = name.rpartition("/")
        if folder.endswith(PARTS):
            sizes.setdefault(folder.removesuffix(PARTS), {})[part] = facts["size"]
        else:
            whole.append(name)
    chains = {log: parts_in_order(parts) for log, parts in sizes.items()}
    return {log: parts for log, parts in chains.items() if parts}, whole


def _stamp(path: Path) -> Stamp:
    facts = path.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def patient_store(place: str) -> tuple[Any, str]:
    """File system of a place, whose requests are given up within `PATIENCE`, and the path in it."""
    return open_store(place, PATIENCE)
