"""Plan of `sgmd encode`: the row groups of a set, gathered into parts of the new set.

A part becomes one shard. Which row groups it has depends on the source alone, so a command that is
started again finds the same parts and makes those that are missing.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipelines.data.stream.catalogue import Catalogue
from pipelines.data.stream.plan import Cursor, RowGroup, Window


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

    @property
    def windows(self) -> list[Window]:
        """A window for each row group, its rows as they are stored."""
        return [
            Window(Cursor(), (RowGroup(self.shard, self.num_bytes, each.index, each.num_rows),))
            for each in self.groups
        ]


@dataclass(frozen=True, slots=True)
class PromptTask:
    """Texts to be embedded that are captions of no sample."""

    texts: tuple[str, ...]


def plan_parts(catalogue: Catalogue, max_rows: int) -> list[Part]:
    """Cuts a set into parts.

    Args:
        catalogue: Of the source, which is listed to its end.
        max_rows: Most rows of a part; a larger row group stands alone.

    Raises:
        DataError: the folder cannot be listed, holds no shard, or the server failed.
    """
    parts: list[Part] = []
    for number in range(catalogue.num_chapters()):
        shards = catalogue.chapter(number) or ()
        groups, rejects = catalogue.row_groups(shards)
        faults = {each.source: each.why for each in rejects if each.num_rows != 0}
        rows: dict[str, list[int]] = {shard.path: [] for shard in shards}
        for group in groups:
            # A row group without rows is left out, and keeps its number.
            gap = group.index - len(rows[group.shard])
            rows[group.shard] += [0] * gap + [group.num_rows]
        for shard in shards:
            place = (shard.path, shard.num_bytes)
            if shard.path in faults:
                parts.append(Part(len(parts), *place, (), faults[shard.path]))
            for gathered in _gathered(rows[shard.path], max_rows):
                parts.append(Part(len(parts), *place, gathered))
    return parts


def digest(parts: Sequence[Part]) -> str:
    """16 hexadecimal digits of a plan's parts and rows, equal for equal plans."""
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
