"""Row groups read by Arrow itself: one path in C++ from the socket to the column.

    row groups -> Arrow's own S3 client (or plain files) -> decoded side by side -> tables

It takes a third less CPU than bytes that come through Python (docs/benchmarks.md, Data), and is
allowed to fail: what it cannot read comes as an error, and `pipelines.data.shards.parquet` reads it
again through fsspec, with our patience and our words for what is wrong. So credentials, addresses
or troubles that only s3fs copes with cost speed and nothing else. See
docs/decisions/0013-arrow-reads-row-groups.md.
"""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from pyarrow import fs
from s3fs import S3FileSystem

from pipelines.data.shards.columns import ColumnNames, map_columns
from pipelines.data.shards.filesystem import S3Settings
from pipelines.data.shards.reading import Fault

# As many as Arrow has threads for reading; one window has no more row groups by default.
_NUM_THREADS = 8
_NUM_CACHED_FILES = 256

Group = tuple[str, int, int]
"""Relative path of a shard, its size in bytes when it was listed, number of a row group."""

_Files = OrderedDict[tuple[str, int], tuple[pa.NativeFile | None, pq.FileMetaData]]
"""(path, size) -> the open file, and its footer"""


class NativeReader:
    """Reads row groups of one folder with one of Arrow's clients.

    Args:
        filesystem: The client; see `native_filesystem`.
        root: The folder's path in it.
        names: Names of the set's columns.
    """

    def __init__(
        self, filesystem: fs.FileSystem, root: str, names: ColumnNames = ColumnNames()
    ) -> None:
        self._filesystem = filesystem
        self._root = root
        self._names = names
        self._is_local = isinstance(filesystem, fs.LocalFileSystem)
        self._files: _Files = OrderedDict()
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="row-groups")

    def read(self, groups: Sequence[Group], columns: Sequence[str]) -> list[pa.Table | Exception]:
        """Some columns of row groups, side by side; what went wrong in the place of the others."""
        return [*self._pool.map(lambda group: self._read(group, columns), groups)]

    def _read(self, group: Group, columns: Sequence[str]) -> pa.Table | Exception:
        path, size, index = group
        try:
            content, metadata = self._open(path, size)
            file = pq.ParquetFile(
                content,
                metadata=metadata,
                page_checksum_verification=True,
                # One request for all columns; from a disk, each is read as quickly when it is due.
                pre_buffer=not self._is_local,
            )
            found = map_columns(file.schema_arrow, self._names, columns)
            if isinstance(found, Fault):
                return ValueError(found.reason)
            table = file.read_row_group(index, columns=found.sources, use_threads=False)
            return found.apply(table, path, metadata, index)
        except Exception as error:  # Whatever it is: who reads again says what is wrong.
            return error

    def _open(self, path: str, size: int) -> tuple[pa.NativeFile, pq.FileMetaData]:
        """A shard and its footer, which is read once."""
        content, metadata = self._files.get((path, size), (None, None))
        if content is None:
            content = self._filesystem.open_input_file(f"{self._root}/{path}")
            if content.size() != size:
                raise OSError(f"{path} has {content.size()} bytes; it had {size}")
        if metadata is None:
            metadata = pq.read_metadata(content)
        # A file of a disk is opened each time: it may be another one by then. Two threads may come
        # here at once: each has a file, and the later one is kept.
        self._files[path, size] = None if self._is_local else content, metadata
        if len(self._files) > _NUM_CACHED_FILES:
            self._files.popitem(last=False)
        return content, metadata


def native_filesystem(filesystem: AbstractFileSystem, s3: S3Settings) -> fs.FileSystem | None:
    """Arrow's own client for where a file system reads.

    It finds its keys as the SDKs do: environment, profiles, the machine's role. Endpoint and region
    are those that s3fs has found.

    Args:
        filesystem: Of fsspec.
        s3: How to speak to the server.

    Returns:
        None where Arrow has none, or where the settings do not want it.
    """
    if not s3.native_reads:
        return None
    if isinstance(filesystem, LocalFileSystem):
        return fs.LocalFileSystem()
    if not isinstance(filesystem, S3FileSystem):
        return None
    client = cast("Any", filesystem).s3.meta
    return fs.S3FileSystem(
        region=client.region_name,
        force_virtual_addressing=s3.addressing == "virtual",
        connect_timeout=s3.connect_timeout_s,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=s3.max_attempts),
        **endpoint_options(client.endpoint_url, client.region_name),
    )


def endpoint_options(endpoint_url: str, region: str) -> dict[str, str]:
    """Returns the options of Arrow's client for an endpoint.

    Of AWS's endpoints it makes the usual one of a region itself, with the bucket in the host name;
    any other, such as that of a private network, must be said.
    """
    endpoint = urlsplit(endpoint_url)
    usual = {"s3.amazonaws.com", f"s3.{region}.amazonaws.com"}
    if endpoint.hostname in usual:
        return {"scheme": endpoint.scheme}
    return {"scheme": endpoint.scheme, "endpoint_override": endpoint.netloc}
