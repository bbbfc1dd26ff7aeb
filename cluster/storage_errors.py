"""Words for what file systems and object stores raise: what went wrong, and what can be done."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import ClusterError, StorageError, StoreRefusedError
from cluster.paths import nearest_folder
from sgmd_core.errors import ConfigError, DataError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REMEDIES = {
    **dict.fromkeys(
        _FULL, ("room on the disk", "Free space there, or raise the quota, and run it again")
    ),
    errno.EROFS: (
        "a disk that can be written to",
        "The file system is mounted read-only: choose another folder, or mount it for writing",
    ),
}
_CODE = re.compile(r"(?:os error|[Ee]rrno) (\d+)")
_SAID = {
    **{os.strerror(number): number for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)},
    "database or disk is full": errno.ENOSPC,  # SQLite's, without a number
}
_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
# A path in words such as "adding a line to /runs/tiny/events.jsonl".
_PATH = re.compile(r"(?<![\w:/])[\w.~-]*/[^\s,]+")
_DISK = ("storage that works", "Check the path and the rights to it")
_OTHER_STORE = ("a store that works", "Check the address, the network and the rights to it")
_OBJECT_STORE = (
    "an object store that works",
    "Check AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, that the bucket exists and"
    " the rights to it",
)


@contextmanager
def storage_errors(attempted: str) -> Iterator[None]:
    """Turns whatever a file system raises into a `StorageError` that says what to do.

    A full disk, a quota and a disk that is read-only have remedies of their own. Those, and missing
    rights, make a `StoreRefusedError`: waiting does not help.

    Args:
        attempted: What is being done, with the path.
    """
    try:
        yield
    except (ClusterError, ConfigError, DataError):
        raise
    except Exception as error:
        usual = _usual_remedy(attempted, error)
        expected, remedy = _REMEDIES.get(_code_of(error), usual)
        found = with_room(f"{type(error).__name__}: {error}", error, attempted)
        kind = StoreRefusedError if _is_refusal(error) else StorageError
        raise kind(attempted, found, expected, remedy) from error


def disk_remedy(error: BaseException) -> tuple[str, str] | None:
    """Returns what was expected of a disk that takes no more and what to do; else None.

    Args:
        error: What a file system, or a library, raised.
    """
    return _REMEDIES.get(_code_of(error))


def is_disk_full(error: BaseException) -> bool:
    """Returns True for an error of a disk or quota that has no room, also where only its text says.

    Args:
        error: What a file system, or a library, raised.
    """
    return _code_of(error) in _FULL


def with_room(found: str, error: BaseException, attempted: str) -> str:
    """Adds the folder and its free space to words on a full disk; other words stay.

    Args:
        found: The words.
        error: What a file system, or a library, raised.
        attempted: What was being done, with the path.
    """
    if not is_disk_full(error):
        return found
    room = room_at(_path_of(error) or _path_in(attempted.replace("file://", "")))
    return f"{found.rstrip('.')} ({room})" if room else found


def room_at(place: str | Path) -> str:
    """Says which folder is on the disk of a local path, and its free space; or nothing.

    Args:
        place: A path, of which a part may not be there; empty, or an address, where there is none.
    """
    if not str(place) or "://" in str(place):
        return ""
    there = nearest_folder(place)
    try:
        room, files = shutil.disk_usage(there), os.statvfs(there)
    except OSError:
        return ""
    words = f"{there} has {_in_units(room.free)} free of {_in_units(room.total)}"
    return words + (
        ", and no room for another file" if files.f_files and not files.f_favail else ""
    )


def _in_units(count: int) -> str:
    unit, name = next(each for each in _UNITS if count >= each[0] or each[0] == 2**10)
    return f"{count / unit:.1f} {name}"


def _path_of(error: BaseException) -> str:
    name = error.filename if isinstance(error, OSError) else None
    return os.fsdecode(name) if isinstance(name, str | bytes) else ""


def _path_in(attempted: str) -> str:
    """The first local path in words; empty where there is none."""
    found = _PATH.search(attempted)
    return found[0] if found else ""


@contextmanager
def full_disk_errors(attempted: str) -> Iterator[None]:
    """Words what a library raises where a disk takes no more; any other error stays as it is.

    Args:
        attempted: What is being done, with the path.

    Raises:
        StoreRefusedError: The disk or a quota is full, or the disk is read-only.
    """
    try:
        yield
    except (ClusterError, ConfigError, DataError):
        raise
    except Exception as error:
        if _code_of(error) not in _REMEDIES:
            raise
        with storage_errors(attempted):
            raise


def _usual_remedy(attempted: str, error: BaseException) -> tuple[str, str]:
    """Expectation and remedy for a disk, for S3 or for another store."""
    chain = [error, error.__cause__, error.__context__]
    sdk = ("botocore", "aiobotocore")
    named = re.search(r"([A-Za-z0-9+.-]+)://", attempted)
    if any(type(each).__module__.split(".")[0] in sdk for each in chain):
        from cluster.s3.refusals import refusal_remedy

        return refusal_remedy(error) or _OBJECT_STORE
    if named is None or named[1] == "file":
        return _DISK
    return _OBJECT_STORE if named[1] in ("s3", "s3a") else _OTHER_STORE


def _is_refusal(error: Exception) -> bool:
    chain = (error, error.__cause__, error.__context__)
    return _code_of(error) in _REMEDIES or any(isinstance(each, PermissionError) for each in chain)


def _code_of(error: BaseException) -> int:
    """The system's number of an error, or of one that it follows, where that is of a disk."""
    codes = [_own_code(each) for each in (error, error.__cause__, error.__context__) if each]
    return next((code for code in codes if code in _REMEDIES), codes[0])


def _own_code(error: BaseException) -> int:
    """The system's number, also where a library has it, or its words, in its text only."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    text = str(error)
    if named := _CODE.search(text):
        return int(named[1])
    return next((number for words, number in _SAID.items() if words in text), 0)
