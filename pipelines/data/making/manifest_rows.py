"""Rows of manifests: CSV, TSV, JSON lines, JSON, Parquet; a bad row costs only itself.

file -> a value for each column, or the fault of the row
"""

import codecs
import csv
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.redaction import printable
from pipelines.data.shards.column_types import as_plain, fits
from pipelines.data.shards.columns import competing_captions
from pipelines.data.shards.schema import CAPTION
from pipelines.data.shards.text import decode_utf8
from sgmd_core.errors import DataError

MANIFEST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
_MAX_JSON_BYTES = 2**29
_BATCH_ROWS = 1024
_MAX_FIELD_CHARS = 2**20
_PEEK_BYTES = 1024
_PEEK_LINES = 1000
# Fewer may be single bad rows, which cost only themselves.
_MIN_FOREIGN_LINES = 3
# Those of UTF-32 first: UTF-16's is the beginning of one of them.
_MARKS = {
    b"\xff\xfe\0\0": "UTF-32LE",
    b"\0\0\xfe\xff": "UTF-32BE",
    b"\xff\xfe": "UTF-16LE",
    b"\xfe\xff": "UTF-16BE",
}
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def refuse_wide_text(head: bytes, address: str) -> None:
    """Refuses UTF-16 and UTF-32, of which no row could be read, and a first line with zero bytes.

    Args:
        head: The beginning of the file.
        address: Its address, for errors.

    Raises:
        DataError: names the encoding and the command that converts it.
    """
    name = address.rpartition("/")[2]
    if encoding := _wide_encoding(head[:_PEEK_BYTES]):
        # By the name without an order of bytes, iconv takes the mark off.
        source = encoding[:6] if head.startswith((*_MARKS,)) else encoding
        raise DataError(
            f"reading {address}",
            f"text in {encoding}",
            "text in UTF-8",
            f"Convert it: iconv -f {source} -t UTF-8 {name} > utf8-{name}",
        )
    if b"\0" in head.partition(b"\n")[0][:_PEEK_BYTES]:
        raise DataError(
            f"reading {address}",
            "zero bytes in the first line, of a file that is not UTF-16",
            "text in UTF-8",
            "Check that it is a file of text",
        )


def _wide_encoding(head: bytes) -> str:
    """UTF-16 or UTF-32 and its order of bytes; empty where the text is in neither."""
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding
    num_zeros = head.count(0)
    # A zero byte that has strayed into UTF-8 stands among many others.
    if not num_zeros or (_is_text(head, "utf-8") and 4 * num_zeros < len(head)):
        return ""
    units = [head[place : place + 2] for place in range(0, len(head), 2)]
    # Ends of lines tell the orders apart; a zero byte is also half of many a Chinese character.
    ends, zeros = units.count(b"\n\0") - units.count(b"\0\n"), head[1::2].count(0)
    encoding = "UTF-16LE" if ends > 0 or (not ends and 2 * zeros >= num_zeros) else "UTF-16BE"
    return encoding if _is_text(head, encoding) else ""


def _is_text(head: bytes, encoding: str) -> bool:
    """Tells whether the beginning of a text may be in an encoding."""
    try:
        # Its end may be in the middle of a character.
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    return encoding == "utf-8" or "\0" not in text


def has_bare_returns(data: bytes) -> bool:
    """Tells whether lines end with a carriage return alone, as programs of old Macs wrote them."""
    return b"\r" in data.rstrip(b"\r\n") and b"\n" not in data


def refuse_other_encoding(rows: Iterable[bytes], address: str) -> None:
    """Refuses text of which most lines beyond ASCII are not UTF-8.

    A single bad line among good ones is left to the row that it costs.

    Args:
        rows: The first lines of the file.
        address: Its address, for errors.

    Raises:
        DataError: names the encodings that it may have and the command that converts it.
    """
    good, bad = 0, 0
    for row in rows:
        if not row.isascii():
            try:
                row.decode("utf-8")
                good += 1
            except UnicodeDecodeError:
                bad += 1
    if bad < _MIN_FOREIGN_LINES or bad <= good:
        return
    name = address.rpartition("/")[2]
    raise DataError(
        f"reading {address}",
        f"{bad} of the first lines are not UTF-8; the file is in another encoding, such as Latin-1"
        " or GBK",
        "text in UTF-8",
        f"Convert it: iconv -f LATIN1 -t UTF-8 {name} > utf8-{name} (GBK for Chinese text)",
    )


