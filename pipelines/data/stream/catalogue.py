"""Catalogue of a run's folder: chapters as far as listed, row groups as far as opened.

The first look at anything is written down (`shards.jsonl` of the run) and stays true for the run: a
folder that grows, shrinks or loses a shard meanwhile does not shift the order of what is to come.

    {"shards": [["part-0.parquet", 9120, [128, 128]], ...], "last": true}      one chapter
    {"rows": {"part-7.parquet": [128, 128]}, "faults": {"part-8.parquet": "no readable footer"}}
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from fsspec import AbstractFileSystem

from pipelines.data.making.caption_file import no_shards
from pipelines.data.shards.columns import (
    SETTLING_SHARDS,
    ColumnNames,
    column_error,
    require_named,
    settle_names,
)
from pipelines.data.shards.filesystem import S3Settings
from pipelines.data.shards.index import Shard, read_index
from pipelines.data.shards.listing import list_chapters
from pipelines.data.shards.reading import Fault
from pipelines.data.shards.rejection import Rejection, split_reason
from pipelines.data.shards.scan import NO_ROWS, ScannedShard, open_shards
from pipelines.data.stream.plan import RowGroup

Chapter = tuple[Shard, ...]


class Catalogue:
    """The shards of one folder, looked up when they are needed.

    Args:
        filesystem: The folder's file system.
        root: The folder's path in it.
        chapter_shards: Shards of a chapter.
        s3: Requests to an S3 server.
        recorded: Lines that earlier `take_notes` returned, when a run goes on.
        only: Name of the only shard; see `ShardSet`.
        in_order: The server is trusted to list in order; see `list_chapters`.
    """

    def __init__(
        self,
        filesystem: AbstractFileSystem,
        root: str,
        chapter_shards: int,
        s3: S3Settings = S3Settings(),
        recorded: Iterable[Mapping[str, Any]] = (),
        only: str = "",
        *,
        in_order: bool = True,
    ) -> None:
        self._filesystem = filesystem
        self._root = root
        self._chapter_shards = chapter_shards
        self._s3 = s3
        self._only = only
        self._in_order = in_order
        self._chapters: list[Chapter] = []
        self._rows: dict[str, tuple[int, ...]] = {}
        self._faults: dict[str, str] = {}
        self._complete = False
        self._notes: list[dict[str, Any]] = []
        self._listing: Iterator[Chapter] | None = None
        self._opened: dict[str, ScannedShard] = {}
        for line in recorded:
            self._recall(line)

    def chapter(self, number: int) -> Chapter | None:
        """A chapter's shards as listed; None after the last one.

        Raises:
            DataError: The folder cannot be listed or holds no shard.
        """
        while number >= len(self._chapters) and not self._complete:
            self._list_another()
        return self._chapters[number] if number < len(self._chapters) else None

    def settle_names(self, names: ColumnNames) -> ColumnNames:
        """Names of the set's columns, by its first shards.

        Args:
            names: Names that the caller gives.

        Raises:
            DataError: Two columns compete, or a named one is missing; the folder has no shard, or
                the server failed.
        """
        filled = [shard for shard in self.chapter(0) or () if shard.num_bytes][:SETTLING_SHARDS]
        opened = open_shards(self._filesystem, self._root, filled, self._s3)
        self._opened = {each.shard.path: each for each in opened}
        schemas = [*self.first_schemas.values()]
        url = self._filesystem.unstrip_protocol(self._root)
        require_named(url, schemas, names)
        settled = settle_names(schemas, names)
        if isinstance(settled, Fault):
            raise column_error(url, "its first shards", settled, names)
        return settled

    @property
    def first_schemas(self) -> dict[str, pa.Schema]:
        """Schemas of the shards that `settle_names` has opened, by their paths.

        They are forgotten once the row groups of their shards are asked for.
        """
        opened = self._opened.items()
        return {path: each.footer.schema for path, each in opened if each.footer is not None}

    def num_chapters(self) -> int:
        """Counts the chapters; lists to the end."""
        while not self._complete:
            self._list_another()
        return len(self._chapters)

    def row_groups(self, shards: Sequence[Shard]) -> tuple[list[RowGroup], list[Rejection]]:
        """The row groups of some shards, in order, and the shards that have none to offer.

        Raises:
            DataError: The server failed; broken shards are rejected instead.
        """
        self._open([shard for shard in shards if shard.path not in self._rows])
        rejects = [
            Rejection(
                "",
                shard.path,
                None,
                *split_reason(self._faults[shard.path]),
                num_rows=0 if self._faults[shard.path] == NO_ROWS else None,
            )
            for shard in shards
            if shard.path in self._faults
        ]
        groups = [
            RowGroup(shard.path, shard.num_bytes, index, num_rows)
            for shard in shards
            for index, num_rows in enumerate(self._rows[shard.path])
            if num_rows
        ]
        return groups, rejects

    @property
    def rows_per_shard(self) -> float:
        """Mean rows of the shards opened so far; at least 1."""
        sizes = [sum(rows) for path, rows in self._rows.items() if path not in self._faults]
        return max(1.0, sum(sizes) / len(sizes)) if sizes else 1.0

    @property
    def num_shards(self) -> int:
        """Shards listed so far."""
        return sum(len(chapter) for chapter in self._chapters)

    @property
    def is_complete(self) -> bool:
        """True if the folder has been listed to its end."""
        return self._complete

    @property
    def num_rows(self) -> int | None:
        """Rows of the whole folder; None as long as a shard has not been listed and opened."""
        if not self._complete or len(self._rows) < self.num_shards:
            return None
        return sum(map(sum, self._rows.values()))

    @property
    def expected_rows(self) -> float:
        """Rows of what is listed so far; shards that are not opened yet count as the mean."""
        known = sum(map(sum, self._rows.values()))
        unopened = self.num_shards - len(self._rows) + len(self._faults)
        return known + unopened * self.rows_per_shard

    def take_notes(self) -> list[dict[str, Any]]:
        """Returns what was learnt since the last call, as lines for the run's `shards.jsonl`."""
        notes, self._notes = self._notes, []
        return notes

    def _list_another(self) -> None:
        if self._listing is None:
            self._listing = self._begin()
        chapter = next(self._listing, ())
        if not chapter and not self._chapters:
            url = self._filesystem.unstrip_protocol(self._root)
            raise no_shards(f"listing the shards of {url}", self._filesystem, self._root)
        lines = [[shard.path, shard.num_bytes, shard.rows] for shard in chapter]
        self._learn({"shards": lines, "last": len(chapter) < self._chapter_shards})

    def _begin(self) -> Iterator[Chapter]:
        size = self._chapter_shards
        place = (self._filesystem, self._root, size)
        how: dict[str, Any] = {"only": self._only, "in_order": self._in_order}
        if self._chapters:
            return list_chapters(*place, self._chapters[-1][-1].path, **how)
        indexed = None if self._only else read_index(self._filesystem, self._root, self._s3)
        if indexed is None:
            return list_chapters(*place, **how)
        return iter([indexed[at : at + size] for at in range(0, len(indexed), size)])

    def _open(self, shards: Sequence[Shard]) -> None:
        if not shards:
            return
        rows: dict[str, list[int]] = {}
        faults: dict[str, str] = {}
        closed = [shard for shard in shards if shard.path not in self._opened]
        rest = iter(open_shards(self._filesystem, self._root, closed, self._s3))
        for shard in shards:
            # The first ones have been opened to settle the names.
            scanned = self._opened.pop(shard.path, None) or next(rest)
            if scanned.fault:
                faults[shard.path] = scanned.fault
            else:
                rows[shard.path] = list(scanned.shard.rows or ())
        self._learn({"rows": rows, "faults": faults})

    def _learn(self, line: dict[str, Any]) -> None:
        self._notes.append(line)
        self._recall(line)

    def _recall(self, line: Mapping[str, Any]) -> None:
        if "shards" in line:
            chapter = tuple(Shard(path, size) for path, size, _ in line["shards"])
            if chapter:
                self._chapters.append(chapter)
            known = {path: tuple(rows) for path, _, rows in line["shards"] if rows is not None}
            self._rows.update(known)
            self._faults.update({path: NO_ROWS for path, rows in known.items() if not sum(rows)})
            self._complete = line.get("last", False)
            return
        faults = line.get("faults", {})
        self._rows.update({path: tuple(rows) for path, rows in line.get("rows", {}).items()})
        self._faults.update(faults)
        # A shard that could not be opened stays out for the whole run.
        self._rows.update(dict.fromkeys(faults, ()))
