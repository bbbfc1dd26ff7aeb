"""Words for what file systems and object stores raise: what went wrong, and what can be done."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.errors import ClusterError, StorageError, StoreRefusedError
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
        found = f"{type(error).__name__}: {error}"
        kind = StoreRefusedError if _is_refusal(error) else StorageError
        raise kind(attempted, found, expected, remedy) from error


def disk_remedy(error: BaseException) -> tuple[str, str] | None:
    """Returns what was expected of a disk that takes no more and what to do; else None.

    Args:
        error: What a file system, or a library, raised.
    """
    return _REMEDIES.get(_code_of(error))


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
    """The system's number of an error, also where a library has it in its text only."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    named = _CODE.search(str(error))
    return int(named[1]) if named else 0
