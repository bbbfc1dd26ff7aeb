"""Plan of `sgmd encode`: the row groups of a set, gathered into parts of the new set.

A part becomes one shard. Which row groups it has depends on the source alone, so a command that is
started again finds the same parts and makes those that are missing.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fsspec import AbstractFileSystem

from pipelines.data.shards.index import read_index
from pipelines.data.shards.scan import ScannedShard, scan_folder


@dataclass(frozen=True, slots=True)
class SourceGroup:
    """A row group to be encoded.

    Attributes:
        index: Its number in the shard.
        first_row: Number of its first row in the shard.
        num_rows: Rows.
    """

    index: int
    first_row: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class Part:
    """Row groups of one shard that become one shard of the new set.

    Attributes:
        number: Its place.
        shard: Path of the source shard.
        num_bytes: Size of the source shard.
        groups: Row groups; none where the shard cannot be opened.
        fault: Why not.
    """

    number: int
    shard: str
    num_bytes: int
    groups: tuple[SourceGroup, ...]
    fault: str = ""

    @property
    def name(self) -> str:
        """Name of the new shard, without its suffix."""
        return f"part-{self.number:05d}"

    @property
    def num_rows(self) -> int:
        """Rows of all its row groups."""
        return sum(group.num_rows for group in self.groups)


@dataclass(frozen=True, slots=True)
class PromptTask:
    """Texts to be embedded that are captions of no sample."""

    texts: tuple[str, ...]


def plan_parts(
    filesystem: AbstractFileSystem, root: str, max_rows: int, *, only: str = ""
) -> list[Part]:
    """Cuts a set into parts.

    Args:
        filesystem: File system of the source.
        root: Its path there.
        max_rows: Most rows of a part; a larger row group stands alone.
        only: Name of the only shard of the source; see `ShardSet`.

    Raises:
        DataError: the folder cannot be listed, or the server failed.
    """
    parts: list[Part] = []
    index = None if only else read_index(filesystem, root)
    scanned = (
        scan_folder(filesystem, root, only=only)
        if index is None
        else (ScannedShard(shard, None) for shard in index)
    )
    for each in scanned:
        shard = each.shard
        if each.is_broken:
            parts.append(Part(len(parts), shard.path, shard.num_bytes, (), each.fault))
        for groups in _gathered(shard.rows or (), max_rows):
            parts.append(Part(len(parts), shard.path, shard.num_bytes, groups))
    return parts


def digest(parts: Sequence[Part]) -> str:
    """Tells two plans apart."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _gathered(rows: Sequence[int], max_rows: int) -> Iterator[tuple[SourceGroup, ...]]:
    groups: list[SourceGroup] = []
    first_row = 0
    for index, num_rows in enumerate(rows):
        if groups and sum(group.num_rows for group in groups) + num_rows > max_rows:
            yield tuple(groups)
            groups = []
        if num_rows:
            groups.append(SourceGroup(index, first_row, num_rows))
        first_row += num_rows
    if groups:
        yield tuple(groups)
