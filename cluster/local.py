"""A worker group in this process, without Ray: the oracle of tests, and the laptop's topology.

A call runs at once, in the order of the calls. What it raises is kept for `fetch`, as on a cluster,
and a call that was handed a failed result fails with the same error without running. Results pass
between workers as they are, without the wire, so that a run on a cluster has something independent
to be compared with.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import torch

from cluster.errors import ClusterError
from cluster.joined import JoinedFuture, concatenate
from cluster.spans import Clock, Work, current_label, read_clock
from cluster.transfer import array_in, to_wire
from cluster.worker_group import Future, R, R_co, W, WorkerGroup, refuse_array

OWN_MACHINE = "this"
"""Name of the machine that this process is on, for its own clock."""

_MOST_WORK_KEPT = 10_000


@dataclass(frozen=True, slots=True)
class _Result(Generic[R_co]):
    value: R_co


@dataclass(frozen=True, slots=True)
class _Failure:
    error: Exception


@dataclass(frozen=True, slots=True, eq=False)
class LocalFuture(Future[R_co]):
    """A call that has already run.

    Attributes:
        outcome: What it returned or raised.
    """

    outcome: _Result[R_co] | _Failure


class LocalWorkerGroup(WorkerGroup[W]):
    """Worker instances behind the interface of a group.

    Args:
        name: What errors and reports call the group.
        workers: One instance a rank.
    """

    def __init__(self, name: str, workers: Sequence[W]) -> None:
        super().__init__(name, len(workers))
        self._workers = list(workers)
        self._works: deque[Work] = deque(maxlen=_MOST_WORK_KEPT)

    def fetch(self, futures: Sequence[Future[R]], timeout_s: float, attempted: str) -> list[R]:
        """The results; a call has run when `fetch` is reached, so the timeout never passes."""
        return [self._value(future, attempted) for future in futures]

    def is_done(self, future: Future[Any]) -> bool:
        """Always: a call runs when it is made."""
        return True

    def wait_ready(self, timeout_s: float) -> None:
        """Returns at once: the workers were there before the group."""

    def ask_work(self) -> list[Future[list[Work]]]:
        """Returns the work of all ranks since the last call, as one list."""
        works = list(self._works)
        self._works.clear()
        return [LocalFuture(self.name, 0, "take_work", _Result(works))]

    def clocks(self) -> list[Clock]:
        """The clock of this process, once a rank."""
        return [read_clock(OWN_MACHINE)] * self.size

    def close(self) -> None:
        """Releases the workers."""
        self._workers.clear()

    def _submit(
        self, rank: int, method: str, args: Sequence[object], keywords: Mapping[str, object]
    ) -> LocalFuture[Any]:
        inputs = [*args, *keywords.values()]
        failure = next((known for item in inputs if (known := _failure_of(item))), None)
        outcome = failure or self._run(rank, method, args, keywords)
        return LocalFuture(self.name, rank, method, outcome)

    def _run(
        self, rank: int, method: str, args: Sequence[object], keywords: Mapping[str, object]
    ) -> _Result[Any] | _Failure:
        started_s = time.monotonic()
        try:
            bound = getattr(self._workers[rank], method)
            named = {name: _plain(value) for name, value in keywords.items()}
            result = bound(*(_plain(value) for value in args), **named)
            if torch.cuda.is_initialized():
                # A call ends with the GPU's work; the next call would be charged for it otherwise.
                torch.cuda.synchronize()
            return _Result(result)
        except Exception as error:
            where = f"{method}() of {self.name} rank {rank}"
            label = current_label().in_words
            error.add_note(f"raised in {', '.join(filter(None, (where, label)))}")
            return _Failure(error)
        finally:
            ended_s = time.monotonic()
            # Nothing is packed or unpacked on the way to a worker in the same process.
            times = (started_s, started_s, ended_s, ended_s)
            self._works.append(Work(self.name, rank, method, current_label(), *times))

    def _value(self, future: Future[R], attempted: str) -> R:
        if not isinstance(future, LocalFuture):
            raise ClusterError(
                attempted,
                f"a result of group {future.group}, which lives in other processes",
                "results of groups of this process",
                "Fetch it through its own group",
            )
        if isinstance(future.outcome, _Failure):
            raise future.outcome.error
        where = array_in(to_wire(future.outcome.value, "result"))
        if where is not None:
            raise refuse_array(future, where, attempted)
        return future.outcome.value


def _failure_of(value: object) -> _Failure | None:
    if isinstance(value, JoinedFuture):
        return next((known for piece in value.pieces if (known := _failure_of(piece))), None)
    if isinstance(value, LocalFuture) and isinstance(value.outcome, _Failure):
        return value.outcome
    return None


def _plain(value: object) -> object:
    if isinstance(value, JoinedFuture):
        values: list[Any] = [_plain(piece) for piece in value.pieces]
        return concatenate(values, value.spans, value.wanted)
    if isinstance(value, LocalFuture) and isinstance(value.outcome, _Result):
        return value.outcome.value
    return value
