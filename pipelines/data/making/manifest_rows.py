"""Rows of CSV and JSON-lines manifests; a row that cannot be read costs only itself."""

import csv
import json
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from sgmd_core.errors import DataError

_MAX_FIELD_CHARS = 2**20
_PEEK_BYTES = 1024
_WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff")


def refuse_wide_text(head: bytes, address: str) -> None:
    """Refuses UTF-16 and UTF-32, of which no row could be read.

    Raises:
        DataError: names the encoding to convert to.
    """
    if head.startswith(_WIDE_MARKS) or b"\0" in head[:_PEEK_BYTES]:
        raise DataError(
            f"reading {address}",
            "zero bytes or a mark of UTF-16 or UTF-32",
            "text in UTF-8",
            f"Convert it: iconv -f UTF-16 -t UTF-8 {address.rpartition('/')[2]}",
        )


def manifest_lines(file: BinaryIO, address: str) -> Iterator[str]:
    """Lines of a manifest, in which bytes that are not UTF-8 become lone surrogates.

    Raises:
        DataError: the file is UTF-16 or UTF-32.
    """
    for number, line in enumerate(file):
        if number == 0:
            refuse_wide_text(line, address)
            line = line.removeprefix(b"\xef\xbb\xbf")
        yield line.decode("utf-8", errors="surrogateescape")


def csv_header_and_rows(
    lines: Iterable[str], address: str
) -> tuple[list[str], Iterator[dict[str, Any] | str]]:
    """Reads CSV strictly.

    Returns:
        The names of the columns, and the rows: a value for each column, or what is wrong with it.

    Raises:
        DataError: the first line names no columns.
    """
    csv.field_size_limit(_MAX_FIELD_CHARS)
    source = _Lines(lines)
    header = next(_records(source), [])
    if isinstance(header, str):
        raise DataError(f"reading {address}", header, "a first line that names the columns")
    return header, (_row(header, record) for record in _records(source) if record)


def json_rows(lines: Iterable[str]) -> Iterator[dict[str, Any] | str]:
    """Reads JSON lines: an object, or what is wrong with the line; blank lines are skipped."""
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        yield row if isinstance(row, dict) else f"no JSON object: {line.strip()[:80]}"


def fault_of_text(value: object) -> str | None:
    """Says why a value cannot be stored as text; None where it can."""
    if not isinstance(value, str):
        return f"a value of type {type(value).__name__}, not text: {str(value)[:80]}"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"no UTF-8: {printable(value[:80])}"
    return None


def printable(text: str) -> str:
    """Text that can be stored: what is no character is written as an escape."""
    return text.encode("utf-8", errors="backslashreplace").decode()


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


def _records(lines: _Lines) -> Iterator[list[str] | str]:
    reader = csv.reader(lines, strict=True)
    while True:
        lines.taken.clear()
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"{error}: {lines.taken[0].strip()[:80]}" if lines.taken else str(error)
            lines.skip_first()
            reader = csv.reader(lines, strict=True)


def _row(header: list[str], record: list[str] | str) -> dict[str, Any] | str:
    if isinstance(record, str):
        return record
    if len(record) != len(header):
        return (
            f"{len(record)} fields, the header has {len(header)} (a comma in a caption needs"
            f" quotes): {','.join(record)[:80]}"
        )
    return dict(zip(header, record, strict=True))
