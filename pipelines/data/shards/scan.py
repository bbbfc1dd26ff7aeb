"""One scan of a folder of shards: listed, and each footer read; whoever needs shards uses it.

    scan_folder: listing -> a thousand footers at a time -> ScannedShard
    open_shards: shards that are listed already       -> ScannedShard

A part without rows or without a byte, as Spark writes them, is not a fault: it is counted; no row
is missing. `_SUCCESS`, `.crc` and the like are not shards and are not listed.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from fsspec import AbstractFileSystem

from pipelines.data.shards.columns import ColumnNames
from pipelines.data.shards.filesystem import S3Settings
from pipelines.data.shards.index import Shard
from pipelines.data.shards.listing import list_chapters
from pipelines.data.shards.parquet import Footer, read_footers
from pipelines.data.shards.reading import Fault

NO_ROWS = "no rows"
"""Reason of a shard that lacks nothing: Spark writes a part without rows, or without a byte."""

_AT_ONCE = 1000  # shards whose footers are read side by side


@dataclass(frozen=True, slots=True)
class ScannedShard:
    """A shard whose end has been read.

    Attributes:
        shard: With its rows, where they could be read.
        footer: None where it has no byte, cannot be read, or was known and stayed closed.
        fault: Why it has no rows to offer; `NO_ROWS` where nothing is wrong; empty where it has.
    """

    shard: Shard
    footer: Footer | None
    fault: str = ""

    @property
    def is_empty(self) -> bool:
        """Tells whether it has no rows and nothing is wrong with it."""
        return self.fault == NO_ROWS

    @property
    def is_broken(self) -> bool:
        """Tells whether it cannot be opened."""
        return bool(self.fault) and not self.is_empty


@dataclass(frozen=True, slots=True)
class ShardSet:
    """The place of a set of shards.

    Attributes:
        filesystem: Where it is.
        root: Path of its folder there.
        only: Name of the only shard that belongs to it; empty where all of the folder do.
        names: Names of its columns; our own where it was made of a file of captions.
    """

    filesystem: AbstractFileSystem
    root: str
    only: str = ""
    names: ColumnNames = ColumnNames()


def open_shards(
    filesystem: AbstractFileSystem,
    root: str,
    shards: Sequence[Shard],
    s3: S3Settings = S3Settings(),
) -> list[ScannedShard]:
    """Reads the footers of some shards side by side.

    Raises:
        DataError: The server failed; what is broken in a file is its fault.
    """
    filled = [shard for shard in shards if shard.num_bytes]
    files = [(f"{root}/{shard.path}", shard.num_bytes) for shard in filled]
    read = read_footers(filesystem, files, s3) if files else []
    footers = dict(zip((shard.path for shard in filled), read, strict=True))
    return [_scanned(shard, footers.get(shard.path)) for shard in shards]


def scan_folder(
    filesystem: AbstractFileSystem,
    root: str,
    s3: S3Settings = S3Settings(),
    *,
    only: str = "",
    known: Iterable[Shard] = (),
) -> Iterator[ScannedShard]:
    """Lists a whole folder and opens every shard, in the order of their paths.

    Args:
        filesystem: The folder's file system.
        root: The folder's path in it.
        s3: Requests to an S3 server.
        only: Name of the only shard; see `ShardSet`.
        known: Shards whose rows the caller knows: those of the same path and size stay closed.

    Raises:
        DataError: The folder cannot be listed, or the server failed.
    """
    closed = {(shard.path, shard.num_bytes): shard for shard in known}
    for chapter in list_chapters(filesystem, root, _AT_ONCE, only=only, in_order=False):
        places = [(shard.path, shard.num_bytes) for shard in chapter]
        unknown = [
            shard for shard, place in zip(chapter, places, strict=True) if place not in closed
        ]
        opened = iter(open_shards(filesystem, root, unknown, s3))
        for place in places:
            yield _known(closed[place]) if place in closed else next(opened)


def _known(shard: Shard) -> ScannedShard:
    return ScannedShard(shard, None, "" if shard.num_rows else NO_ROWS)


def _scanned(shard: Shard, footer: Footer | Fault | None) -> ScannedShard:
    if footer is None:
        return ScannedShard(replace(shard, rows=()), None, NO_ROWS)
    if isinstance(footer, Fault):
        return ScannedShard(shard, None, footer.reason)
    opened = replace(shard, rows=footer.rows)
    return replace(_known(opened), footer=footer)
