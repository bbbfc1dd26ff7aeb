"""Stops of a command that are asked for from outside: Ctrl-C, SIGTERM, SIGUSR1, SIGHUP.

    while the command line loads    ends the process at once: nothing has begun
    while a command loads           ends the process at once: a module of commands imports before it
                                    begins, or after its work, which is kept
    while a library is imported     `KeyboardInterrupt`, once the import is over
    else                            `KeyboardInterrupt`, where the command is
    while the interpreter ends      ends the process at once: the command's exit code stands
    a second signal                 ends the process at once, without clean-up

A library that is broken off may still fail in words of its own, so whatever error ends a command
after a stop is that stop. Where a run takes the signals itself: `pipelines.run.stopping`. This is
loaded before all else, and imports nothing heavy.
"""

import atexit
import io
import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from pipelines.run.stopping import (
    STOP_SIGNALS,
    TWICE_S,
    outermost_import,
    raise_after_imports,
    say_last,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_COMMANDS = Path(__file__).parent
_STDERR = 2


class CommandStops:
    """Remembers the signal that asked a command to stop.

    Attributes:
        received: Its number; 0 until one has come.
        is_working: False where a signal may end the process at once.
        exit_code: Code of the command once it has ended.
    """

    def __init__(self) -> None:
        self.received = 0
        self.is_working = False
        self.exit_code: int | None = None
        self._first_s = 0.0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Interrupts the command; a second signal, or one without work, ends the process."""
        now_s, name = time.monotonic(), signal.Signals(number).name
        if number == self.received and now_s - self._first_s < TWICE_S:
            return
        if self.exit_code is not None:
            _end(self.exit_code)
        if self.received or not self.is_working or _loads(frame):
            again = f"{name} again: ended at once. What was written before is kept."
            # A module may also load once the work is done.
            first = f"Stopped by {name}" + ("." if self.is_working else ": nothing has begun.")
            say_last(again if self.received else first)
            _end(128 + number)
        self.received, self._first_s = number, now_s
        raise_after_imports(KeyboardInterrupt(), frame)


def take_stops() -> CommandStops:
    """Takes the signals until the process ends; elsewhere than in the main thread, takes none.

    A signal that the process was started to ignore, as `nohup` does with SIGHUP, stays ignored.
    """
    stops = CommandStops()
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, stops.handle)
    return stops


def hold_standard_files() -> None:
    """Opens those of standard input, output and error that the process was started without.

    The next file that is opened would take their place, and what libraries print would go there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


class _Messages(io.FileIO):
    """Standard error, of which every write succeeds."""

    def write(self, data: "ReadableBuffer", /) -> int:
        """Writes all of it, or as much as is taken: the rest is lost."""
        size = memoryview(data).nbytes
        with suppress(OSError):
            super().write(data)
        return size


def hold_messages() -> None:
    """Lets the process go on where its standard error takes nothing any more.

    Progress and errors go there, and whoever reads them may end first: Ctrl-C also ends the `tee`
    of a pipeline, a closed terminal refuses what comes after its SIGHUP, the disk of a log may be
    full. The state of a run still has to be saved then, and the exit code has to stand.
    """
    old = sys.stderr
    with suppress(OSError):
        old.flush()
    buffer = io.BufferedWriter(_Messages(_STDERR, "w", closefd=False))
    sys.stderr = io.TextIOWrapper(
        buffer, encoding=old.encoding, errors=old.errors, line_buffering=True
    )


def _loads(frame: FrameType | None) -> bool:
    """Returns True while a module of this package imports."""
    outermost = outermost_import(frame)
    importer = None if outermost is None else outermost.f_back
    return importer is not None and Path(importer.f_code.co_filename).parent == _COMMANDS


def leave_process(code: int, *, is_whole: bool = True) -> NoReturn:
    """Ends the process once its command is done, without the end of the interpreter.

    There, threads in C++ of Ray, gRPC and others may run on into what is already gone, and end a
    command that has succeeded with a crash (SIGSEGV seen with Ray 2.60). As at that end, threads
    that are not daemons are waited for, and then what was registered to run at the end is run.

    Args:
        code: The exit code; 1 in place of 0 if the result cannot be written.
        is_whole: False if the command was broken off: then no thread is waited for.
    """
    # Of a command that was broken off, they would be waited for.
    for process in multiprocessing.active_children():
        process.terminate()
    # The one way to run these two without the rest.
    if is_whole:
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        pass  # Whoever reads has enough.
    except OSError as error:
        say_last(f"The result cannot be written to standard output: {error}")
        code = code or 1
    _end(code)


def _end(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        # A pipe that nobody reads, or a stream that the signal has found in the midst of a write.
        with suppress(OSError, ValueError, RuntimeError, AttributeError):
            stream.flush()
    os._exit(code)
