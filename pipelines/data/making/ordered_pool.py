"""One function over many items, in processes of their own, with the results in order.

Processes and not threads: a video that crashes FFmpeg ends its process, and a process gives back
all memory. When one dies, the items that were on their way are tried again one by one; the item
that ends a process again is the culprit, and the others come through. A decoder that hangs ends its
process too, see `pipelines.data.clips.hang_guard`.
"""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from cluster.inventory import num_cores
from pipelines.data.clips.guarded_process import Died, GuardedProcess
from pipelines.data.clips.hang_guard import MAX_HANG_S, end_on_hang, relax, require_hang_limit

Item = TypeVar("Item")
Result = TypeVar("Result")

_WAITING_PER_PROCESS = 2


def map_in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    num_processes: int | None,
    max_hang_s: float = MAX_HANG_S,
) -> Iterator[Result | Died[Item]]:
    """Applies a function to items as they come.

    At most two items a process are under way, so the memory in use does not depend on how many
    items there are.

    Args:
        function: Defined in a module, so that another process finds it; without side effects,
            because it may run twice.
        items: Taken from as places become free.
        num_processes: None takes all cores; 0 works in this process, without the protection.
        max_hang_s: Time that one call of the decoder may take; 0: no limit.

    Yields:
        The results, in the order of the items; errors of the function are raised here.

    Raises:
        ConfigError: `max_hang_s` is not such a time.
    """
    require_hang_limit(max_hang_s)
    if num_processes is None:
        num_processes = num_cores()
    if num_processes == 0:
        yield from map(function, items)
        return
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    source = iter(items)
    executor = _executor(num_processes, max_hang_s)
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
                yield from _one_by_one(function, [item, *(item for item, _ in waiting)], max_hang_s)
                waiting.clear()
                executor = _executor(num_processes, max_hang_s)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _submit(
    executor: ProcessPoolExecutor, function: Callable[[Item], Result], item: Item
) -> Future[Result]:
    try:
        return executor.submit(_apply, function, item)
    except BrokenProcessPool as error:
        # It broke a moment ago; the oldest item under way will tell.
        failed: Future[Result] = Future()
        failed.set_exception(error)
        return failed


def _apply(function: Callable[[Item], Result], item: Item) -> Result:
    try:
        return function(item)
    finally:
        relax()  # A generator of frames that nobody has closed yet would still be watched.


def _one_by_one(
    function: Callable[[Item], Result], items: Iterable[Item], max_hang_s: float
) -> Iterator[Result | Died[Item]]:
    process = GuardedProcess(max_hang_s, tries=1)
    try:
        for item in items:
            yield process.apply(function, item)
    finally:
        process.close()


def _executor(num_processes: int, max_hang_s: float) -> ProcessPoolExecutor:
    # Forking a process that has threads, as those of S3 clients, may hang the child.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(
        num_processes, mp_context=context, initializer=_begin, initargs=(max_hang_s,)
    )


def _begin(max_hang_s: float) -> None:
    end_on_hang(max_hang_s)
    die_with_parent()


def die_with_parent() -> None:
    """Ends this process of a pool with its parent, instead of waiting for work without end."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in the processes of a pool"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
