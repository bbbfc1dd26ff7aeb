"""One function over many items, in processes of their own, with the results in order.

Processes and not threads: a video that crashes FFmpeg ends its process, and a process gives back
all memory. When one dies, the items that were on their way are tried again one by one; the item
that ends a process again is the culprit, and the others come through.
"""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_WAITING_PER_PROCESS = 2


@dataclass(frozen=True, slots=True)
class Died(Generic[Item]):
    """Stands for the result of an item that ended the process that worked on it."""

    item: Item


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], num_processes: int
) -> Iterator[Result | Died[Item]]:
    """Applies a function to items as they come.

    At most two items a process are under way, so the memory in use does not depend on how many
    items there are.

    Args:
        function: Defined in a module, so that another process finds it; without side effects,
            because it may run twice.
        items: Taken from as places become free.
        num_processes: 0 works in this process, without the protection.

    Yields:
        The results, in the order of the items; errors of the function are raised here.
    """
    if num_processes == 0:
        yield from map(function, items)
        return
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    source = iter(items)
    executor = _executor(num_processes)
    try:
        while True:
            while len(waiting) < _WAITING_PER_PROCESS * num_processes:
                try:
                    item = next(source)
                except StopIteration:
                    break
                waiting.append((item, _submit(executor, function, item)))
            if not waiting:
                return
            item, future = waiting.popleft()
            try:
                yield future.result()
            except BrokenProcessPool:
                executor.shutdown(wait=True)
                yield from _one_by_one(function, [item, *(item for item, _ in waiting)])
                waiting.clear()
                executor = _executor(num_processes)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _submit(
    executor: ProcessPoolExecutor, function: Callable[[Item], Result], item: Item
) -> Future[Result]:
    try:
        return executor.submit(function, item)
    except BrokenProcessPool as error:
        # It broke a moment ago; the oldest item under way will tell.
        failed: Future[Result] = Future()
        failed.set_exception(error)
        return failed


def _one_by_one(
    function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result | Died[Item]]:
    executor = _executor(1)
    try:
        for item in items:
            try:
                yield executor.submit(function, item).result()
            except BrokenProcessPool:
                executor.shutdown(wait=True)
                executor = _executor(1)
                yield Died(item)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _executor(num_processes: int) -> ProcessPoolExecutor:
    # Forking a process that has threads, as those of S3 clients, may hang the child.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num_processes, mp_context=context, initializer=_die_with_parent)


def _die_with_parent() -> None:
    """A process whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in the processes of a pool"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
