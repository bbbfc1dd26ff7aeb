"""A group of workers, and how its one caller speaks to it.

    text  = encoders.call_rank(0, Encoder.encode, captions)     Future[Text], at once
    drawn = painters.call_rank(0, Painter.paint, text)          the text goes from rank to rank
    sizes = painters.fetch([drawn], timeout_s=60, attempted="painting")

A call names the method itself, not its name in a string, so a type checker knows what comes back
and refuses a wrong argument. It returns at once with a `Future`: a future on the result, which can
be handed to another call but not looked into. Each rank works through its calls in the order in
which they were made. Only `fetch` waits, and only small values may be fetched. What several ranks
returned about parts of one batch can be handed on as one value: see `cluster.joined`.

One process makes all the calls. Ray keeps the order of calls per caller, so with two callers the
ranks of a group would see two orders, and a collective operation inside the group would hang.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar, overload

from cluster.errors import ClusterError, ControllerTensorError
from cluster.spans import Clock, Work, seconds_by_method

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
W = TypeVar("W")

_ANSWER_TIMEOUT_S = 600.0

_takers: ContextVar[frozenset[tuple[str, int]] | None] = ContextVar("takers", default=None)


@contextmanager
def taken_by(processes: AbstractSet[tuple[str, int]]) -> Iterator[None]:
    """Says which processes will take the results of the calls made inside.

    A group that shares its processes then keeps a result where one of them is its own, and sends it
    at once where another is. Without it a result stays, and is sent when another process asks.

    Args:
        processes: (pool, index) of each.
    """
    token = _takers.set(frozenset(processes))
    try:
        yield
    finally:
        _takers.reset(token)


def current_takers() -> frozenset[tuple[str, int]] | None:
    """Processes that take the results of the calls made now; None if not given."""
    return _takers.get()


class CallBatch(Protocol):
    """Calls that a group holds back, to make them as one."""

    def submit(self) -> None:
        """Makes the calls that were held back, as one."""
        ...

    def abandon(self) -> None:
        """Forgets them; their futures lead nowhere."""
        ...


@dataclass(slots=True)
class BatchedCalls:
    """Calls of one process that will be made together.

    Attributes:
        process: (pool, index) of the process; calls of others are made at once.
        batch: What the group of the first of these calls has begun, and others go on with.
    """

    process: tuple[str, int]
    batch: CallBatch | None = None


_batched: ContextVar[BatchedCalls | None] = ContextVar("batched", default=None)


@contextmanager
def made_together(process: tuple[str, int] | None) -> Iterator[None]:
    """Makes the calls inside that go to one process as one, when the block is left.

    They are worked through in their order, and one that fails ends them all. Their futures may be
    handed on at once, and fetched after the block. Groups of this process make every call at once.

    Args:
        process: (pool, index) of the process; None: every call is made at once.
    """
    calls = None if process is None else BatchedCalls(process)
    token = _batched.set(calls)
    try:
        yield
    except BaseException:
        if calls is not None and calls.batch is not None:
            calls.batch.abandon()
        raise
    else:
        if calls is not None and calls.batch is not None:
            calls.batch.submit()
    finally:
        _batched.reset(token)


def current_batch() -> BatchedCalls | None:
    """The calls that are being held back; None if each is made at once."""
    return _batched.get()


@dataclass(frozen=True, slots=True, eq=False)
class Future(Generic[R_co]):
    """A future on the result of one call; pass it on, or `fetch` it.

    Attributes:
        group: Name of the group that was called.
        rank: The rank that works on it.
        method: What it was asked to do.
    """

    group: str
    rank: int
    method: str


class WorkerGroup(ABC, Generic[W]):
    """`size` workers of one kind, each with its own state.

    Every argument of a call may be a `Future` of the right type instead of a value.

    Args:
        name: What errors and reports call the group.
        size: Number of ranks.
    """

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size

    @overload
    def call(
        self, method: Callable[Concatenate[W, P], R], /, *args: P.args, **keywords: P.kwargs
    ) -> list[Future[R]]: ...
    @overload
    def call(self, method: Callable[[W, A], R], a: A | Future[A], /) -> list[Future[R]]: ...
    @overload
    def call(
        self, method: Callable[[W, A, B], R], a: A | Future[A], b: B | Future[B], /
    ) -> list[Future[R]]: ...
    @overload
    def call(
        self,
        method: Callable[[W, A, B, C], R],
        a: A | Future[A],
        b: B | Future[B],
        c: C | Future[C],
        /,
    ) -> list[Future[R]]: ...
    def call(
        self, method: Callable[..., Any], /, *args: object, **keywords: object
    ) -> list[Future[Any]]:
        """Asks every rank to do the same with the same arguments."""
        return [self._submit(rank, method.__name__, args, keywords) for rank in range(self.size)]

    @overload
    def call_rank(
        self,
        rank: int,
        method: Callable[Concatenate[W, P], R],
        /,
        *args: P.args,
        **keywords: P.kwargs,
    ) -> Future[R]: ...
    @overload
    def call_rank(
        self, rank: int, method: Callable[[W, A], R], a: A | Future[A], /
    ) -> Future[R]: ...
    @overload
    def call_rank(
        self, rank: int, method: Callable[[W, A, B], R], a: A | Future[A], b: B | Future[B], /
    ) -> Future[R]: ...
    @overload
    def call_rank(
        self,
        rank: int,
        method: Callable[[W, A, B, C], R],
        a: A | Future[A],
        b: B | Future[B],
        c: C | Future[C],
        /,
    ) -> Future[R]: ...
    @overload
    def call_rank(
        self,
        rank: int,
        method: Callable[[W, A, B, C, D], R],
        a: A | Future[A],
        b: B | Future[B],
        c: C | Future[C],
        d: D | Future[D],
        /,
    ) -> Future[R]: ...
    def call_rank(
        self, rank: int, method: Callable[..., Any], /, *args: object, **keywords: object
    ) -> Future[Any]:
        """Asks one rank."""
        if not 0 <= rank < self.size:
            raise ClusterError(
                f"calling {method.__name__}() of group {self.name}",
                f"rank {rank}",
                f"a rank from 0 to {self.size - 1}",
            )
        return self._submit(rank, method.__name__, args, keywords)

    @overload
    def map(
        self, method: Callable[[W, A], R], a: Sequence[A] | Sequence[Future[A]], /
    ) -> list[Future[R]]: ...
    @overload
    def map(
        self,
        method: Callable[[W, A, B], R],
        a: Sequence[A] | Sequence[Future[A]],
        b: Sequence[B] | Sequence[Future[B]],
        /,
    ) -> list[Future[R]]: ...
    @overload
    def map(
        self,
        method: Callable[[W, A, B, C], R],
        a: Sequence[A] | Sequence[Future[A]],
        b: Sequence[B] | Sequence[Future[B]],
        c: Sequence[C] | Sequence[Future[C]],
        /,
    ) -> list[Future[R]]: ...
    def map(self, method: Callable[..., Any], /, *columns: Sequence[object]) -> list[Future[Any]]:
        """Asks every rank to do the same, each with its own arguments: rank i gets entry i."""
        lengths = [len(column) for column in columns]
        if any(length != self.size for length in lengths):
            raise ClusterError(
                f"mapping {method.__name__}() over group {self.name}",
                f"columns of length {lengths}",
                f"one entry for each of its {self.size} ranks in every column",
            )
        return [
            self._submit(rank, method.__name__, row, {})
            for rank, row in enumerate(zip(*columns, strict=True))
        ]

    @abstractmethod
    def fetch(self, futures: Sequence[Future[R]], timeout_s: float, attempted: str) -> list[R]:
        """Waits for small results; the only place where the controller waits.

        Args:
            futures: Futures, of this group or of others of its kind.
            timeout_s: How long to wait for all of them together.
            attempted: What the program is doing, for the errors: "updating in iteration 7".

        Raises:
            CallTimeoutError: Not all were there in time.
            WorkerDiedError: The process of a rank is gone.
            ControllerTensorError: A result holds a tensor or an array.
            Exception: Whatever the worker's method raised, with a note of where.
        """

    @abstractmethod
    def is_done(self, future: Future[Any]) -> bool:
        """Returns True if `fetch` would return, or raise, without waiting."""

    @abstractmethod
    def wait_ready(self, timeout_s: float) -> None:
        """Waits until every rank has built its worker; raises what the factory raised."""

    @abstractmethod
    def ask_work(self) -> list[Future[list[Work]]]:
        """Asks every rank what it has done since this was last asked.

        Waiting for arguments is not part of it; moving them in and out of the process is.
        """

    @abstractmethod
    def clocks(self) -> list[Clock]:
        """The clock of each rank, on which its times are."""

    def timings(self) -> dict[str, float]:
        """Busy seconds by method, summed over ranks, since the ranks were last asked."""
        asked = self.ask_work()
        parts = self.fetch(asked, _ANSWER_TIMEOUT_S, f"reading the times of {self.name}")
        return seconds_by_method([work for part in parts for work in part])

    @abstractmethod
    def close(self) -> None:
        """Ends the workers; what they hold is gone. Harmless when repeated."""

    @abstractmethod
    def _submit(
        self, rank: int, method: str, args: Sequence[object], keywords: Mapping[str, object]
    ) -> Future[Any]:
        """Queues one call on one rank."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def refuse_array(future: Future[object], where: str, attempted: str) -> ControllerTensorError:
    """The error for a tensor that a controller was about to hold."""
    return ControllerTensorError(
        attempted,
        f"{future.method}() of {future.group} rank {future.rank} returned an array at {where}",
        "numbers, strings and records of them",
        "Hand the future result to the group that needs it; it travels from rank to rank",
    )
