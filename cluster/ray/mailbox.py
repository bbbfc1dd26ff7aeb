"""Mailbox of a process: receives messages of the processes that Ray has started for it.

    with open_mailbox(hear) as name:    an actor beside this process
        ... post(name, letter)          in any process of the cluster

Letters of one process come in the order in which they were sent.
"""

import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_log = logging.getLogger(__name__)

_NAMESPACE = "sgmd-mailboxes"
_POLL_S = 0.2
_ANSWER_S = 30.0


class _Mailbox:
    def __init__(self) -> None:
        self._letters: list[Any] = []

    def put(self, letter: Any) -> None:  # noqa: ANN401 - anything that travels
        """Takes a letter in."""
        self._letters.append(letter)

    def take(self) -> list[Any]:
        """All letters since the last time."""
        taken, self._letters = self._letters, []
        return taken


@contextmanager
def open_mailbox(hear: Callable[[Any], None]) -> Iterator[str]:
    """Yields the name of a new mailbox; Ray must be connected.

    Args:
        hear: Called with every letter, in a thread of its own; with the last ones before the end.
    """
    name = f"mailbox-{secrets.token_hex(8)}"
    here = ray.get_runtime_context().get_node_id()
    box = (
        cast(Any, ray.remote)(_Mailbox)
        .options(
            name=name,
            namespace=_NAMESPACE,
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True),
        )
        .remote()
    )
    over = threading.Event()
    reader = threading.Thread(target=_read, args=(box, hear, over), name=name, daemon=True)
    reader.start()
    try:
        yield name
    finally:
        over.set()
        reader.join()
        ray.kill(box)


def _read(box: Any, hear: Callable[[Any], None], over: threading.Event) -> None:  # noqa: ANN401
    is_last = False
    while True:
        try:
            letters = ray.get(box.take.remote(), timeout=_ANSWER_S)
        except RayError as error:
            _log.warning(
                "Progress is not reported any longer, because its mailbox is lost: %s", error
            )
            return
        for letter in letters:
            hear(letter)
        if is_last:
            return
        # After the end is announced, look once more for letters that came just before it.
        is_last = over.wait(_POLL_S)


def post(name: str, letter: Any) -> None:  # noqa: ANN401 - anything that travels
    """Puts a letter into a mailbox; one that is gone takes none, and the sender goes on.

    Args:
        name: Of the mailbox.
        letter: Anything that travels between processes.
    """
    try:
        box = cast(Any, ray.get_actor(name, namespace=_NAMESPACE))
        ray.get(box.put.remote(letter), timeout=_ANSWER_S)
    except (RayError, ValueError) as error:
        _log.warning("A line of progress is lost: %s", error)
