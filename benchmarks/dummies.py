"""Works a schedule through with sleeping workers: what the machinery costs without the work.

Each rank sleeps for as long as its stage would take and hands on as many bytes as the stage would.
Calls, references, transfers and waits are those of a real run, so what a rehearsal takes beyond the
simulator's bound is the cost of the machinery; and since sleepers use no core, many of them can be
rehearsed on a small machine.
"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cluster.schedule.chains import join_calls
from cluster.schedule.execution import takers_of
from cluster.schedule.program import Team
from cluster.schedule.schedule import Call
from cluster.schedule.simulate import Costs, mean_period
from cluster.worker_group import Future, WorkerGroup, made_together, taken_by


def in_sequence(calls: Sequence[Call]) -> list[Call]:
    """The same calls one after another, each made when the one before has ended: no overlap."""
    return [
        replace(call, waits_for=(place - 1,) if place else ()) for place, call in enumerate(calls)
    ]


@dataclass(frozen=True, slots=True)
class DummyCall:
    """One call as its rank saw it.

    Attributes:
        place: The call's place in the schedule.
        start_s: When the method began, on the machine's monotonic clock.
        end_s: When it returned.
    """

    place: int
    start_s: float
    end_s: float


class DummyWorker:
    """A worker that sleeps instead of working."""

    def __init__(self) -> None:
        self._naps: list[DummyCall] = []

    def work(self, place: int, seconds: float, result_bytes: int, *inputs: object) -> Tensor | None:
        """Sleeps, and returns a tensor of the size wanted.

        Args:
            place: Of the call in the schedule.
            seconds: How long to sleep.
            result_bytes: Size of the result; 0 returns none.
            inputs: Results of other sleepers; they arrive and are not looked at.
        """
        start_s = time.monotonic()
        result = torch.ones(result_bytes, dtype=torch.uint8) if result_bytes else None
        # What making the result took counts as part of the work.
        time.sleep(max(0.0, seconds - (time.monotonic() - start_s)))
        self._naps.append(DummyCall(place, start_s, time.monotonic()))
        return result

    def take_naps(self) -> tuple[DummyCall, ...]:
        """All calls of `work` since this was last asked."""
        naps, self._naps = tuple(self._naps), []
        return naps


def make_dummy_worker() -> DummyWorker:
    """Builds a sleeper in the process of its rank."""
    return DummyWorker()


@dataclass(frozen=True, slots=True)
class SimulatedRun:
    """Times of a schedule that dummy workers have run.

    Attributes:
        calls: The schedule.
        naps: One a call, in the order of the calls; times count from the first call's making.
    """

    calls: tuple[Call, ...]
    naps: tuple[DummyCall, ...]

    def iteration_ends_s(self) -> list[float]:
        """End of the last call of each iteration, in seconds."""
        ends = defaultdict[int, float](float)
        for call, nap in zip(self.calls, self.naps, strict=True):
            ends[call.iteration] = max(ends[call.iteration], nap.end_s)
        return [ends[iteration] for iteration in sorted(ends)]

    @property
    def iteration_s(self) -> float:
        """Seconds an iteration in the long run; see `Timeline.iteration_s`."""
        return mean_period(self.iteration_ends_s())

    def busy_share(self, role: str) -> float:
        """Part of its time that a role works: from the end of the first iteration to the last's."""
        ends = self.iteration_ends_s()
        since, until = (ends[0], ends[-1]) if len(ends) > 1 else (0.0, ends[-1])
        ranks = {call.rank for call in self.calls if call.role == role}
        busy_s = sum(
            max(0.0, min(nap.end_s, until) - max(nap.start_s, since))
            for call, nap in zip(self.calls, self.naps, strict=True)
            if call.role == role
        )
        return busy_s / (len(ranks) * (until - since))


def run_dummies(
    calls: Sequence[Call],
    groups: Mapping[str, WorkerGroup[DummyWorker]],
    costs: Costs,
    timeout_s: float = 600.0,
    teams: Mapping[str, Team] | None = None,
) -> SimulatedRun:
    """Makes the calls of a schedule and waits for all of them.

    Args:
        calls: In the order in which to make them.
        groups: Sleepers by role.
        costs: Seconds and bytes of each call; what else is in there belongs to the simulator.
        timeout_s: How long each wait may take.
        teams: Processes by role, where roles share pools.
    """
    handed_on = {place for call in calls for place in call.inputs}
    # In the order in which they are made, so that the last use is the one that stays.
    chains = join_calls(calls, teams or {})
    order = [place for chain in chains for place in chain]
    last_use = {place: at for at in order for place in (*calls[at].inputs, *calls[at].waits_for)}
    kept: dict[int, Future[Any]] = {}
    takers = takers_of(calls, teams or {})
    started_s = time.monotonic()
    for chain in chains:
        head = calls[chain[0]]
        if head.waits_for:
            waited = [kept[other] for other in head.waits_for]
            groups[head.role].fetch(waited, timeout_s, "rehearsing")
        process = teams[head.role].process(head.role, head.rank) if teams else None
        with made_together(process if len(chain) > 1 else None):
            for place in chain:
                call = calls[place]
                result_bytes = round(costs.result_bytes(call)) if place in handed_on else 0
                taken = [kept[at] for at in call.inputs]
                arguments = (place, costs.seconds(call), result_bytes, *taken)
                with taken_by(takers[place]):
                    kept[place] = groups[call.role].call_rank(
                        call.rank, DummyWorker.work, *arguments
                    )
                for other in {*call.inputs, *call.waits_for}:
                    if last_use[other] == place:
                        del kept[other]
    naps: list[DummyCall] = []
    for group in groups.values():
        asked = group.call(DummyWorker.take_naps)
        naps += [nap for part in group.fetch(asked, timeout_s, "waking") for nap in part]
    return SimulatedRun(
        tuple(calls),
        tuple(
            DummyCall(nap.place, nap.start_s - started_s, nap.end_s - started_s)
            for nap in sorted(naps, key=lambda nap: nap.place)
        ),
    )