def manifest_lines(file: BinaryIO, address: str) -> Iterator[str]:
    """Lines of a manifest, in which bytes that are not UTF-8 become lone surrogates.

    Raises:
        DataError: the file is not UTF-8 as a whole.
    """
    first = list(itertools.islice(file, _PEEK_LINES))
    refuse_wide_text(b"".join(first[:_PEEK_BYTES])[:_PEEK_BYTES], address)
    if len(first) == 1 and has_bare_returns(first[0]):
        first = first[0].splitlines(keepends=True)
    refuse_other_encoding(first, address)
    for number, line in enumerate(itertools.chain(first, file)):
        if number == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        yield line.decode("utf-8", errors="surrogateescape")


def csv_header_and_rows(
    lines: Iterable[str],
    address: str,
    usual: str = ",",
    is_header: Callable[[Sequence[str]], bool] = bool,
) -> tuple[list[str], Iterator[dict[str, Any] | str]]:
    """Reads CSV or TSV strictly.

    Args:
        lines: Of the file.
        address: Its address, for errors.
        usual: Delimiter of such files. Where the first line names no column by it, semicolons,
            tabs, commas and bars are tried.
        is_header: Tells whether a wanted column is among some names.

    Returns:
        The names of the columns, and the rows: a value for each column, or what is wrong with it.

    Raises:
        DataError: the first line names no columns.
    """
    csv.field_size_limit(_MAX_FIELD_CHARS)
    lines = iter(lines)
    first = list(itertools.islice(lines, 1))
    delimiter = _delimiter(first, usual, is_header)
    source = _Lines(itertools.chain(first, lines))
    header = next(_records(source, delimiter), [])
    if isinstance(header, str):
        raise DataError(f"reading {address}", header, "a first line that names the columns")
    return header, (
        _row(header, record, delimiter) for record in _records(source, delimiter) if record
    )


def _delimiter(first: Sequence[str], usual: str, is_header: Callable[[Sequence[str]], bool]) -> str:
    """The delimiter by which the first line names a wanted column, or else several columns."""
    several = []
    for each in (usual, *(other for other in (";", "\t", ",", "|") if other != usual)):
        try:
            names = next(csv.reader(first, strict=True, delimiter=each), [])
        except csv.Error:
            continue
        if is_header(names):
            return each
        several += [each] if len(names) > 1 else []
    return next(iter(several), usual)


class RepeatedKeyError(ValueError):
    """A key that an object of JSON has twice, of which a reader would keep the last value."""


def object_of_pairs(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The object of some keys and values, as a hook of `json.loads`.

    Raises:
        RepeatedKeyError: a key stands there twice.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise RepeatedKeyError(f"the key {key[:40]!r} twice in an object")
        found[key] = value
    return found


def json_rows(lines: Iterable[str], caption: str) -> Iterator[dict[str, Any] | str]:
    """Reads JSON lines: an object, or what is wrong with the line; blank lines are skipped.

    Args:
        lines: Of the file.
        caption: Name of the value where a line is a string alone.
    """
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=object_of_pairs)
        except RepeatedKeyError as error:
            yield f"{error}: {line.strip()[:80]}"
            continue
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, str):
            row = {caption: row}
        yield row if isinstance(row, dict) else f"no JSON object: {line.strip()[:80]}"


def json_file_rows(
    file: BinaryIO, address: str, key: str, captions: Sequence[str]
) -> Iterator[dict[str, Any] | str]:
    """Reads a JSON file as a whole.

    It may hold a list of captions or of objects; an object whose values are captions, or lists of
    them; or an object one of whose values is a list of objects with captions.

    Args:
        file: The file.
        address: Its address, for errors.
        key: Column that the keys of an object of captions become.
        captions: Names that a caption may have.

    Raises:
        DataError: it is not JSON, is too large, or has another form.
    """
    attempted = f"reading {address}"
    data = file.read(_MAX_JSON_BYTES + 1)
    refuse_wide_text(data[:_PEEK_BYTES], address)
    refuse_other_encoding(data[: _PEEK_BYTES**2].split(b'"'), address)
    if len(data) > _MAX_JSON_BYTES:
        raise DataError(
            attempted,
            f"more than {_MAX_JSON_BYTES // 2**20} MiB, which are read at once",
            "a smaller .json, or JSON lines",
            f"Convert it: jq -c '.[]' {address.rpartition('/')[2]} > captions.jsonl",
        )
    try:
        text = data.decode("utf-8-sig", errors="surrogateescape")
        content = json.loads(text, object_pairs_hook=object_of_pairs)
    except (ValueError, RecursionError) as error:
        raise DataError(
            attempted,
            printable(f"no JSON ({error})"),
            "one JSON value",
            "Name a file with one JSON object a line .jsonl",
        ) from error
    if isinstance(content, dict):
        content = _list_in(content, attempted, key, captions)
    if not isinstance(content, list):
        raise DataError(attempted, f"a JSON {type(content).__name__}", "a list or an object")
    for row in content:
        if isinstance(row, str):
            row = {captions[0]: row}
        yield row if isinstance(row, dict) else f"no JSON object: {str(row)[:80]}"


