"""Journal of a folder of shards, by which a command can be killed and started again.

    _prepare.json             with which settings; the same folder never holds two kinds of shards
    part-00000.parquet        a shard, written whole
    _progress/part-00000.json written after its shard: now the part counts
    quarantine.parquet        what was not taken, and why
    _index.json               written last: the set is whole; _progress goes away

A shard without its line in `_progress` is what a killed command left behind; it is written again
under the same name. So every clip is in the set exactly once, however often the command was killed.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, cast

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from cluster.lease import Lease, hold
from cluster.paths import require_writable
from pipelines.data.shards.filesystem import data_errors, open_folder
from pipelines.data.shards.index import (
    INDEX_NAME,
    PROGRESS_NAME,
    Shard,
    read_index,
    write_index,
)
from pipelines.data.shards.listing import QUARANTINE_NAME, is_shard
from pipelines.data.shards.opening import read_parquet
from pipelines.data.shards.rejection import Rejection, from_parquet, to_parquet, too_many_bad
from pipelines.data.shards.schema import SAMPLE_ID
from pipelines.data.shards.shard_writing import ShardBuilder, write_file, write_shard
from pipelines.dotted import dotted_items
from sgmd_core.errors import DataError

MIN_JUDGED = 200
"""Below this number of rows a share of bad ones says little: the verdict waits for the end."""

_log = logging.getLogger(__name__)


class Journal:
    """The state of a folder that a command fills part by part; made by `open_journal`.

    Args:
        filesystem: The folder's file system.
        root: Its path there.
        settings_path: File that says what its shards are made with.
        settings: Its content.

    Attributes:
        is_bound: That file says so; otherwise it is written with the first part.
        lease: Checked before each part.
        shards: Everything written and counted, by name.
        rejections: Everything that was not taken.
        parts: Names of the parts that count, also of those in which no clip was good.
        is_complete: Whether the folder has an index, so that a command came to its end here.
    """

    def __init__(
        self,
        filesystem: AbstractFileSystem,
        root: str,
        settings_path: str,
        settings: Mapping[str, Any],
    ) -> None:
        self.filesystem = filesystem
        self.root = root
        self.is_bound = False
        self.lease = Lease()
        self._settings_path = settings_path
        self._settings = settings
        index = read_index(filesystem, root)
        self.is_complete = index is not None
        self.shards = {shard.path: shard for shard in index or ()}
        self.parts = {_part_of(path) for path in self.shards}
        self.rejections: list[Rejection] = []
        if self.is_complete:
            self.rejections = _read_quarantine(filesystem, root)
        self._load_progress()

    def commit(
        self,
        part: str,
        builders: ShardBuilder | Mapping[str, ShardBuilder],
        rejections: Sequence[Rejection],
    ) -> None:
        """Writes a part's shards and then the line that makes them count.

        Args:
            part: Name of the part, and of its shards without their suffix.
            builders: Its good clips, of which there may be none; by folder, where a part becomes a
                shard in each of several.
            rejections: Its bad ones.
        """
        self._bind()
        by_folder = {"": builders} if isinstance(builders, ShardBuilder) else builders
        shards: list[Shard] = []
        for folder, builder in by_folder.items():
            if builder.num_rows:
                name = f"{folder}/{part}.parquet".lstrip("/")
                shards.append(write_shard(self.filesystem, self.root, name, builder))
        self.shards |= {shard.path: shard for shard in shards}
        self.parts.add(part)
        self.rejections.extend(rejections)
        self._write_progress(part, shards, rejections)

    def forget_rejections(self) -> None:
        """Makes the clips that were not taken so far count as never seen."""
        for name, entry in self._progress_entries().items():
            self._write_progress(name, _shards_in(entry), ())
        self.rejections = []

    def forget_everything(self) -> None:
        """Makes a folder without shards as good as empty."""
        assert not self.shards, "shards belong to the settings that made them"
        self.rejections, self.is_complete = [], False
        self.parts.clear()
        self._delete(PROGRESS_NAME, INDEX_NAME, QUARANTINE_NAME)

    def sample_ids(self) -> Iterator[list[str]]:
        """The ids in all shards that count, shard by shard.

        Raises:
            DataError: a shard cannot be read.
        """
        for path in sorted(self.shards):
            with (
                data_errors(f"reading the ids in {self.root}/{path}"),
                self.filesystem.open(f"{self.root}/{path}", "rb") as file,
            ):
                table = read_parquet(file, columns=[SAMPLE_ID])
            yield table[SAMPLE_ID].to_pylist()

    def write_quarantine(self) -> None:
        """Writes what was not taken; an empty file says that nothing was."""
        write_file(self.filesystem, f"{self.root}/{QUARANTINE_NAME}", to_parquet(self.rejections))

    @property
    def num_good(self) -> int:
        """Rows that are written."""
        return sum(shard.num_rows for shard in self.shards.values())

    @property
    def num_judged(self) -> int:
        """Rows that are written or not taken."""
        return self.num_good + len(self.rejections)

    def require_few_bad(self, attempted: str, max_bad_fraction: float, remedy: str) -> None:
        """Stops where too large a share of all rows is bad; the quarantine then has all of them.

        Args:
            attempted: What the command is doing.
            max_bad_fraction: The largest share that is accepted.
            remedy: What the user can do.

        Raises:
            DataError: See `too_many_bad`.
        """
        bad, total = self.rejections, self.num_judged
        if len(bad) > max_bad_fraction * total:
            self.write_quarantine()
            remedy = f"All of them are in {self.root}/{QUARANTINE_NAME}. {remedy}"
            raise too_many_bad(attempted, bad, total, max_bad_fraction, remedy)

    def finish(self) -> None:
        """Writes the quarantine and the index, and takes the progress away."""
        self._bind()
        self.write_quarantine()
        write_index(self.filesystem, self.root, list(self.shards.values()))
        self.is_complete = True
        self._delete(PROGRESS_NAME)

    def _bind(self) -> None:
        """Says what the shards are made with, before the first of them is there.

        Raises:
            LeaseLostError: Another process fills the folder by now.
        """
        self.lease.check()
        if not self.is_bound:
            content = json.dumps(self._settings, indent=2).encode()
            write_file(self.filesystem, self._settings_path, content)
            self.is_bound = True

    def _delete(self, *names: str) -> None:
        for name in names:
            path = f"{self.root}/{name}"
            with data_errors(f"deleting {path}"):
                self.filesystem.invalidate_cache()
                if self.filesystem.exists(path):
                    self.filesystem.rm(path, recursive=True)

    def _write_progress(
        self, part: str, shards: Sequence[Shard], rejections: Sequence[Rejection]
    ) -> None:
        first, *further = [asdict(shard) for shard in shards] or [None]
        entry = {
            "shard": first,
            **({"further": further} if further else {}),
            "rejections": [asdict(rejection) for rejection in rejections],
        }
        path = f"{self.root}/{PROGRESS_NAME}/{part}.json"
        write_file(self.filesystem, path, json.dumps(entry).encode())

    def _load_progress(self) -> None:
        known = set(self.rejections)
        for name, entry in self._progress_entries().items():
            self.parts.add(name)
            self.shards |= {shard.path: shard for shard in _shards_in(entry)}
            found = [Rejection(**rejection) for rejection in entry["rejections"]]
            # A command killed between writing the index and deleting the progress left both.
            self.rejections += [rejection for rejection in found if rejection not in known]

    def _progress_entries(self) -> dict[str, Any]:
        folder = f"{self.root}/{PROGRESS_NAME}"
        with data_errors(f"reading {folder}"):
            names = _names_in(self.filesystem, folder)
            found = {
                _part_of(name): _entry(self.filesystem.cat_file(f"{folder}/{name}"))
                for name in sorted(names)
                if name.endswith(".json")
            }
            for part in [part for part, entry in found.items() if entry is None]:
                self._take_back(part)
            return {part: entry for part, entry in found.items() if entry is not None}

    def _take_back(self, part: str) -> None:
        """Deletes a part whose entry is broken: what is in it is then made again."""
        place = f"{self.root}/{PROGRESS_NAME}/{part}.json"
        _log.warning("%s is broken: the clips of %s are made again", place, part)
        # The shard first: without it the entry still says that the part is not whole.
        for path in (f"{self.root}/{part}.parquet", place):
            if self.filesystem.exists(path):
                self.filesystem.rm_file(path)


@contextmanager
def filling(url: str, command: str, settings: Mapping[str, Any]) -> Iterator[Journal]:
    """Holds the lease on a folder while it is filled, and opens its journal.

    Args:
        url: Local path or `s3://bucket/prefix`.
        command: See `open_journal`.
        settings: See `open_journal`.

    Raises:
        DataError: See `open_journal`.
        ConfigError: A local folder cannot be written to.
        LeaseError: Another process fills the folder.
    """
    filesystem, root = open_folder(url, probe=False)
    _require_writable(filesystem, root)
    with hold(url, f"sgmd {command}", filesystem) as lease:
        # Opened under the lease: another process may have filled the folder until now.
        journal = open_journal(url, command, settings)
        journal.lease = lease
        yield journal


def open_journal(url: str, command: str, settings: Mapping[str, Any]) -> Journal:
    """Opens a folder to be filled, or to be filled further; writes nothing yet.

    A folder that holds no shard is not bound to the settings of an earlier run.

    Args:
        url: Local path or `s3://bucket/prefix`.
        command: Who fills it.
        settings: Everything that decides the content of its shards, as JSON can hold it.

    Raises:
        DataError: the folder holds other data, or was filled with other settings.
        ConfigError: a local folder cannot be written to.
    """
    filesystem, root = open_folder(url)
    _require_writable(filesystem, root)
    attempted = f"filling {url} with `sgmd {command}`"
    with data_errors(attempted):
        names = _names_in(filesystem, root)
    own = f"{root}/_{command}.json"
    wanted = json.loads(json.dumps(settings))
    if f"_{command}.json" not in names:
        if any(is_shard(name) or name == QUARANTINE_NAME for name in names):
            raise DataError(
                attempted,
                f"Parquet files that `sgmd {command}` did not write",
                "an empty folder",
                "Choose another folder, or delete this one",
            )
        return Journal(filesystem, root, own, wanted)
    with data_errors(attempted):
        text = filesystem.cat_file(own)
    try:
        found = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise DataError(
            attempted,
            f"{own} is broken ({error}): it is not known how its shards were made",
            "the settings of an earlier run",
            "Choose another folder, or delete this one",
        ) from error
    journal = Journal(filesystem, root, own, wanted)
    if found == wanted:
        journal.is_bound = True
        gone = [path for path in sorted(journal.shards) if "/" not in path and path not in names]
        if gone:
            raise DataError(
                attempted,
                f"{len(gone)} of {len(journal.shards)} shards are gone: {', '.join(gone[:3])}",
                "every shard that earlier runs have written",
                "Restore them, or delete the folder and make the set again",
            )
    elif journal.shards:
        raise _other_settings(attempted, found, wanted)
    else:
        journal.forget_everything()
    return journal


def _other_settings(
    attempted: str, found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> DataError:
    """Names each setting that differs, with both of its values."""
    before, now = dict(dotted_items(found)), dict(dotted_items(wanted))
    unknown = "(not recorded)"
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    old = ", ".join(f"{name} = {before.get(name, unknown)!r}" for name in names)
    new = ", ".join(f"{name} = {now.get(name, unknown)!r}" for name in names)
    return DataError(
        attempted,
        f"shards made with {old}; this run has {new}",
        "the same settings in all runs that fill one folder",
        "Repeat the settings of the first run, choose another folder, or delete this one",
    )


def _require_writable(filesystem: AbstractFileSystem, root: str) -> None:
    if isinstance(filesystem, LocalFileSystem):
        require_writable(root, "DST")


def _names_in(filesystem: AbstractFileSystem, folder: str) -> list[str]:
    """Names of files and folders; none for a folder that is not there."""
    filesystem.invalidate_cache()
    try:
        return [str(path).rpartition("/")[2] for path in filesystem.ls(folder, detail=False)]
    except FileNotFoundError:
        return []


def _read_quarantine(filesystem: AbstractFileSystem, root: str) -> list[Rejection]:
    path = f"{root}/{QUARANTINE_NAME}"
    try:
        with data_errors(f"reading {path}"):
            return [each for each, _ in from_parquet(cast("bytes", filesystem.cat_file(path)))]
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return []
        raise


def _shards_in(entry: Mapping[str, Any]) -> list[Shard]:
    found = [entry["shard"], *entry.get("further", ())]
    return [
        Shard(shard["path"], shard["num_bytes"], tuple(shard["rows"]))
        for shard in found
        if shard is not None
    ]


def _entry(data: str | bytes) -> dict[str, Any] | None:
    """Returns the content of a part's entry; None where it is broken."""
    try:
        entry = json.loads(data)
        _shards_in(entry)
        [Rejection(**rejection) for rejection in entry["rejections"]]
    except (ValueError, KeyError, TypeError):
        return None
    return entry


def _part_of(file_name: str) -> str:
    return file_name.rpartition(".")[0]
