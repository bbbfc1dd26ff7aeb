"""Footers and row groups of Parquet files, many at once.

    row groups -> Arrow's own reader (`pipelines.data.shards.native`) -> what it could not read:
    ranges of all files -> one round trip (s3fs runs them side by side) -> bytes -> Arrow tables

What is broken in one file comes back as a `Fault` in its place; the others are whole. What is wrong
with the server is tried again, and raised when that does not help: a server that is down must never
look like broken data.
"""

import io
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from pipelines.data.shards.columns import ColumnMap, ColumnNames, map_columns
from pipelines.data.shards.filesystem import S3Settings
from pipelines.data.shards.native import Group, NativeReader, native_filesystem
from pipelines.data.shards.opening import open_parquet
from pipelines.data.shards.reading import Fault, Range, fetch, words_of

_FOOTER_GUESS_BYTES = 64 * 2**10
_MERGE_GAP_BYTES = 64 * 2**10
_NUM_CACHED_FOOTERS = 256
_MAX_FAILED_NATIVE_READS = 3
_MAGIC = b"PAR1"
_LFS_MARK = b"version https://git-lfs"
_IN_ITS_PLACE = "a pointer of Git LFS stands in its place: `git lfs pull` fetches the file"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Footer:
    """Content of the end of a Parquet file."""

    metadata: pq.FileMetaData
    schema: pa.Schema

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of each row group."""
        count = self.metadata.num_row_groups
        return tuple(self.metadata.row_group(index).num_rows for index in range(count))


def read_footers(
    filesystem: AbstractFileSystem, files: Sequence[tuple[str, int]], s3: S3Settings
) -> list[Footer | Fault]:
    """Reads the footers of several files.

    Args:
        filesystem: Where the files are.
        files: Path and size in bytes of each.
        s3: See `fetch`.

    Raises:
        DataError: See `fetch`.
    """
    tails = fetch(
        filesystem,
        [Range(path, max(0, size - _FOOTER_GUESS_BYTES), size) for path, size in files],
        s3,
    )
    footers: list[Footer | Fault] = []
    for (path, size), tail in zip(files, tails, strict=True):
        if isinstance(tail, bytes) and (length := _footer_bytes(tail)) > len(tail):
            start = max(0, size - length)
            tail = fetch(filesystem, [Range(path, start, size)], s3)[0]
        footers.append(tail if isinstance(tail, Fault) else _footer(tail))
    return footers


class RowGroupReader:
    """Reads row groups of one folder; remembers the footers of the latest files.

    Args:
        filesystem: The folder's file system.
        root: The folder's path in it.
        s3: See `fetch`.
        names: Names of the set's columns.
    """

    def __init__(
        self,
        filesystem: AbstractFileSystem,
        root: str,
        s3: S3Settings,
        names: ColumnNames = ColumnNames(),
    ) -> None:
        self._filesystem = filesystem
        self._root = root
        self._s3 = s3
        self._names = names
        self._footers: OrderedDict[str, Footer | Fault] = OrderedDict()
        self._unanswered: dict[str, Fault] = {}
        self._failed_native_reads = 0

    def footers(self, shards: Sequence[tuple[str, int]]) -> list[Footer | Fault]:
        """The footers of files, given by relative path and size.

        Raises:
            DataError: See `fetch`.
        """
        new = {path: size for path, size in shards if path not in self._footers}
        read = read_footers(
            self._filesystem, [(f"{self._root}/{path}", new[path]) for path in new], self._s3
        )
        self._footers.update(zip(new, read, strict=True))
        found = []
        for path, _ in shards:
            self._footers.move_to_end(path)
            found.append(self._footers[path])
        while len(self._footers) > max(_NUM_CACHED_FOOTERS, len(shards)):
            self._footers.popitem(last=False)
        return found

    def read(self, groups: Sequence[Group], columns: Sequence[str]) -> list[pa.Table | Fault]:
        """Reads some columns of row groups.

        Args:
            groups: (relative path, size of the file in bytes, number of the row group) of each.
            columns: Our names of the columns, by which the tables have them; a group that lacks
                one is a fault. See `pipelines.data.shards.columns`.

        Raises:
            DataError: See `fetch`.
        """
        if self._native is None:
            return self._read_via_fsspec(groups, columns)
        if any(path in self._unanswered for path, _, _ in groups):
            # Arrow would wait for them again.
            return self._read_via_fsspec(groups, columns)
        quick = self._native.read(groups, columns)
        left = [
            group
            for group, found in zip(groups, quick, strict=True)
            if isinstance(found, Exception)
        ]
        slow = self._read_via_fsspec(left, columns) if left else []
        self._judge_native(quick, slow)
        rest = iter(slow)
        return [next(rest) if isinstance(found, Exception) else found for found in quick]

    @cached_property
    def _native(self) -> NativeReader | None:
        """Arrow's own reader; made when it is first needed, because many only ask for footers."""
        try:
            client = native_filesystem(self._filesystem, self._s3)
        except Exception as error:  # As with its reads: whatever it is, s3fs may know better.
            self._give_up(error)
            return None
        return None if client is None else NativeReader(client, self._root, self._names)

    def _judge_native(
        self, quick: Sequence[pa.Table | Exception], slow: Sequence[pa.Table | Fault]
    ) -> None:
        """Gives Arrow's reader up where it can read nothing time and again, and we can."""
        errors = [found for found in quick if isinstance(found, Exception)]
        if len(errors) < len(quick):
            self._failed_native_reads = 0
        elif any(isinstance(found, pa.Table) for found in slow):
            self._failed_native_reads += 1
            if self._failed_native_reads == _MAX_FAILED_NATIVE_READS:
                self._native = None
                self._give_up(errors[-1])

    def _give_up(self, error: Exception) -> None:
        _log.warning(
            "Arrow's own client cannot read %s (%s). It is read through fsspec from now on, which "
            "is slower; in a recipe, data.s3.native_reads=false saves the attempts.",
            self._root,
            words_of(error),
        )

    def _read_via_fsspec(
        self, groups: Sequence[Group], columns: Sequence[str]
    ) -> list[pa.Table | Fault]:
        footers = self.footers([(path, size) for path, size, _ in groups])
        plans: list[_Plan | Fault] = [
            self._plan(group, footer, columns)
            for group, footer in zip(groups, footers, strict=True)
        ]
        wanted = [part for plan in plans if isinstance(plan, _Plan) for part in plan.ranges]
        pieces = iter(zip(wanted, fetch(self._filesystem, wanted, self._s3), strict=True))
        tables: list[pa.Table | Fault] = []
        for group, plan in zip(groups, plans, strict=True):
            if isinstance(plan, Fault):
                tables.append(plan)
                continue
            parts = [next(pieces) for _ in plan.ranges]
            for _, part in parts:
                if isinstance(part, Fault) and part.is_unanswered:
                    self._unanswered[group[0]] = part
            tables.append(_decode(plan, group, parts))
        return tables

    def _plan(
        self, group: Group, footer: Footer | Fault, columns: Sequence[str]
    ) -> "_Plan | Fault":
        path, _, index = group
        if path in self._unanswered:
            return self._unanswered[path]
        if isinstance(footer, Fault):
            return footer
        found = map_columns(footer.schema, self._names, columns)
        if isinstance(found, Fault):
            return found
        if index >= footer.metadata.num_row_groups:
            return Fault(f"no row group {index}: the file has {footer.metadata.num_row_groups}")
        full = f"{self._root}/{path}"
        try:
            spans = _chunks(footer.metadata, index, found.sources)
        except (OSError, ValueError, pa.ArrowException) as error:
            return Fault(f"corrupt footer ({words_of(error)})")
        return _Plan(footer, found, [Range(full, *span) for span in spans])


