"""Ends a worker process whose decoder hangs.

    guarded() -> [a call of FFmpeg] -> progress() -> [a call of FFmpeg] -> ... -> end
                  longer than the limit -> the kernel ends the process (SIGALRM)

A bound that Python checks between frames is of no use where one call never returns. Only processes
that were made to be lost are ended, see `end_on_hang`; elsewhere nothing happens.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from sgmd_core.errors import ConfigError

MAX_HANG_S = 60.0
"""No call of FFmpeg takes a tenth of this with the largest pictures that are allowed."""

_LONGEST_HANG_S = 86400.0

HANG_SIGNAL = signal.SIGALRM

_limit_s = 0.0


def require_hang_limit(limit_s: float) -> None:
    """Checks a limit.

    Raises:
        ConfigError: It is not a time that a timer takes.
    """
    if not 0 <= limit_s <= _LONGEST_HANG_S:
        raise ConfigError(
            "watching the decoder",
            f"a limit of {limit_s:g} s (--max-hang-seconds)",
            f"0, which sets no limit, to {_LONGEST_HANG_S:g}",
        )


def end_on_hang(limit_s: float) -> None:
    """Lets the kernel end this process when one call takes longer; 0 never does.

    Args:
        limit_s: Seconds of one call.
    """
    global _limit_s
    # The default action needs no interpreter, which a hanging call may hold.
    signal.signal(HANG_SIGNAL, signal.SIG_DFL)
    _limit_s = limit_s


@contextmanager
def guarded() -> Iterator[None]:
    """Watches the calls of a block, each up to the next `progress`."""
    progress()
    try:
        yield
    finally:
        relax()


def progress() -> None:
    """Restarts the time: the call before has returned."""
    if _limit_s:
        signal.setitimer(signal.ITIMER_REAL, _limit_s)


def relax() -> None:
    """Stops the time: no decoder is at work."""
    if _limit_s:
        signal.setitimer(signal.ITIMER_REAL, 0)
