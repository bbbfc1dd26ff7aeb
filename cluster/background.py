"""Work in a thread beside a block of code, until the block is left."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def in_background(name: str, work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Runs work in a daemon thread.

    Args:
        name: Name of the thread.
        work: Returns soon after the event that it is given is set: the block has been left.
    """
    over = threading.Event()
    threading.Thread(target=work, args=(over,), name=name, daemon=True).start()
    try:
        yield
    finally:
        over.set()
