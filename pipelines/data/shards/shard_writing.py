"""Shards that exist whole or not at all, in row groups that a reader can hold."""

import io
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from cluster.files import write_whole
from pipelines.data.shards.filesystem import data_errors
from pipelines.data.shards.index import Shard
from pipelines.data.shards.schema import parquet_options

ROW_GROUP_CLIPS = 32
ROW_GROUP_BYTES = 64 * 2**20


class ShardBuilder:
    """Gathers the rows of one shard in memory.

    A row group is closed after `ROW_GROUP_CLIPS` rows or `ROW_GROUP_BYTES`: it is what a reader
    loads at once.

    Args:
        schema: One of those in `schema.py`.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._buffer = io.BytesIO()
        self._writer = pq.ParquetWriter(self._buffer, schema, **parquet_options(schema))
        self._waiting: list[Mapping[str, Any]] = []
        self._waiting_bytes = 0
        self._groups: list[int] = []

    @property
    def num_rows(self) -> int:
        """Rows so far."""
        return sum(self._groups) + len(self._waiting)

    @property
    def num_bytes(self) -> int:
        """About the size that the file would have now."""
        return self._buffer.tell() + self._waiting_bytes

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds one row."""
        self._waiting.append(row)
        self._waiting_bytes += sum(
            len(value) for value in row.values() if isinstance(value, bytes | str)
        )
        if len(self._waiting) == ROW_GROUP_CLIPS or self._waiting_bytes >= ROW_GROUP_BYTES:
            self._close_group()

    def finish(self) -> tuple[bytes, tuple[int, ...]]:
        """The file, and the rows of each of its row groups; the builder is used up."""
        if self._waiting:
            self._close_group()
        self._writer.close()
        return self._buffer.getvalue(), tuple(self._groups)

    def _close_group(self) -> None:
        table = pa.Table.from_pylist(list(self._waiting), schema=self._schema)
        self._writer.write_table(table, row_group_size=len(self._waiting))
        self._groups.append(len(self._waiting))
        self._waiting, self._waiting_bytes = [], 0


def write_file(filesystem: AbstractFileSystem, path: str, data: bytes) -> None:
    """Writes a file so that a reader sees all of it or none; an older one is replaced.

    Raises:
        DataError: the store refuses it.
    """
    with data_errors(f"writing {filesystem.unstrip_protocol(path)}"):
        write_whole(path, data, filesystem)


def write_shard(
    filesystem: AbstractFileSystem, root: str, name: str, builder: ShardBuilder
) -> Shard:
    """Writes what a builder has gathered; returns its entry in the index.

    Raises:
        DataError: the store refuses it.
    """
    data, rows = builder.finish()
    write_file(filesystem, f"{root}/{name}", data)
    return Shard(name, len(data), rows)
