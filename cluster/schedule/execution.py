"""Executes a schedule: makes its calls in order, waits where it says so, drops what is used up.

    calls -> dispatch(call, inputs) -> futures      dropped after their last use
             those of a chain as one call           see `cluster.schedule.chains`
    waits -> on_report(call, report)                may refuse to continue
    last call of an iteration -> IterationResult    yielded once all its reports have arrived

Reports are the results that no other call takes: small records, which the controller may hold.
Before it continues at a wait, it fetches all reports of the roles that it waits for, micro-batch by
micro-batch. Within a micro-batch the last call comes first: a failure travels with the results, so
the last call raises the original error.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import ControllerTensorError
from cluster.joined import join
from cluster.schedule.chains import join_calls
from cluster.schedule.program import Process, Team
from cluster.schedule.schedule import Call
from cluster.spans import labelled
from cluster.worker_group import Future, WorkerGroup, made_together, taken_by

Dispatch = Callable[[Call, Mapping[str, Future[Any]]], Future[Any]]
"""Makes a call. The inputs are futures by the stage that made them, cut to the call's samples."""
OnReport = Callable[[Call, Any], None]
"""Receives a report that was waited for; raises to stop."""

_ANSWER_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class IssuedCall:
    """A call that was made.

    Attributes:
        place: Index in the schedule.
        call: The call.
        issued_s: Time at which it was made, on the monotonic clock of the controller's machine.
    """

    place: int
    call: Call
    issued_s: float


@dataclass(frozen=True, slots=True)
class IterationResult:
    """A finished iteration.

    Attributes:
        iteration: Its number.
        reports: (call, result) of each call whose result no other call takes.
        issued: All its calls, in the order of the schedule.
    """

    iteration: int
    reports: tuple[tuple[Call, Any], ...]
    issued: tuple[IssuedCall, ...]

    def of(self, stage: str) -> list[tuple[Call, Any]]:
        """Reports of one stage."""
        return [(call, report) for call, report in self.reports if call.stage == stage]


def execute_schedule(
    calls: Sequence[Call],
    groups: Mapping[str, WorkerGroup[Any]],
    dispatch: Dispatch,
    on_report: OnReport,
    timeout_s: float,
    teams: Mapping[str, Team] | None = None,
    goes_on: Callable[[], bool] = lambda: True,
) -> Iterator[IterationResult]:
    """Makes the calls of a schedule; yields each iteration when it has finished.

    Between two iterations the caller may do other work; calls that were made continue meanwhile.

    Args:
        calls: Whole iterations, in the order in which to make their calls.
        groups: Processes by role.
        dispatch: Makes one call.
        on_report: Receives each report that is waited for.
        timeout_s: Limit of each wait.
        teams: Processes by role, where roles share pools: each result then goes where it is taken.
        goes_on: Asked before the first call of each iteration but the first; if not, those that
            have begun are the last ones.

    Raises:
        Exception: An error of a call or of `on_report`; the calls after the wait were not made.
    """
    chains = join_calls(calls, teams or {})
    run = _Run(calls, [place for chain in chains for place in chain], groups, timeout_s)
    ends = {calls[chain[0]].iteration: number for number, chain in enumerate(chains)}
    takers = takers_of(calls, teams or {})
    last = calls[0].iteration if calls else 0
    is_over = False
    for number, chain in enumerate(chains):
        head = calls[chain[0]]
        if head.iteration > last:
            is_over = is_over or not goes_on()
            if is_over:
                continue
            last = head.iteration
        if head.waits_for:
            for waited in run.wait(head.waits_for):
                on_report(calls[waited], run.reports[waited])
        process = teams[head.role].process(head.role, head.rank) if teams else None
        with made_together(process if len(chain) > 1 else None):
            for place in chain:
                call, issued_s = calls[place], time.monotonic()
                with (
                    labelled(call.iteration, call.part, call.micro_batch),
                    taken_by(takers[place]),
                ):
                    future = dispatch(call, run.inputs(call))
                run.add(IssuedCall(place, call, issued_s), future)
        if number == ends[head.iteration]:
            yield run.close(head.iteration)


def takers_of(calls: Sequence[Call], teams: Mapping[str, Team]) -> list[set[Process]]:
    """Processes that take the result of each call."""
    found: list[set[Process]] = [set() for _ in calls]
    for call in calls:
        for taken in call.inputs if call.role in teams else ():
            found[taken].add(teams[call.role].process(call.role, call.rank))
    return found