@dataclass(frozen=True, slots=True)
class _Plan:
    """Plan of reading a row group: from these bytes, with these columns."""

    footer: Footer
    columns: ColumnMap
    ranges: list[Range]


class RangeFile(io.RawIOBase):
    """A file for Arrow to read, of which only what Arrow asks for has to be here.

    Args:
        size: Its size in bytes.
        bytes_between: Returns the bytes from an offset to below another one.
    """

    def __init__(self, size: int, bytes_between: Callable[[int, int], bytes]) -> None:
        self._size = size
        self._bytes_between = bytes_between
        self._at = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to an offset from the beginning, from where it is or from the end; return it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        """Offset of the next byte to read."""
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Read so many bytes, or all that follow; fewer at the end of the file."""
        start, stop = self._at, self._size if size < 0 else min(self._at + size, self._size)
        content = self._bytes_between(start, stop) if start < stop else b""
        self._at = max(start, stop)
        return content

    def readable(self) -> bool:
        """True: it is open for reading."""
        return True

    def seekable(self) -> bool:
        """True: any offset can be read."""
        return True


def _bytes_in(parts: Sequence[tuple[int, bytes]], start: int, stop: int) -> bytes:
    """Bytes of a file of which only some ranges are here."""
    for first, content in parts:
        if first <= start and stop <= first + len(content):
            return content[start - first : stop - first]
    raise OSError(f"bytes {start} to {stop} are in no column chunk that the footer names")


def _footer_bytes(tail: bytes) -> int:
    """Length of the footer that a file's last bytes announce, with length and magic."""
    return int.from_bytes(tail[-8:-4], "little") + 8 if tail[-4:] == _MAGIC else 0


