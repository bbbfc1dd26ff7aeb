"""Row groups read by Arrow itself: one path in C++ from the socket to the column.

    row groups -> Arrow's own S3 client (or plain files) -> decoded side by side -> tables

It costs half of what bytes cost that come through Python, and is allowed to fail: what it cannot
read comes as None, and `pipelines.data.parquet` reads it again through fsspec, with our patience
and our words for what is wrong. So credentials, addresses or troubles that only s3fs copes with
cost speed and nothing else. See docs/decisions/0013-arrow-reads-row-groups.md.
"""

import logging
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

from pipelines.data.filesystem import S3Settings, without_secrets

_log = logging.getLogger(__name__)

_NUM_THREADS = 8
_NUM_CACHED_FRAGMENTS = 256
_MOST_FAILURES = 3
_AWS_HOST = ".amazonaws.com"

Group = tuple[str, int, int]
"""Relative path of a shard, its size in bytes, number of a row group."""


class NativeReader:
    """Reads row groups of one folder with Arrow's clients, as long as that works.

    Args:
        filesystem: One of Arrow's own; see `native_filesystem`.
        root: The folder's path in it.
    """

    def __init__(self, filesystem: fs.FileSystem, root: str) -> None:
        self._filesystem = filesystem
        self._root = root
        options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
        self._format = ds.ParquetFileFormat(default_fragment_scan_options=options)
        self._fragments: OrderedDict[tuple[str, int], ds.ParquetFileFragment] = OrderedDict()
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="row-groups")
        self._failures = 0
        self._has_given_up = False
        self._last_error: Exception | None = None

    def read(self, groups: Sequence[Group], columns: Sequence[str]) -> list[pa.Table | None]:
        """Some columns of row groups, side by side; None for each that could not be read."""
        if self._has_given_up:
            return [None] * len(groups)
        fragments = [self._fragment(path, size) for path, size, _ in groups]

        def table(fragment: ds.ParquetFileFragment, index: int) -> pa.Table | Exception:
            try:
                part = cast("Any", fragment).subset(row_group_ids=[index])
                return part.to_table(columns=[*columns], use_threads=False)
            except Exception as error:
                return error

        found = [*self._pool.map(table, fragments, [index for *_, index in groups])]
        for each in found:
            if isinstance(each, Exception):
                self._last_error = each
        return [None if isinstance(each, Exception) else each for each in found]

    def note(self, *, was_useless: bool) -> None:
        """Tells it whether others had to read everything that it was last asked for.

        After some times in a row it gives up, because each vain try costs time.
        """
        self._failures = self._failures + 1 if was_useless else 0
        if was_useless and self._failures == _MOST_FAILURES:
            self._has_given_up = True
            _log.warning(
                "Arrow's own client could not read %s (%s). s3fs could and does so from now on, "
                "which is slower; data.s3.native_reads=false saves the attempts.",
                self._root,
                without_secrets(str(self._last_error)),
            )

    def _fragment(self, path: str, size: int) -> ds.ParquetFileFragment:
        """A shard; its footer is read once and kept with it."""
        key = path, size
        if key not in self._fragments:
            self._fragments[key] = self._format.make_fragment(
                f"{self._root}/{path}", self._filesystem, file_size=size
            )
        self._fragments.move_to_end(key)
        while len(self._fragments) > _NUM_CACHED_FRAGMENTS:
            self._fragments.popitem(last=False)
        return self._fragments[key]


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
    endpoint = urlsplit(client.endpoint_url)
    is_aws = (endpoint.hostname or "").endswith(_AWS_HOST)
    return fs.S3FileSystem(
        region=client.region_name,
        scheme=endpoint.scheme,
        endpoint_override=None if is_aws else endpoint.netloc,
        force_virtual_addressing=s3.addressing == "virtual",
        connect_timeout=s3.connect_timeout_s,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=s3.max_attempts),
    )
