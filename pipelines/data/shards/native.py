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
import pyarrow.dataset as ds
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from pyarrow import fs
from s3fs import S3FileSystem

from pipelines.data.shards.columns import ColumnNames, map_columns
from pipelines.data.shards.filesystem import S3Settings
from pipelines.data.shards.reading import Fault

# As many as Arrow has threads for reading; one window has no more row groups by default.
_NUM_THREADS = 8
_NUM_CACHED_FRAGMENTS = 256

Group = tuple[str, int, int]
"""Relative path of a shard, its size in bytes when it was listed, number of a row group."""


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
        options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
        self._format = ds.ParquetFileFormat(default_fragment_scan_options=options)
        self._fragments: OrderedDict[tuple[str, int], ds.ParquetFileFragment] = OrderedDict()
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="row-groups")

    def read(self, groups: Sequence[Group], columns: Sequence[str]) -> list[pa.Table | Exception]:
        """Some columns of row groups, side by side; what went wrong in the place of the others."""
        return [*self._pool.map(lambda group: self._read(group, columns), groups)]

    def _read(self, group: Group, columns: Sequence[str]) -> pa.Table | Exception:
        path, size, index = group
        try:
            fragment = cast("Any", self._fragment(path, size))
            found = map_columns(fragment.physical_schema, self._names, columns)
            if isinstance(found, Fault):
                return ValueError(found.reason)
            part = fragment.subset(row_group_ids=[index])
            table = part.to_table(columns=found.sources, use_threads=False)
            return found.apply(table, path, fragment.metadata, index)
        except Exception as error:  # Whatever it is: who reads again says what is wrong.
            return error

    def _fragment(self, path: str, size: int) -> ds.ParquetFileFragment:
        """A shard; its footer is read once and kept with it."""
        full = f"{self._root}/{path}"
        if isinstance(self._filesystem, fs.LocalFileSystem):
            # Other clients look for the footer where the size says; this one asks the disk.
            found = self._filesystem.get_file_info(full).size
            if found != size:
                raise OSError(f"{full} has {found} bytes; it had {size}")
        fragment = self._fragments.get((path, size))
        if fragment is None:
            fragment = self._format.make_fragment(full, self._filesystem, file_size=size)
            # Two threads may come here at once: each has a fragment, and the later one is kept.
            self._fragments[path, size] = fragment
            if len(self._fragments) > _NUM_CACHED_FRAGMENTS:
                self._fragments.popitem(last=False)
        return fragment


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
