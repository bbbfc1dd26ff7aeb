"""Stops of a run that are asked for from outside: Ctrl-C, SIGTERM, and a Ray cluster that is lost.

    first SIGINT or SIGTERM    the iteration is finished, its state saved, the run ends
    second                     the process ends at once

Ray, Slurm and Kubernetes announce a preemption with SIGTERM.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from sgmd_core.errors import StopRequestedError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequests:
    """Remembers that a stop was asked for.

    Attributes:
        received: Name of the signal, SIGINT or SIGTERM; empty until one has come.
    """

    def __init__(self) -> None:
        self.received = ""

    def error(self, name: str, state: str, run: str) -> StopRequestedError:
        """The error that ends a run whose state has been saved.

        Args:
            name: Name of the run.
            state: Folder of the saved state.
            run: Folder of the run.
        """
        return StopRequestedError(
            f"training {name}",
            f"stopped by {self.received}; the state is {state}",
            remedy=f"Go on with --resume {run}",
        )


@contextmanager
def stop_requests(tell: Callable[[str], None]) -> Iterator[StopRequests]:
    """Takes SIGINT and SIGTERM while a run trains; elsewhere than in the main thread, takes none.

    Enter it after Ray has been started: Ray installs a handler of its own, which ends the process.

    Args:
        tell: Hears one sentence when a stop is asked for.
    """
    requests = StopRequests()
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if requests.received:
            # Ends at once, as promised: without clean-up, which might wait.
            os._exit(128 + number)
        requests.received = signal.Signals(number).name
        tell(
            f"{requests.received}: finishing this iteration and saving its state; "
            "once more ends the process at once"
        )

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
