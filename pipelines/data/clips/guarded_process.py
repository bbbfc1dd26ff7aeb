"""A process that decodes for this one, and may be lost: to a crash, or to a decoder that hangs.

    apply(function, item, ...) -> the other process, watched by `hang_guard` -> result | Died

The process is started when it is first needed and again when it has ended; nothing else of this
process is lost with it. It loads what the function needs and no more.
"""

import atexit
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from threading import Lock
from typing import Any, Generic, TypeVar, cast

from pipelines.data.clips.clip_errors import ClipFault
from pipelines.data.clips.hang_guard import HANG_SIGNAL, end_on_hang, guarded
from sgmd_core.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

_START = "import sys; from pipelines.data.clips import guarded_process as g; g.serve(*sys.argv[1:])"
_END_S = 10.0


@dataclass(frozen=True, slots=True)
class Died(Generic[Item]):
    """Stands for the result of an item that ended the process that worked on it.

    Attributes:
        item: The item: the function's first argument.
        hung: The process was ended because a call of the decoder did not return.
    """

    item: Item
    hung: bool = False

    @property
    def reason(self) -> str:
        """Reason of a rejection."""
        # The process that decodes imports this file too, and has no use for Arrow.
        from pipelines.data.shards.rejection import Reason

        return ClipFault.TOO_SLOW if self.hung else Reason.WORKER_DIED

    @property
    def in_words(self) -> str:
        """The end of the process, in one line."""
        if self.hung:
            return (
                "a call of the decoder did not return in time (max_hang_s, --max-hang-seconds),"
                " twice"
            )
        return "the process that worked on it ended without a word, twice"


class ProcessStartError(DataError):
    """A process that decodes does not start, which is not a fault of the data."""


class GuardedProcess:
    """Applies functions in one process of its own, one after another.

    Args:
        max_hang_s: Time that one call of the decoder may take; 0: no limit.
        tries: An item that has ended the process so often is not tried again.
    """

    def __init__(self, max_hang_s: float, tries: int = 2) -> None:
        self._max_hang_s = max_hang_s
        self._tries = tries
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def apply(
        self, function: Callable[..., Result], item: Item, *arguments: object
    ) -> Result | Died[Item]:
        """Applies a function; its errors are raised here.

        Args:
            function: Of a module that the other process can import.
            item: Its first argument.
            arguments: Its further arguments.

        Raises:
            ProcessStartError: The process does not start.
        """
        hung = False
        with self._lock:
            for _ in range(self._tries):
                connection = self._started()
                try:
                    connection.send((function, (item, *arguments)))
                    is_good, answer = connection.recv()
                except (EOFError, OSError):
                    hung = self._ended()
                    continue
                except BaseException:
                    # An answer that nobody took would be taken for the next item's.
                    self._kill()
                    raise
                if is_good:
                    return cast("Result", answer)
                raise answer
        return Died(item, hung)

    def close(self) -> None:
        """Ends the process; harmless when repeated."""
        with self._lock:
            self._kill()

    def _started(self) -> Connection:
        if self._process is not None and self._process.poll() is None:
            assert self._connection is not None
            return self._connection
        self._kill()
        ours, theirs = Pipe()
        # Not by multiprocessing: it would load whatever the main module of this process loads.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, str(theirs.fileno()), str(self._max_hang_s)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._connection = ours
        try:
            ours.recv()
        except (EOFError, OSError) as error:
            code = self._process.wait()
            self._kill()
            raise ProcessStartError(
                "starting a process that decodes videos",
                f"it ended with exit code {code}",
                "a process that imports the decoder",
                "Standard error says why it ended; is there memory for one more process?",
            ) from error
        return ours

    def _ended(self) -> bool:
        """Waits for the end of a process that no longer answers; True if its decoder hung."""
        assert self._process is not None
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            code = 0
        self._kill()
        return code == -HANG_SIGNAL

    def _kill(self) -> None:
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            connection.close()
        if process is not None:
            process.kill()
            process.wait()


@lru_cache(maxsize=4)
def decoding_process(max_hang_s: float) -> GuardedProcess:
    """The process that decodes for this one; it ends with this one."""
    process = GuardedProcess(max_hang_s)
    atexit.register(process.close)
    return process


def serve(handle: str, max_hang_s: str) -> None:
    """Main function of the other process; returns when the caller has gone.

    Args:
        handle: File descriptor of the connection.
        max_hang_s: Time that one call of the decoder may take; 0: no limit.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, which then goes.
    end_on_hang(float(max_hang_s))
    connection = Connection(int(handle))
    try:
        connection.send("ready")
        while True:
            function, arguments = connection.recv()
            _send(connection, *_answer(function, arguments))
    except (EOFError, OSError):
        return


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    try:
        with guarded():
            return True, function(*arguments)
    except Exception as error:  # A broken file raises whatever its codec thinks of it.
        return False, _portable(error)


def _send(connection: Connection, is_good: bool, answer: Any) -> None:  # noqa: ANN401
    """Sends an answer; says so of a result that cannot be sent, which is not a death."""
    try:
        connection.send((is_good, answer))
    except OSError:
        raise
    except Exception as error:  # Nothing has been sent: a value is pickled whole before.
        words = f"a result ({type(answer).__name__}) that cannot be sent to another process"
        connection.send((False, RuntimeError(f"{words}: {type(error).__name__}: {error}")))


def _portable(error: Exception) -> Exception:
    """The error, or its words where it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # Whatever a class of errors does while it is made.
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
