"""Measured timelines: the simulator's timeline, made of measured times.

    issued_s      the controller was about to make the call
    ready_s      the last result that it takes had been made
    start, end   its arguments were in the process; its result was packed

A rank is *busy* while its methods run, *transferring* while values are packed, unpacked or on their
way to a rank that has nothing else to do, and *waiting* for the rest of the time.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.schedule.execution import IssuedCall
from cluster.schedule.program import Process
from cluster.schedule.simulate import Cause, Span, Timeline
from cluster.spans import Work

Rank = tuple[str, int]
"""Role, and rank in it."""
_CallKey = tuple[str, int, int | None, int | None, str, int | None]


def key_of_work(work: Work) -> _CallKey:
    """Returns the schedule's key of a piece of work, or None if no schedule issued it."""
    label = work.label
    return (work.role, work.rank, label.iteration, label.part, work.method, label.micro_batch)


def key_of_call(one: IssuedCall) -> _CallKey:
    """The same for a call that was made."""
    call = one.call
    return (call.role, call.rank, call.iteration, call.part, call.stage, call.micro_batch)


def measured_timeline(
    asked: Sequence[IssuedCall],
    works: Mapping[_CallKey, Work],
    processes: Mapping[Rank, Process],
    controller: Process,
) -> Timeline:
    """Returns the start and the end of every call of one iteration.

    Args:
        asked: All its calls, in order.
        works: What the ranks noted about each, on the clock of `asked`.
        processes: Where each rank is: machine, and process on it; ranks of several roles may share
            one.
        controller: Where the controller is; ranks in its own process work while it asks them.

    Returns:
        The calls with their times, counted from the first one's making; what a call waited for
        last is the latest of the three things that it can wait for.
    """
    began_s = asked[0].issued_s
    number = {one.place: at for at, one in enumerate(asked)}
    spans: list[Span] = []
    last_on: dict[Process, int] = {}
    waited: int | None = None
    for one in asked:
        call, work = one.call, works[key_of_call(one)]
        for place in call.waits_for:
            at = number.get(place)
            if at is not None and (waited is None or spans[at].end_s > spans[waited].end_s):
                waited = at
        process = processes[call.role, call.rank]
        issued_s = one.issued_s - began_s if process != controller else 0.0
        reasons: list[tuple[float, Cause, int | None]] = [(issued_s, Cause.CONTROLLER, waited)]
        before = last_on.get(process)
        if before is not None:
            reasons.append((spans[before].end_s, Cause.PROCESS, before))
        taken = [number[place] for place in call.inputs]
        reasons += [(spans[at].end_s, Cause.RESULT, at) for at in taken]
        ready_s = max((spans[at].end_s for at in taken), default=issued_s)
        _, cause, after = max(reasons, key=lambda reason: reason[0])
        last_on[process] = len(spans)
        start_s, end_s = work.arrived_s - began_s, work.left_s - began_s
        spans.append(Span(call, issued_s, ready_s, start_s, end_s, cause, after))
    used = tuple(processes[one.call.role, one.call.rank] for one in asked)
    return Timeline(tuple(spans), used)


def path_seconds(timeline: Timeline, since_s: float = 0.0) -> dict[str, float]:
    """Splits the critical path: seconds by `role.stage`, and between calls.

    Args:
        timeline: Of one iteration.
        since_s: What was before this is left out: the iteration before was not over.
    """
    seconds = defaultdict[str, float](float)
    free_s = since_s
    for place in timeline.critical_path():
        span = timeline.spans[place]
        seconds["between calls"] += max(0.0, span.start_s - free_s)
        seconds[f"{span.call.role}.{span.call.stage}"] += max(
            0.0, span.end_s - max(span.start_s, free_s)
        )
        free_s = max(free_s, span.end_s)
    return dict(seconds)


@dataclass(slots=True)
class MeasuredUsage:
    """Time of one rank so far, working and receiving; the rest is waiting."""

    busy_s: float = 0.0
    transferring_s: float = 0.0

    def add(self, work: Work, could_begin_s: float) -> None:
        """Counts one more call.

        Args:
            work: The call.
            could_begin_s: When it could have begun, if its arguments had taken no time.
        """
        self.busy_s += work.ended_s - work.began_s
        self.transferring_s += (work.began_s - work.arrived_s) + (work.left_s - work.ended_s)
        self.transferring_s += max(0.0, work.arrived_s - could_begin_s)
