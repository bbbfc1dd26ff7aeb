"""Works a schedule through: makes its calls in order, waits where it says so, and lets go.

    calls -> ask(call, what it takes) -> claims     dropped after their last use
    waits -> reports -> heed(call, report)          may refuse to go on
    the last call of an iteration   -> Worked       its reports, once all have come

The reports of a schedule are the results that no call takes: small records, which the controller
may hold. Before it goes on at a wait, it has heard all reports of the roles that it waits for:
micro-batch after micro-batch, and of each the last call's first, because a failure travels with the
results. So it is told as itself, and not by what it led to on the way.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.joined import join
from cluster.schedule.schedule import Call
from cluster.spans import labelled
from cluster.worker_group import Pending, WorkerGroup

Ask = Callable[[Call, Mapping[str, Pending[Any]]], Pending[Any]]
"""Makes a call: what it is handed are claims by the stage that made them, cut to its samples."""
Heed = Callable[[Call, Any], None]
"""Looks at a report that was waited for; raises to stop."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A call that was made.

    Attributes:
        place: In the schedule.
        call: The call.
        asked_s: When, on the monotonic clock of the controller's machine.
    """

    place: int
    call: Call
    asked_s: float


@dataclass(frozen=True, slots=True)
class Worked:
    """An iteration that is over.

    Attributes:
        iteration: Which.
        reports: (call, what it returned) of all calls whose result no other call takes.
        asked: All its calls, in the order in which they were made.
    """

    iteration: int
    reports: tuple[tuple[Call, Any], ...]
    asked: tuple[Asked, ...]

    def of(self, stage: str) -> list[tuple[Call, Any]]:
        """The reports of one stage."""
        return [(call, report) for call, report in self.reports if call.stage == stage]


def work_through(
    calls: Sequence[Call],
    groups: Mapping[str, WorkerGroup[Any]],
    ask: Ask,
    heed: Heed,
    timeout_s: float,
) -> Iterator[Worked]:
    """Makes the calls of a schedule; yields each iteration when it is over.

    Between two iterations the caller may do other work: what was asked for goes on meanwhile.

    Args:
        calls: Whole iterations, in the order in which to make their calls.
        groups: Processes by role.
        ask: Makes one call.
        heed: Told what a wait was for.
        timeout_s: How long each wait may take.

    Raises:
        Exception: Whatever a call or `heed` raised; the calls after the wait were not made.
    """
    run = _Run(calls, groups, timeout_s)
    ends = {call.iteration: place for place, call in enumerate(calls)}
    for place, call in enumerate(calls):
        if call.waits_for:
            for waited in run.wait(call.waits_for):
                heed(calls[waited], run.heard[waited])
        asked_s = time.monotonic()
        with labelled(call.iteration, call.phase, call.micro_batch):
            claim = ask(call, run.inputs(call))
        run.made(Asked(place, call, asked_s), claim)
        if place == ends[call.iteration]:
            yield run.close(call.iteration)


class _Run:
    """The claims that are still needed, and what was heard."""

    def __init__(
        self, calls: Sequence[Call], groups: Mapping[str, WorkerGroup[Any]], timeout_s: float
    ) -> None:
        self._calls = calls
        self._groups = groups
        self._timeout_s = timeout_s
        # In ascending order, so that the last use is the one that stays.
        self._last_use = {taken: place for place, call in enumerate(calls) for taken in call.inputs}
        self._claims: dict[int, Pending[Any]] = {}
        self._asked: list[Asked] = []
        self.heard: dict[int, Any] = {}

    def inputs(self, call: Call) -> dict[str, Pending[Any]]:
        """What a call takes, by stage."""
        pieces: dict[str, list[int]] = {}
        for place in call.inputs:
            pieces.setdefault(self._calls[place].stage, []).append(place)
        return {stage: self._joined(places, call) for stage, places in pieces.items()}

    def made(self, asked: Asked, claim: Pending[Any]) -> None:
        """Notes a call, and drops what it was the last one to take."""
        self._asked.append(asked)
        self._claims[asked.place] = claim
        for taken in set(asked.call.inputs):
            if self._last_use[taken] == asked.place:
                del self._claims[taken]

    def wait(self, places: Sequence[int]) -> list[int]:
        """Hears these reports and those of their roles before them; returns the ones not heard."""
        roles = {self._calls[place].role for place in places}
        new = [place for place in places if place not in self.heard]
        if new:
            self._hear(
                place
                for place in self._claims
                if place <= max(new) and self._calls[place].role in roles
            )
        return new

    def close(self, iteration: int) -> Worked:
        """Hears what is left of an iteration, and forgets it."""
        own = [one for one in self._asked if one.call.iteration == iteration]
        self._hear(one.place for one in own if one.place in self._claims)
        self._asked = [one for one in self._asked if one.call.iteration != iteration]
        told = [one for one in own if one.place not in self._last_use]
        for one in told:
            self._claims.pop(one.place)
        return Worked(
            iteration, tuple((one.call, self.heard[one.place]) for one in told), tuple(own)
        )

    def _joined(self, places: Sequence[int], call: Call) -> Pending[Any]:
        if call.micro_batch is None:
            return self._claims[places[0]]
        pieces = [(self._claims[place], self._calls[place].samples) for place in places]
        return join(pieces, call.samples)

    def _hear(self, places: Iterable[int]) -> None:
        """Fetches reports."""
        new = [place for place in places if not (place in self._last_use or place in self.heard)]
        wanted = sorted(new, key=self._turn)
        if not wanted:
            return
        first = self._calls[wanted[0]]
        phase = f"working on {_words(self._calls[place].stage for place in wanted)}"
        phase += f" in iteration {first.iteration}"
        claims = [self._claims[place] for place in wanted]
        group = self._groups[first.role]
        self.heard.update(zip(wanted, group.fetch(claims, self._timeout_s, phase), strict=True))

    def _turn(self, place: int) -> tuple[int, int, float, int]:
        """When a report is heard: what is about no micro-batch comes after those of its phase."""
        call = self._calls[place]
        index = float("inf") if call.micro_batch is None else call.micro_batch
        return call.iteration, call.phase, index, -place


def _words(stages: Iterable[str]) -> str:
    names = [stage.replace("_", " ") for stage in dict.fromkeys(stages)]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