def _footer(tail: bytes) -> Footer | Fault:
    try:
        file = open_parquet(pa.BufferReader(tail))
        return Footer(file.metadata, file.schema_arrow)
    except (OSError, ValueError, pa.ArrowException) as error:
        why = _IN_ITS_PLACE if tail.startswith(_LFS_MARK) else words_of(error)
        return Fault(f"no readable footer ({why})")


class _NothingReadError(OSError):
    """A file that is never read was asked for bytes."""


def _no_bytes(start: int, stop: int) -> bytes:
    raise _NothingReadError


def column_chunks(
    metadata: pq.FileMetaData, index: int, columns: Sequence[str]
) -> list[pq.ColumnChunkMetaData]:
    """Chunks of some columns of a row group; a column of structs has one for each field.

    Where Parquet refuses a chunk, `RowGroupMetaData.column` ends the process; reading raises. So
    each column is read first, from a file without bytes.

    Raises:
        OSError, ValueError, pyarrow.ArrowException: The footer is damaged.
    """
    file, group = (
        open_parquet(RangeFile(2**62, _no_bytes), metadata=metadata),
        metadata.row_group(index),
    )
    for number in range(group.num_columns):
        with suppress(_NothingReadError):
            path = metadata.schema.column(number).path
            file.read_row_group(index, columns=[path], use_threads=False)
    chunks = (group.column(number) for number in range(group.num_columns))
    starts = tuple(f"{name}." for name in columns)
    return [each for each in chunks if f"{each.path_in_schema}.".startswith(starts)]


def _chunks(metadata: pq.FileMetaData, index: int, columns: Sequence[str]) -> list[tuple[int, int]]:
    """Byte ranges of the columns' chunks, near ones merged."""
    spans: list[tuple[int, int]] = []
    for chunk in column_chunks(metadata, index, columns):
        first = chunk.data_page_offset
        if chunk.has_dictionary_page:
            first = min(first, chunk.dictionary_page_offset)
        spans.append((first, first + chunk.total_compressed_size))
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if merged and start - merged[-1][1] <= _MERGE_GAP_BYTES:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _decode(
    plan: _Plan, group: Group, parts: Sequence[tuple[Range, bytes | Fault]]
) -> pa.Table | Fault:
    path, size, index = group
    content: list[tuple[int, bytes]] = []
    for where, part in parts:
        if isinstance(part, Fault):
            return part
        content.append((where.start, part))
    metadata, sources = plan.footer.metadata, plan.columns.sources
    try:
        whole = len(content) == 1 and content[0][0] == 0 and len(content[0][1]) == size
        source = (
            pa.BufferReader(content[0][1])
            if whole
            else RangeFile(size, partial(_bytes_in, content))
        )
        file = open_parquet(source, metadata=metadata, page_checksum_verification=True)
        table = file.read_row_group(index, columns=sources, use_threads=False)
        return plan.columns.apply(table, path, metadata, index)
    except (OSError, ValueError, pa.ArrowException) as error:
        return Fault(f"corrupt row group ({words_of(error)})")
