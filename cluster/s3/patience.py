"""Requests that are repeated, reported and given up within one budget of time.

    request -> answer | transient error -> again, later -> ... -> the budget is spent

Retries do not multiply: the SDK repeats a request, `ask_again` repeats what broke off in the middle
of its answer, and the budget bounds all of it together.
"""

import asyncio
import errno
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from aiohttp import ClientPayloadError
from botocore import exceptions as boto

from cluster.redaction import without_secrets
from cluster.s3.refusals import asks_for_fewer_requests
from cluster.s3.settings import S3Settings

T = TypeVar("T")

_TRANSIENT_NUMBERS = (
    errno.EBUSY,
    errno.EIO,
    errno.EREMOTEIO,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ESTALE,
)
_MAX_BACKOFF_S = 30.0
_BYTES_PER_S = 2**20  # a large answer is given more time than a small one
_REPORTS = 4  # what takes long is reported at each quarter of its budget

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request under way.

    Attributes:
        what: What is waited for, such as "reading clips/a.mp4".
        budget_s: Time that all of its tries may take together.
        since_s: When it began, by the monotonic clock.
    """

    what: str
    budget_s: float
    since_s: float = field(default_factory=time.monotonic)


def budget_of(num_bytes: int | None, settings: S3Settings) -> float:
    """Returns the seconds that all tries of a request for some bytes may take together."""
    return settings.read_budget_s + (num_bytes or 0) / _BYTES_PER_S


def backoff_of(tries: int, settings: S3Settings) -> float:
    """Returns the seconds to wait after a number of tries."""
    return min(settings.backoff_s * 2 ** (tries - 1), _MAX_BACKOFF_S)


def is_busy(error: Exception) -> bool:
    """True if the server asks for fewer requests, which passes: it is there."""
    is_numbered = isinstance(error, OSError) and error.errno == errno.EBUSY
    return is_numbered or asks_for_fewer_requests(error)


async def ask_again(
    request: Callable[[], Awaitable[T]],
    settings: S3Settings,
    budget_s: float,
    passes: Callable[[Exception], bool] | None = None,
) -> tuple[T | Exception, int]:
    """Repeats a request until it is answered, fails for good, or its tries or time are spent.

    Args:
        request: Asks once.
        settings: Tries, and the pauses between them.
        budget_s: Time of all tries together.
        passes: True for an error after which to ask again; None: for all that are transient.

    Returns:
        The answer or the last error, and the number of tries.
    """
    end = time.monotonic() + budget_s
    error: Exception = _too_late(budget_s)
    tries = 0
    while tries < settings.read_attempts and time.monotonic() < end:
        tries += 1
        try:
            async with asyncio.timeout(end - time.monotonic()):
                return await request(), tries
        except Exception as found:
            is_late = isinstance(found, TimeoutError) and time.monotonic() >= end
            error = _too_late(budget_s) if is_late else found
        if not (passes or is_transient)(error) or tries == settings.read_attempts:
            break
        await asyncio.sleep(max(0.0, min(backoff_of(tries, settings), end - time.monotonic())))
    return error, tries


async def ask_once(request: Callable[[], Awaitable[T]], budget_s: float) -> T:
    """Waits for a request that something else repeats.

    Raises:
        ConnectionError: It took longer than its budget.
    """
    end = time.monotonic() + budget_s
    try:
        async with asyncio.timeout(budget_s):
            return await request()
    except TimeoutError as error:
        if time.monotonic() < end:
            raise
        raise _too_late(budget_s) from error


def _too_late(budget_s: float) -> ConnectionError:
    # fsspec replaces a TimeoutError by one of its own, without these words.
    return ConnectionError(f"no whole answer in {budget_s:.3g} s")


@asynccontextmanager
async def reporting(waiting: Mapping[int, Waiting], settings: S3Settings) -> AsyncIterator[None]:
    """Logs at each quarter of the budget what is still waited for.

    Args:
        waiting: The requests under way; may change meanwhile.
        settings: With the budget.
    """
    reporter = asyncio.ensure_future(_report(waiting, settings.read_budget_s / _REPORTS))
    try:
        yield
    finally:
        reporter.cancel()


async def _report(waiting: Mapping[int, Waiting], pause_s: float) -> None:
    while True:
        await asyncio.sleep(pause_s)
        now = time.monotonic()
        late = [one for one in waiting.values() if now - one.since_s > pause_s / 2]
        if late:
            first = min(late, key=lambda one: one.since_s)
            others = f" and {len(late) - 1} more" if len(late) > 1 else ""
            _log.warning(
                "still %s%s, %.0f s of %.0f s",
                without_secrets(first.what),
                others,
                now - first.since_s,
                first.budget_s,
            )


def is_transient(error: BaseException) -> bool:
    """Returns True if a server may answer the same request well a moment later.

    Broken data raise an error of Arrow, a missing file FileNotFoundError, wrong keys
    PermissionError; none of them gets better by waiting.
    """
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
        return False
    if isinstance(error, boto.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status == 429
    if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError)):
        return False
    if isinstance(error, (boto.BotoCoreError, ClientPayloadError, TimeoutError, ConnectionError)):
        return True
    # s3fs turns 5xx and SlowDown into plain OSErrors with a number.
    return isinstance(error, OSError) and error.errno in _TRANSIENT_NUMBERS
