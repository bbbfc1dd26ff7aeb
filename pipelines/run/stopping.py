"""Stops of a run that are asked for from outside: Ctrl-C, SIGTERM, SIGUSR1, SIGHUP.

    while roles are started    the run ends at once: there is nothing to save
    while it trains            the iteration is finished, its state saved, `best/` written
                               after a limit, the iteration is given up
    while it is finished       the run ends at once: its last state is saved
    while it closes            nothing changes: its result or its error stands
    a second signal            ends the process at once, without clean-up

Ray (`ray job stop`), Slurm and Kubernetes announce the end of a job with SIGTERM, Slurm's --signal
with the one that it names, such as SIGUSR1, and a terminal that is closed with SIGHUP. Some send a
signal to a process and again to its group (`timeout`): the same one within an instant counts once.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

from sgmd_core.errors import StopRequestedError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
TWICE_S = 0.3
"""Signals of one kind that come closer together are one."""
_SHOW_CURSOR = "\x1b[?25h"
_STDERR = 2
_IMPORTLIB = "<frozen importlib."

T = TypeVar("T")


class StopNow(BaseException):
    """Raised in the main thread where a stop waits for nothing; no error, so nobody keeps it."""


class StopRequests:
    """Remembers that a stop was asked for.

    Args:
        tell: Called with one sentence when a stop is asked for.
        stop_after_s: How long after that an iteration is waited for.

    Attributes:
        received: Name of the signal, such as SIGTERM; empty until one has come.
        broke_off: True once the stop has broken off what was under way.
    """

    def __init__(
        self, tell: Callable[[str], None] = lambda words: None, stop_after_s: float = 300.0
    ) -> None:
        self.received = ""
        self.broke_off = False
        self._tell = tell
        self._stop_after_s = stop_after_s
        self._first_s = 0.0
        self._finishes = False
        self._is_over = False
        self._waits = False
        self._is_late = False

    @contextmanager
    def ending_in(self, error: Callable[[], StopRequestedError]) -> Iterator[None]:
        """Raises an error where a stop breaks off what is inside.

        A library that is broken off anywhere, such as between two of torch's modes, may raise an
        error of its own instead: that is still the stop.

        Args:
            error: Returns what to raise.
        """
        try:
            yield
        except StopRequestedError:
            raise
        except StopNow:
            raise error() from None
        except Exception as broken:
            if not self.broke_off:
                raise
            raise error() from broken

    @contextmanager
    def finishing_iterations(self) -> Iterator[None]:
        """A stop inside is remembered, and ends only an iteration that takes too long.

        Raises:
            StopNow: A stop has come before, and a library has swallowed it.
        """
        if self.broke_off:
            raise StopNow
        self._finishes = True
        try:
            yield
        finally:
            self._finishes = False
            self._set_timer(0.0)

    def end(self) -> None:
        """A stop from here on is only reported: the run has its result or its error, and closes."""
        self._is_over = True

    def require_time(self) -> None:
        """Checks, between two calls of an iteration, that it has time left after a stop.

        Raises:
            StopNow: A stop was asked for longer ago than the limit.
        """
        if self._is_late:
            raise StopNow

    def bounded(self, items: Iterator[T], *, interrupts: bool) -> Iterator[T]:
        """Passes items on.

        Args:
            items: Each takes its time.
            interrupts: Whether waiting for one may be broken off anywhere; else only where
                `require_time` is called.

        Raises:
            StopNow: A stop was asked for, and the next item takes longer than the limit.
        """
        while True:
            self._waits = interrupts
            try:
                self.require_time()
                item = next(items)
            except StopIteration:
                return
            finally:
                self._waits = False
            yield item

    def error(self, attempted: str, state: str, remedy: str) -> StopRequestedError:
        """The error that ends a run which was asked to stop.

        Args:
            attempted: Activity that was stopped: "training tiny".
            state: What is saved.
            remedy: How to go on.
        """
        return StopRequestedError(attempted, f"stopped by {self.received}; {state}", remedy=remedy)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Asks the run to stop after its iteration; a second signal ends the process at once."""
        now_s = time.monotonic()
        name = signal.Signals(number).name
        if self.received:
            if name == self.received and now_s - self._first_s < TWICE_S:
                return
            # Ends at once, as promised: without clean-up, which might wait.
            say_last(f"{name} again: ended at once. What was saved before is kept.")
            os._exit(128 + number)
        self.received, self._first_s = name, now_s
        if self._is_over:
            self._tell(f"{name}: closing; once more ends the process at once")
            return
        if not self._finishes:
            self.broke_off = True
            raise_after_imports(StopNow(), frame)
            return
        self._set_timer(self._stop_after_s)
        self._tell(
            f"{self.received}: finishing this iteration and saving its state; "
            "once more ends the process at once"
        )

    def give_up(self, number: int, frame: FrameType | None) -> None:
        """Handles the end of the time that an iteration has after a stop."""
        self._is_late = True
        if self._waits:
            self.broke_off = True
            raise StopNow

    def _set_timer(self, seconds: float) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.setitimer(signal.ITIMER_REAL, seconds)


@contextmanager
def stop_requests(
    tell: Callable[[str], None], stop_after_s: float = 300.0
) -> Iterator[StopRequests]:
    """Takes the signals that ask for a stop; elsewhere than in the main thread, takes none.

    A signal that the process was started to ignore, as `nohup` does with SIGHUP, stays ignored.
    Blocks may lie in one another: the outer one remembers a stop that the inner one was asked for.

    Args:
        tell: Called with one sentence when a stop is asked for while the run trains.
        stop_after_s: How long after that an iteration is waited for.
    """
    requests = StopRequests(tell, stop_after_s)
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    before: dict[int, Any] = {
        number: signal.signal(number, requests.handle)
        for number in STOP_SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, requests.give_up)
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if isinstance(outer := getattr(before.get(signal.SIGTERM), "__self__", None), StopRequests):
            # It has the signal from here on, also where the run inside has closed in spite of it.
            outer.received = outer.received or requests.received


def outermost_import(frame: FrameType | None) -> FrameType | None:
    """The import in which a frame is, and which is in no other one; None where it is in none.

    The frame before it is that of the code which imports.
    """
    outermost = None
    while frame is not None:
        if frame.f_code.co_filename.startswith(_IMPORTLIB):
            outermost = frame
        frame = frame.f_back
    return outermost


def raise_after_imports(stop: BaseException, frame: FrameType | None) -> None:
    """Raises in a handler of signals; during imports, once the outermost of them is over.

    A library that is broken off there is half loaded, and some take what is raised for the absence
    of an optional part, as torch does with numpy. Imports take seconds at most.

    Args:
        stop: What to raise.
        frame: Where the main thread is.
    """
    outermost = outermost_import(frame)
    if outermost is None:
        raise stop

    def raise_at_its_end(current: FrameType, event: str, value: object) -> None:
        if current is outermost and event == "return":
            sys.setprofile(None)
            raise stop

    sys.setprofile(raise_at_its_end)


def say_last(words: str) -> None:
    """Writes a line past all buffers, and shows the cursor, which progress bars hide."""
    with suppress(OSError):
        shown = _SHOW_CURSOR if os.isatty(_STDERR) else ""
        os.write(_STDERR, f"{shown}\n{words}\n".encode())
