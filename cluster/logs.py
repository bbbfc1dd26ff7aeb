"""Logs of JSON lines: appended whole, read around what a crash or a disk has broken.

A process that is killed tears at most the last line. A power loss may leave NULs or nothing in the
place of the last ones. Neither hides the lines before and after it: one that is not an object, or
lacks what its log promises, is left out and named once.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

from cluster.files import open_in_place, sync_file
from cluster.paths import require_file
from cluster.storage_errors import storage_errors
from sgmd_core.errors import CheckpointError

Kind: TypeAlias = (
    "type | Callable[[Any], bool] | tuple[Kind, ...] | list[Kind] | Mapping[str, Kind]"
)
"""Kind of a JSON value, see `is_kind`."""

ANY = "*"
"""Stands in an object's kind for all names that it does not list."""

_MAX_LINES_NAMED = 5
_log = logging.getLogger(__name__)


def is_number(value: object) -> TypeGuard[int | float]:
    """Returns True for a number that a float can hold; true and false are none."""
    if isinstance(value, float):
        return True
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 2**1023


def is_kind(value: Any, kind: Any) -> bool:  # noqa: ANN401 - JSON can be anything
    """Returns True if a JSON value is of a kind.

    Args:
        value: The value.
        kind: A type; a function that decides; a tuple of kinds of which one must fit; a list of
            one kind, that of all entries, or of the kinds of its entries in order; an object of
            kinds by name, where `name?` may be missing and `ANY` stands for all further names.
    """
    if isinstance(kind, tuple):
        return any(is_kind(value, each) for each in kind)
    if isinstance(kind, list):
        if not isinstance(value, list):
            return False
        kinds = kind * len(value) if len(kind) == 1 else kind
        return len(value) == len(kinds) and all(map(is_kind, value, kinds))
    if isinstance(kind, Mapping):
        return isinstance(value, dict) and not misfit(value, kind)
    if isinstance(kind, type):
        return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    return bool(kind(value))


def misfit(entry: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    """Says which name of an object is missing or of another kind; empty where none is.

    Args:
        entry: The object.
        fields: Kinds by name, as `is_kind` takes them.
    """
    rest = set(entry)
    for name, kind in fields.items():
        own = name.removesuffix("?")
        rest.discard(own)
        if own in entry:
            if not is_kind(entry[own], kind):
                return f"{own} = {entry[own]!r}"[:60]
        elif name == own != ANY:
            return f"no {name}"
    for name in sorted(rest) if ANY in fields else ():
        if not is_kind(entry[name], fields[ANY]):
            return f"{name} = {entry[name]!r}"[:60]
    return ""


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Adds one line and hands it to the system; a killed process loses none.

    A line that does not fit on the disk is taken back, so that the log stays whole.

    Raises:
        StorageError: The disk is full or cannot be written to; or the log is a link.
    """
    data = (json.dumps(record, ensure_ascii=False) + "\n").encode()
    flags = os.O_RDWR | os.O_APPEND
    with (
        storage_errors(f"adding a line to {path}"),
        os.fdopen(open_in_place(path, flags), "a+b", buffering=0) as file,
    ):
        end = file.seek(0, os.SEEK_END)
        if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
            # The end of a line that a crash has torn, or the next one would be lost with it.
            data = b"\n" + data
        try:
            written = file.write(data)
            while written < len(data):
                written += file.write(data[written:])
        except OSError:
            file.truncate(end)
            raise


def flush_log(path: Path) -> None:
    """Flushes a log to the disk, so that its lines outlive a power loss."""
    if not path.exists():
        return
    with storage_errors(f"flushing {path}"):
        sync_file(path)


def read_lines(
    path: Path, fields: Mapping[str, Kind], on_broken: Callable[[str], None] = _log.warning
) -> list[dict[str, Any]]:
    """All whole lines of a log.

    Args:
        path: The log; none is an empty one.
        fields: Names that every line must have, with the types of their values.
        on_broken: Called with one sentence where lines were left out.

    Returns:
        The lines in order. A last line without its end was torn by a crash; it is left out
        without a message.

    Raises:
        StorageError: There is something else than a file, or it cannot be read.
    """
    return [line for _, line in whole_lines(path, fields, on_broken)]


def every_line(path: Path, fields: Mapping[str, Kind]) -> list[dict[str, Any]]:
    """As `read_lines`, for a log of which no line may be left out.

    What a power loss has broken at the end is left out: it leads to no checkpoint.

    Raises:
        CheckpointError: A line is broken, and whole ones follow it.
        StorageError: As `read_lines`.
    """
    lines: list[dict[str, Any]] = []
    fault = ""
    for number, reason, _, line in _scanned(path, fields):
        if reason:
            fault = fault or f"line {number} is broken: {reason}"
        elif fault:
            raise CheckpointError(
                f"reading {path}",
                fault,
                "every line that the run wrote: those after it are counted by their places",
                "Restore the file from a copy, or start a new run",
            )
        else:
            lines.append(line)
    return lines


def whole_lines(
    path: Path, fields: Mapping[str, Kind], on_broken: Callable[[str], None] = _log.warning
) -> Iterator[tuple[str, dict[str, Any]]]:
    """As `read_lines`, each line as it stands in the file and as it reads, one at a time."""
    broken: list[str] = []
    for number, reason, data, line in _scanned(path, fields):
        if reason:
            broken.append(f"line {number}: {reason}")
        else:
            yield data.decode().rstrip("\n"), line
    if broken:
        more = f" and {len(broken) - _MAX_LINES_NAMED} more" * (len(broken) > _MAX_LINES_NAMED)
        shown = "; ".join(broken[:_MAX_LINES_NAMED])
        on_broken(f"{path}: {len(broken)} broken line(s) left out ({shown}{more})")


def _scanned(
    path: Path, fields: Mapping[str, Kind]
) -> Iterator[tuple[int, str, bytes, dict[str, Any]]]:
    """Number, fault, text and content of each line that has its end."""
    require_file(path)
    if not path.exists():
        return
    with storage_errors(f"reading {path}"), path.open("rb") as file:
        for number, data in enumerate(file, 1):
            if not data.endswith(b"\n"):
                return
            yield number, *_parsed(data, fields)


def _parsed(data: bytes, fields: Mapping[str, Kind]) -> tuple[str, bytes, dict[str, Any]]:
    """Returns the fault of a line, or an empty string, and the line's text and content."""
    if not data.strip(b"\0\n"):
        return "only NULs" if b"\0" in data else "empty", data, {}
    try:
        line = json.loads(data.decode())
    except ValueError as error:
        return f"no JSON ({str(error).partition(':')[0]})", data, {}
    except RecursionError:
        return "no JSON that ends (nested too deeply)", data, {}
    if not isinstance(line, dict):
        return "no object", data, {}
    return misfit(line, fields), data, line
