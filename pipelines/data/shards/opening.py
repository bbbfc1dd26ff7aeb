"""Parquet files that are opened and read by the thread that asks."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def open_parquet(
    source: Any,  # noqa: ANN401 - fsspec's files have no common type
    **options: Any,  # noqa: ANN401 - handed on
) -> pq.ParquetFile:
    """A Parquet file that is read by the thread that asks, if that also says `use_threads=False`.

    Reading ahead, Arrow's default, is done by a thread of its own that closes the file a moment
    after the reader has its rows. Where the file is Python's and the process ends in that moment,
    it ends with SIGABRT (apache/arrow#34314).

    Args:
        source: The file.
        options: Of `pyarrow.parquet.ParquetFile`.
    """
    return pq.ParquetFile(source, pre_buffer=False, **options)


def read_parquet(
    source: Any,  # noqa: ANN401 - fsspec's files have no common type
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """A whole file that is open for reading, or some columns of it."""
    return open_parquet(source).read(columns=columns and [*columns], use_threads=False)
