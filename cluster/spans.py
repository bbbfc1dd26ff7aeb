"""Spans of calls: what every rank records about its work, and on whose clock.

    arrived   its arguments are in the process
    began     they are unpacked and on their way to the method
    ended     the method has returned, and the GPU has finished its work
    left      the result is packed for other processes

All four are of the machine's monotonic clock, which its processes share, so times of one machine
compare exactly. Between machines they are put on the clock of the day by one offset a machine, read
when the run starts: they compare as well as the clocks agree (with NTP to about a millisecond).

A call is identified by the controller's activity when it made it, its `Label`.
"""

import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Label:
    """Iteration, stage and micro-batch that a call belongs to.

    Attributes:
        iteration: Which iteration; None outside of any.
        part: Number of the part of the iteration's program.
        micro_batch: Which micro-batch; None if it is about none, or about several.
    """

    iteration: int | None = None
    part: int | None = None
    micro_batch: int | None = None

    @property
    def in_words(self) -> str:
        """Such as `iteration 3, part 0, micro-batch 1`; empty outside of any."""
        named = ("iteration", self.iteration), ("part", self.part)
        parts = (*named, ("micro-batch", self.micro_batch))
        return ", ".join(f"{name} {value}" for name, value in parts if value is not None)


@dataclass(frozen=True, slots=True)
class Work:
    """One call as its rank saw it; seconds of the machine's monotonic clock.

    Attributes:
        role: Name of the group.
        rank: Rank in it.
        method: What was asked for.
        label: What it was part of.
        arrived_s: When its arguments were there and nothing else was to do first.
        began_s: When they were unpacked.
        ended_s: When the method had returned.
        left_s: When the result was packed.
    """

    role: str
    rank: int
    method: str
    label: Label
    arrived_s: float
    began_s: float
    ended_s: float
    left_s: float

    @property
    def seconds(self) -> float:
        """All of it, moving values in and out included."""
        return self.left_s - self.arrived_s


@dataclass(frozen=True, slots=True)
class Clock:
    """Offset from the times of one process to the time of day.

    Attributes:
        machine: Where it is; processes with the same name share a monotonic clock.
        process: Its id there; workers with the same one take turns.
        offset_s: Seconds since 1970 at 0 of that clock, as the machine sees it.
    """

    machine: str
    process: int
    offset_s: float


def read_clock(machine: str) -> Clock:
    """The clock of this process."""
    return Clock(machine, os.getpid(), time.time() - time.monotonic())


_NOWHERE = Label()
_current: ContextVar[Label] = ContextVar("label", default=_NOWHERE)


def current_label() -> Label:
    """Returns the label of the calls that are being issued."""
    return _current.get()


@contextmanager
def labelled(
    iteration: int | None, part: int | None = None, micro_batch: int | None = None
) -> Iterator[None]:
    """Labels all calls that are made inside."""
    token = _current.set(Label(iteration, part, micro_batch))
    try:
        yield
    finally:
        _current.reset(token)


def seconds_by_method(works: Sequence[Work]) -> dict[str, float]:
    """Busy seconds by method, moving values in and out included."""
    total = defaultdict[str, float](float)
    for work in works:
        total[work.method] += work.seconds
    return dict(total)
