"""Rows of a row group, some at a time: memory that does not grow with the rows of a group.

    row group -> pages, through a small buffer -> a batch of rows -> our columns

A Parquet writer may put a million rows into one row group; whoever only looks at each row once has
no need to hold them. What is broken comes as a `Fault`, after which nothing more comes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from pipelines.data.shards.columns import ColumnNames, map_columns
from pipelines.data.shards.filesystem import S3Settings
from pipelines.data.shards.native import Group
from pipelines.data.shards.parquet import RangeFile, column_chunks, read_footers
from pipelines.data.shards.reading import Fault, Range, fetch, words_of

_BATCH_ROWS = 4096
_BATCH_BYTES = 16 * 2**20
_BUFFER_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a row group.

    Attributes:
        first: Number of the first of them in the group.
        table: Our columns.
    """

    first: int
    table: pa.Table


def read_batches(
    filesystem: AbstractFileSystem,
    root: str,
    group: Group,
    columns: Sequence[str],
    names: ColumnNames = ColumnNames(),
    s3: S3Settings = S3Settings(),
) -> Iterator[Rows | Fault]:
    """Reads some columns of a row group in batches of bounded size.

    Args:
        filesystem: The folder's file system.
        root: The folder's path in it.
        group: (relative path, size of the file in bytes, number of the row group).
        columns: Our names of the columns; see `pipelines.data.shards.columns`.
        names: Names of the set's columns.
        s3: See `fetch`.

    Raises:
        DataError: See `fetch`.
    """
    path, size, index = group
    (footer,) = read_footers(filesystem, [(f"{root}/{path}", size)], s3)
    if isinstance(footer, Fault):
        yield footer
        return
    found = map_columns(footer.schema, names, columns)
    if isinstance(found, Fault):
        yield found
        return
    if index >= footer.metadata.num_row_groups:
        yield Fault(f"no row group {index}: the file has {footer.metadata.num_row_groups}")
        return
    first = 0
    try:
        source = RangeFile(size, partial(_fetched, filesystem, f"{root}/{path}", s3))
        file = _parquet_file(source, footer.metadata)
        batches = file.iter_batches(
            _num_rows(footer.metadata, index, found.sources),
            row_groups=[index],
            columns=found.sources,
            use_threads=False,
        )
        for batch in batches:
            table = pa.Table.from_batches([batch], batch.schema)
            table = table.replace_schema_metadata(footer.schema.metadata)
            yield Rows(first, found.apply(table, path, footer.metadata, index, first))
            first += batch.num_rows
        # Arrow passes over pages of a kind that it does not know.
        promised = footer.metadata.row_group(index).num_rows
        if first != promised:
            yield Fault(f"corrupt row group ({first} rows; the footer promises {promised})")
    except _UnreadableError as error:
        yield error.fault
    except (OSError, ValueError, pa.ArrowException) as error:
        yield Fault(f"corrupt row group ({words_of(error)})")


def _parquet_file(source: RangeFile, metadata: pq.FileMetaData) -> pq.ParquetFile:
    """A file whose pages are checked, and read through a small buffer."""
    return pq.ParquetFile(
        source,
        metadata=metadata,
        page_checksum_verification=True,
        pre_buffer=False,
        buffer_size=_BUFFER_BYTES,
    )


def _num_rows(metadata: pq.FileMetaData, index: int, columns: Sequence[str]) -> int:
    """Rows of a batch: as many as take `_BATCH_BYTES` at most, by what the footer says."""
    chunks = column_chunks(metadata, index, columns)
    size = sum(chunk.total_uncompressed_size for chunk in chunks)
    per_row = max(1, size // max(1, metadata.row_group(index).num_rows))
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // per_row))


class _UnreadableError(Exception):
    """A range of the file that cannot be had."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault)
        self.fault = fault


def _fetched(
    filesystem: AbstractFileSystem, path: str, s3: S3Settings, start: int, stop: int
) -> bytes:
    """Bytes of a file, read with the patience of `fetch`."""
    (content,) = fetch(filesystem, [Range(path, start, stop)], s3)
    if isinstance(content, Fault):
        raise _UnreadableError(content)
    return content