def _list_in(
    content: dict[str, Any], attempted: str, key: str, captions: Sequence[str]
) -> list[Any]:
    """The rows of a JSON object."""
    if content and all(_is_caption(value) for value in content.values()):
        return [{key: name, captions[0]: value} for name, value in content.items()]
    lists = [
        value
        for value in content.values()
        if isinstance(value, list)
        and any(isinstance(row, dict) and _has_caption(row, captions) for row in value)
    ]
    if len(lists) != 1:
        raise DataError(
            attempted,
            printable(f"an object with the keys {', '.join(map(str, content))[:200]}"),
            f"one list of objects with {' or '.join(captions)}, or a caption for each key",
            "Write the captions as JSON lines, one object a line",
        )
    return lists[0]


def _has_caption(row: dict[str, Any], captions: Sequence[str]) -> bool:
    if len(captions) > 1:
        return bool(competing_captions([*row]))
    return captions[0] in row


def _is_caption(value: object) -> bool:
    if isinstance(value, list):
        return all(isinstance(each, str) for each in value)
    return isinstance(value, str)


def parquet_rows(
    file: BinaryIO, choose: Callable[[pa.Schema], Sequence[str]]
) -> tuple[list[str], Iterator[dict[str, Any] | str]]:
    """Reads some columns of a Parquet file.

    Args:
        file: The file.
        choose: Names of its columns that are wanted.

    Returns:
        The names of all columns, and the rows.
    """
    parquet = pq.ParquetFile(file)
    schema = parquet.schema_arrow
    return schema.names, _parquet_rows(parquet, choose(schema))


def _parquet_rows(
    parquet: pq.ParquetFile, columns: Sequence[str]
) -> Iterator[dict[str, Any] | str]:
    num_left = parquet.metadata.num_rows
    for batch in parquet.iter_batches(_BATCH_ROWS, columns=[*columns]):
        num_left -= batch.num_rows
        values, broken = {}, {}
        for name in columns:
            column = pa.chunked_array([batch.column(name)])
            if fits(CAPTION, column.type):
                column = as_plain(CAPTION, column)
            if pa.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                column, faults = decode_utf8(column)
                broken |= {row: name for row, is_bad in enumerate(faults.to_pylist()) if is_bad}
            values[name] = column.to_pylist()
        for row in range(batch.num_rows):
            if row in broken:
                yield f"{broken[row]} is not UTF-8"
            else:
                yield {name: values[name][row] for name in columns}
    # Arrow passes over pages of a kind that it does not know.
    if num_left and columns:
        raise OSError(f"{num_left} rows fewer than the footer promises")


def fault_of_text(value: object) -> str | None:
    """Says why a value cannot be stored as text; None where it can."""
    if not isinstance(value, str):
        return f"a value of type {type(value).__name__}, not text: {str(value)[:80]}"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"no UTF-8: {printable(value[:80])}"
    return None


class _Lines:
    """Lines of which those of a failed record, except its first, can be read again."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = iter(lines)
        self._again: deque[str] = deque()
        self.taken: list[str] = []

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self.taken.append(line)
        return line

    def skip_first(self) -> None:
        """Gives back all lines taken but the first."""
        self._again.extendleft(reversed(self.taken[1:]))
        self.taken.clear()


def _records(lines: _Lines, delimiter: str) -> Iterator[list[str] | str]:
    reader = csv.reader(lines, strict=True, delimiter=delimiter)
    while True:
        lines.taken.clear()
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"{error}: {lines.taken[0].strip()[:80]}" if lines.taken else str(error)
            lines.skip_first()
            reader = csv.reader(lines, strict=True, delimiter=delimiter)


def _row(header: list[str], record: list[str] | str, delimiter: str) -> dict[str, Any] | str:
    if isinstance(record, str):
        return record
    if len(record) != len(header):
        name = _DELIMITERS[delimiter].removesuffix("s")
        return (
            f"{len(record)} fields, the header has {len(header)} (a {name} in a caption needs"
            f" quotes): {delimiter.join(record)[:80]}"
        )
    return dict(zip(header, record, strict=True))
