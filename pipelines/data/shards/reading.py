"""Byte ranges of files, read within one budget of time.

    ranges -> side by side, each tried again within its budget -> bytes
    an object that fails for good -> does the server answer for another one? -> Fault, or DataError

`read_budget_s` bounds all tries of a read, see `cluster.s3.patience`. A server that
fails as a whole is never taken for bad data.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem, sync
from s3fs import S3FileSystem

from cluster.redaction import without_secrets
from cluster.s3.filesystem import PatientS3FileSystem
from cluster.s3.patience import (
    Waiting,
    ask_again,
    backoff_of,
    budget_of,
    is_transient,
    reporting,
)
from cluster.s3.settings import S3Settings
from pipelines.data.shards.filesystem import data_error
from pipelines.data.shards.schema import QUARANTINE_NAME
from sgmd_core.errors import DataError

_AT_ONCE = 10  # as many as the SDK opens connections, so that no read waits inside its budget
_WITNESS_S = 10.0
NUM_WITNESSES = 8
"""Other objects that are asked for, at most, where one is not served."""

# The file that was read last in each bucket: it shows later whether that is still served.
_read_before: dict[tuple[AbstractFileSystem, str], str] = {}


@dataclass(frozen=True, slots=True)
class Fault:
    """Reason why a file or a row group cannot be used.

    Attributes:
        reason: In words.
        is_unanswered: The server serves others and not this one; asking again costs a budget.
        is_missing: There is no such file.
    """

    reason: str
    is_unanswered: bool = False
    is_missing: bool = False


@dataclass(frozen=True, slots=True)
class Range:
    """Some bytes of a file.

    Attributes:
        path: The file's path in its file system.
        start: First byte.
        stop: Byte after the last one; None reads to the end of the file.
        may_end: The file may be shorter, and gives what it has.
    """

    path: str
    start: int
    stop: int | None
    may_end: bool = False

    @property
    def num_bytes(self) -> int | None:
        """Number of bytes; None where the end of the file decides."""
        return None if self.stop is None or self.may_end else self.stop - self.start


def fetch(
    filesystem: AbstractFileSystem, ranges: Sequence[Range], s3: S3Settings
) -> list[bytes | Fault]:
    """Reads byte ranges side by side.

    Args:
        filesystem: Where the files are.
        ranges: What to read.
        s3: Requests to an S3 server: tries and times.

    Returns:
        For each range its bytes, or why they could not be read: the file is gone, is too short, or
        is not served although another file is.

    Raises:
        DataError: The server failed, or refuses every read.
    """
    answers = _answers_to(filesystem, ranges, s3)
    good = [
        one.path
        for one, answer in zip(ranges, answers, strict=True)
        if answer.is_good and _tells(one.path)
    ]
    _read_before.update({_bucket_of(filesystem, path): path for path in good})
    return [
        _judged(filesystem, wanted, answer, s3)
        for wanted, answer in zip(ranges, answers, strict=True)
    ]


def fetch_file(
    filesystem: AbstractFileSystem,
    path: str,
    s3: S3Settings = S3Settings(),
    most: int | None = None,
) -> bytes | None:
    """Reads a small file whole, as patiently as `fetch`.

    Args:
        filesystem: Where the file is.
        path: Its path in it.
        s3: See `fetch`.
        most: Bytes that are read at most, of a file that may be large; None: all there are.

    Returns:
        Its bytes; None where there is no such file.

    Raises:
        DataError: It cannot be read.
    """
    (answer,) = fetch(filesystem, [Range(path, 0, most, may_end=most is not None)], s3)
    if isinstance(answer, bytes):
        return answer
    if answer.is_missing:
        return None
    raise DataError(
        f"reading {without_secrets(path)}",
        answer.reason,
        "a file that can be read whole",
        "Check the rights to it, or try again later"
        if answer.is_unanswered
        else "If it was damaged, write it again",
    )


def serves_one_of(filesystem: AbstractFileSystem, ranges: Sequence[Range], s3: S3Settings) -> bool:
    """Returns True if at least one of some byte ranges can be read, within a few seconds."""
    quick = replace(s3, read_budget_s=min(_WITNESS_S, s3.read_budget_s))
    return any(answer.is_good for answer in _answers_to(filesystem, ranges, quick))


def _answers_to(
    filesystem: AbstractFileSystem, ranges: Sequence[Range], s3: S3Settings
) -> "list[_Answer]":
    if isinstance(filesystem, AsyncFileSystem):
        return cast("list[_Answer]", sync(filesystem.loop, _read_all, filesystem, ranges, s3))
    return [_read_here(filesystem, wanted, s3) for wanted in ranges]


@dataclass(frozen=True, slots=True)
class _Answer:
    outcome: bytes | Fault | Exception
    tries: int

    @property
    def is_good(self) -> bool:
        return isinstance(self.outcome, bytes)


def _judged(
    filesystem: AbstractFileSystem, wanted: Range, answer: _Answer, s3: S3Settings
) -> bytes | Fault:
    error = answer.outcome
    if not isinstance(error, Exception):
        return error
    known = _read_before.get(_bucket_of(filesystem, wanted.path), wanted.path)
    before = [Range(known, 0, 1)] if known != wanted.path else []
    if serves_one_of(filesystem, before, s3) or serves_one_of(
        filesystem, [Range(path, 0, 1) for path in _beside(filesystem, wanted.path)], s3
    ):
        return Fault(f"not served, while others are ({words_of(error)})", is_unanswered=True)
    attempted = f"reading {wanted.path} (try {answer.tries})"
    raise data_error(attempted, error) from error


def _bucket_of(filesystem: AbstractFileSystem, path: str) -> tuple[AbstractFileSystem, str]:
    """Rights are given by bucket; a local file system is one."""
    return filesystem, path.partition("/")[0]


def _beside(filesystem: AbstractFileSystem, path: str) -> list[str]:
    """Some files that lie beside a file."""
    if not isinstance(filesystem, S3FileSystem):
        return []
    bucket, key, _ = filesystem.split_path(path)
    folder = f"{key.rpartition('/')[0]}/".lstrip("/")
    request = {"Bucket": bucket, "Prefix": folder, "MaxKeys": NUM_WITNESSES}
    try:
        ask = filesystem._call_s3
        page = cast(
            "dict[str, Any]",
            sync(filesystem.loop, ask, "list_objects_v2", timeout=_WITNESS_S, **request),
        )
    except Exception:  # A server that does not even list has failed as a whole.
        return []
    found = [f"{bucket}/{entry['Key']}" for entry in page.get("Contents", []) if entry["Size"]]
    return [one for one in found if one != path and _tells(one)]


def _tells(path: str) -> bool:
    """Returns False for files that we write beside data: keys may read them and not the data."""
    name = path.rpartition("/")[2]
    return not name.startswith(("_", ".")) and name != QUARANTINE_NAME


async def _read_all(
    filesystem: AsyncFileSystem, ranges: Sequence[Range], s3: S3Settings
) -> list[_Answer]:
    slots = asyncio.Semaphore(_AT_ONCE)
    waiting: dict[int, Waiting] = {}

    async def read(number: int, wanted: Range) -> _Answer:
        async with slots:
            budget_s = budget_of(wanted.num_bytes, s3)
            waiting[number] = Waiting(f"reading {wanted.path}", budget_s)
            try:
                return await _read_one(filesystem, wanted, s3, budget_s)
            finally:
                del waiting[number]

    async with reporting(waiting, s3):
        return await asyncio.gather(*(read(*pair) for pair in enumerate(ranges)))


async def _read_one(
    filesystem: AsyncFileSystem, wanted: Range, s3: S3Settings, budget_s: float
) -> _Answer:
    answer, tries = await ask_again(
        lambda: _ask(filesystem, wanted.path, wanted.start, wanted.stop), s3, budget_s
    )
    return _Answer(_outcome(wanted, answer), tries)


async def _ask(filesystem: AsyncFileSystem, path: str, start: int, stop: int | None) -> bytes:
    """One request, without the patience that the file system may have of its own."""
    if isinstance(filesystem, PatientS3FileSystem):
        return await filesystem.cat_once(path, start, stop)
    return cast("bytes", await filesystem._cat_file(path, start=start, end=stop))


def _read_here(filesystem: AbstractFileSystem, wanted: Range, s3: S3Settings) -> _Answer:
    """As `_read_one`, of files that only block; a single read cannot be cut short."""
    end = time.monotonic() + budget_of(wanted.num_bytes, s3)
    for tries in range(1, s3.read_attempts + 1):
        try:
            outcome = _outcome(
                wanted, filesystem.cat_file(wanted.path, start=wanted.start, end=wanted.stop)
            )
        except Exception as error:
            outcome = _outcome(wanted, error)
        is_over = tries == s3.read_attempts or time.monotonic() >= end
        if not isinstance(outcome, Exception) or not is_transient(outcome) or is_over:
            return _Answer(outcome, tries)
        time.sleep(backoff_of(tries, s3))
    raise AssertionError("unreachable: the last try returns")


def _outcome(wanted: Range, answer: Any) -> bytes | Fault | Exception:  # noqa: ANN401
    """Returns the outcome of a request; an exception that calls for another try, or for the end."""
    if isinstance(answer, FileNotFoundError):
        return Fault("the file is not there (any more)", is_missing=True)
    if isinstance(answer, Exception):
        again = is_transient(answer) or isinstance(answer, PermissionError)
        return answer if again else Fault(words_of(answer))
    if wanted.num_bytes not in (None, len(answer)):
        return Fault(f"the file ends {wanted.num_bytes - len(answer)} bytes too early")
    return bytes(answer)


def words_of(error: Exception) -> str:
    """Type and first line of an error, without keys."""
    text = str(error).strip()
    return without_secrets(f"{type(error).__name__}: {text.splitlines()[0] if text else ''}")
