"""Logs of JSON lines: appended whole, read around what a crash or a disk has broken.

A process that is killed tears at most the last line. A power loss may leave NULs or nothing in the
place of the last ones. Neither hides the lines before and after it: a line that is no object, or
lacks what its log promises, is left out and named once.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.files import storage_errors, sync_file

Kind = type | tuple[type, ...]

_MAX_LINES_NAMED = 5
_log = logging.getLogger(__name__)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Adds one line and hands it to the system; a killed process loses none.

    A line that does not fit on the disk is taken back, so that the log stays whole.

    Raises:
        StorageError: The disk is full or cannot be written to.
    """
    data = (json.dumps(record, ensure_ascii=False) + "\n").encode()
    with storage_errors(f"adding a line to {path}"), path.open("a+b", buffering=0) as file:
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
        on_broken: Hears one sentence where lines were left out.

    Returns:
        The lines in order. A last line without its end was torn by a crash; it is left out without
        a word.
    """
    return [line for _, line in whole_lines(path, fields, on_broken)]


def whole_lines(
    path: Path, fields: Mapping[str, Kind], on_broken: Callable[[str], None] = _log.warning
) -> Iterator[tuple[str, dict[str, Any]]]:
    """As `read_lines`, each line as it stands in the file and as it reads, one at a time."""
    if not path.exists():
        return
    broken: list[str] = []
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            if not data.endswith(b"\n"):
                break
            reason, line = _parsed(data, fields)
            if reason:
                broken.append(f"line {number}: {reason}")
            else:
                yield data.decode().rstrip("\n"), line
    if broken:
        more = f" and {len(broken) - _MAX_LINES_NAMED} more" * (len(broken) > _MAX_LINES_NAMED)
        shown = "; ".join(broken[:_MAX_LINES_NAMED])
        on_broken(f"{path}: {len(broken)} broken line(s) left out ({shown}{more})")


def _parsed(data: bytes, fields: Mapping[str, Kind]) -> tuple[str, dict[str, Any]]:
    """Returns the fault of a line, or an empty string and the line's content."""
    if not data.strip(b"\0\n"):
        return "only NULs" if b"\0" in data else "empty", {}
    try:
        line = json.loads(data.decode())
    except ValueError as error:
        return f"no JSON ({str(error).partition(':')[0]})", {}
    if not isinstance(line, dict):
        return "no object", {}
    for name, kind in fields.items():
        if name not in line:
            return f"no {name}", {}
        if not isinstance(line[name], kind):
            return f"{name} = {line[name]!r}"[:60], {}
    return "", line
