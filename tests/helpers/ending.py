"""Ends a process of tests without clearing what it holds.

Clearing takes four seconds of a core, object by object, for what the system clears anyway. Python
calls last what is registered first, so this module is imported before any that registers something
for the end of a process: `multiprocessing` removes its folders, and temporary folders go.
"""

import atexit
import os

_processes = set[int]()


def end_without_clearing() -> None:
    """Has this process end with exit code 0 as soon as all that is registered has been called.

    Processes that are forked from it, and those that it starts, end as usual.
    """
    _processes.add(os.getpid())


def _end() -> None:
    if os.getpid() in _processes:
        os._exit(0)


atexit.register(_end)