class _Run:
    """Futures that are still needed, and reports that have arrived."""

    def __init__(
        self,
        calls: Sequence[Call],
        order: Sequence[int],
        groups: Mapping[str, WorkerGroup[Any]],
        timeout_s: float,
    ) -> None:
        self._calls = calls
        self._groups = groups
        self._timeout_s = timeout_s
        # In the order in which they are made, so that the last use is the one that stays.
        self._last_use = {taken: place for place in order for taken in calls[place].inputs}
        # A stage's results go to others or are reports, also where a rank stands in or assists.
        taken = {(calls[place].part, calls[place].stage) for place in self._last_use}
        self._unread = {
            place
            for place, call in enumerate(calls)
            if not call.counts and (call.part, call.stage) in taken
        }
        self._kept_back = {*self._last_use, *self._unread}
        self._futures: dict[int, Future[Any]] = {}
        # Of ranks that stand in or assist: nobody reads them, but they say why others wait.
        self._standing: dict[int, Future[Any]] = {}
        self._issued: list[IssuedCall] = []
        self.reports: dict[int, Any] = {}

    def inputs(self, call: Call) -> dict[str, Future[Any]]:
        """Inputs of a call, by the stage that made them."""
        pieces: dict[str, list[int]] = {}
        for place in call.inputs:
            pieces.setdefault(self._calls[place].stage, []).append(place)
        return {stage: self._joined(places, call) for stage, places in pieces.items()}

    def add(self, issued: IssuedCall, future: Future[Any]) -> None:
        """Records a call, and drops the futures that it was the last one to take."""
        self._issued.append(issued)
        kept = self._standing if issued.place in self._unread else self._futures
        kept[issued.place] = future
        for taken in set(issued.call.inputs):
            if self._last_use[taken] == issued.place:
                del self._futures[taken]

    def wait(self, places: Sequence[int]) -> list[int]:
        """Fetches these reports and the earlier ones of their roles; returns those new to it."""
        roles = {self._calls[place].role for place in places}
        new = [place for place in places if place not in self.reports]
        if new:
            self._fetch(
                place
                for place in self._futures
                if place <= max(new) and self._calls[place].role in roles
            )
        return new

    def close(self, iteration: int) -> IterationResult:
        """Fetches the remaining reports of an iteration, and forgets the iteration."""
        # Calls of a chain were made with its first one.
        issued = sorted(self._issued, key=lambda one: one.place)
        own = [one for one in issued if one.call.iteration == iteration]
        self._fetch(one.place for one in own if one.place in self._futures)
        self._issued = [one for one in issued if one.call.iteration != iteration]
        reporting = [one for one in own if one.place not in self._kept_back]
        for one in reporting:
            self._futures.pop(one.place)
        for one in own:
            self._standing.pop(one.place, None)
        reports = tuple((one.call, self.reports[one.place]) for one in reporting)
        return IterationResult(iteration, reports, tuple(own))

    def _joined(self, places: Sequence[int], call: Call) -> Future[Any]:
        if call.micro_batch is None:
            return self._futures[places[0]]
        pieces = [(self._futures[place], self._calls[place].samples) for place in places]
        return join(pieces, call.samples)

    def _fetch(self, places: Iterable[int]) -> None:
        new = [place for place in places if not (place in self._last_use or place in self.reports)]
        wanted = sorted(new, key=self._fetch_order)
        if not wanted:
            return
        first = self._calls[wanted[0]]
        attempted = f"working on {_words(self._calls[place].stage for place in wanted)}"
        attempted += f" in iteration {first.iteration}"
        futures = [self._futures[place] for place in wanted]
        try:
            results = self._groups[first.role].fetch(futures, self._timeout_s, attempted)
        except Exception:
            self._raise_of_standing(attempted)
            raise
        self.reports.update(zip(wanted, results, strict=True))

    def _raise_of_standing(self, attempted: str) -> None:
        """Raises what a rank that stands in has raised: the others fail for it, or wait for it."""
        for place, future in self._standing.items():
            group = self._groups[self._calls[place].role]
            if not group.is_done(future):
                continue
            try:
                group.fetch([future], _ANSWER_TIMEOUT_S, attempted)
            except ControllerTensorError:
                # It has made what it should.
                continue

    def _fetch_order(self, place: int) -> tuple[int, int, float, int]:
        """Sort key: calls without a micro-batch come after those of their part of the program."""
        call = self._calls[place]
        index = float("inf") if call.micro_batch is None else call.micro_batch
        return call.iteration, call.part, index, -place


def _words(stages: Iterable[str]) -> str:
    names = [stage.replace("_", " ") for stage in dict.fromkeys(stages)]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
