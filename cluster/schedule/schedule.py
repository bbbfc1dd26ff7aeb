"""The schedule of an iteration as a pure function: the calls and their order.

    maker    a0 a1 | e0 a2 | e1 a3 | e2    | e3 | update
    helper   b0    | b1    | b2    | b3    |    |
    judge       c0 |    c1 |    c2 |    c3 |    | update       d = 2 micro-batches in flight

A *program* says what has to happen, as data: passes, whose stages every micro-batch goes through,
updates and transfers of weights. `order_calls` turns it into the list of calls that one controller
makes. Each process works through its calls in the order in which they were made, so this order *is*
the schedule. It keeps four promises:

* A call comes after the calls whose results it takes.
* A role adds up gradients in one order, micro-batch after micro-batch, whatever the depth and the
  teams are: depth and replicas do not change a bit of a run's numbers.
* What a stage keeps in memory for a later one (a graph) is kept for `depth` micro-batches at most.
* The samples of a micro-batch are shared out as evenly as they divide: over the ranks of one
  replica, which work in step, and in turn over replicas, which do not wait for one another. Where
  roles share pools, a replica takes a micro-batch whole. A rank without a sample takes part in the
  collectives of its replica with weight 0.

Where the controller has to hear of results before it goes on (`Call.waits_for`) it has first asked
for everything that needs none of the roles being updated.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.errors import ScheduleError
from cluster.schedule.dealing import StageSeconds, deal_pass, dealt_seconds
from cluster.schedule.program import (
    Pass,
    Program,
    Share,
    Stage,
    Team,
    Update,
    WeightTransfer,
    check_program,
    num_ahead,
    partition_samples,
    pass_order,
    share_in_replica,
)

REPORT = "gradient_report"
"""Stage of an update that reports whether a role's gradient is finite; changes nothing."""
STEP = "step"
"""Stage of an update that changes the role's weights."""

_Turn = tuple[Stage, int, int | None]
"""Stage, micro-batch, and the replica that takes it whole; None: replicas share it."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call on one rank.

    Attributes:
        iteration: Which iteration it belongs to.
        part: Number of the part of the program, from 0.
        role: Whom it goes to.
        rank: Which of the role's processes.
        stage: What is asked for.
        micro_batch: Which micro-batch; None in an update or a transfer.
        samples: First sample of the micro-batch that it is about, and one past the last.
        stands_in: Its rank has no sample of its own, and works on the first one with weight 0, for
            the collectives of its replica; the result is not fetched.
        inputs: Places in the list of the calls whose results it is handed.
        waits_for: Places of calls that must have succeeded, to the controller's knowledge, before
            it makes this call, and with it all that follow.
        assists: Its rank works on the samples of a rank before it; the result is not fetched.
        fed: Whether it takes something from outside of the schedule: see `Stage`.
    """

    iteration: int
    part: int
    role: str
    rank: int
    stage: str
    micro_batch: int | None
    samples: tuple[int, int]
    inputs: tuple[int, ...] = ()
    waits_for: tuple[int, ...] = ()
    stands_in: bool = False
    assists: bool = False
    fed: bool = False

    @property
    def counts(self) -> bool:
        """True if its result is taken or reported."""
        return not (self.stands_in or self.assists)

    @property
    def num_samples(self) -> int:
        """Samples that count; 0 in an update, a transfer, or for a rank that has none."""
        return 0 if self.stands_in else self.num_computed

    @property
    def num_computed(self) -> int:
        """Samples that it works on; 0 in an update or a transfer."""
        return self.samples[1] - self.samples[0]


def order_calls(
    program: Program,
    teams: Mapping[str, Team],
    num_micro_batches: int,
    depth: int,
    *,
    samples_per_micro_batch: int | Sequence[int] | None = None,
    iterations: range = range(1),
    max_staleness: int = 0,
    stage_seconds: Mapping[tuple[str, str], float] | None = None,
) -> list[Call]:
    """The calls of one or more iterations, in the order in which a controller makes them.

    Args:
        program: What an iteration consists of.
        teams: Processes by role.
        num_micro_batches: Parts of the batch.
        depth: Most micro-batches whose opening stage is ahead of the stage that uses up what it
            keeps.
        samples_per_micro_batch: Size of each part, or one size for all; None: the least that gives
            every rank as many.
        iterations: Numbers of the iterations to list.
        max_staleness: 0: an iteration starts when all updates of the one before have ended. 1: the
            roles of an update check themselves one by one, and the next iteration starts with
            what needs no role whose update is still to come. Which calls that concerns, and by
            how many updates, is what `cluster.schedule.staleness` tells.
        stage_seconds: Of one sample by role and stage, in any unit. Where roles share pools, they
            decide the order of the stages and which copy of a role takes which micro-batch: see
            `cluster.schedule.dealing`. Stages that are missing, or all, take 1.

    Raises:
        ScheduleError: The program contradicts itself, or the samples cannot be shared out.
    """
    if min(num_micro_batches, depth, len(iterations)) < 1 or max_staleness not in (0, 1):
        raise ScheduleError(
            "ordering the calls of an iteration",
            f"{num_micro_batches} micro-batches, {depth} in flight, {len(iterations)} iterations, "
            f"staleness {max_staleness}",
            "at least one of each, and a staleness of 0 or 1",
        )
    if samples_per_micro_batch is None:
        samples_per_micro_batch = math.lcm(*(team.ranks for team in teams.values()))
    if isinstance(samples_per_micro_batch, int):
        samples_per_micro_batch = [samples_per_micro_batch] * num_micro_batches
    check_program(program, teams)
    builder = _Builder(
        program, teams, num_micro_batches, depth, samples_per_micro_batch, stage_seconds or {}
    )
    for iteration in iterations:
        builder.add_iteration(iteration, max_staleness, last=iteration == iterations[-1])
    return builder.calls


class _Builder:
    """The list of calls so far, and what the next one has to know of it."""

    def __init__(
        self,
        program: Program,
        teams: Mapping[str, Team],
        num_micro_batches: int,
        depth: int,
        sizes: Sequence[int],
        stage_seconds: Mapping[tuple[str, str], float],
    ) -> None:
        self.calls: list[Call] = []
        self._program = program
        self._teams = teams
        self._num_micro_batches = num_micro_batches
        self._depth = depth
        self._sizes = sizes
        self._places: dict[tuple[int, int, str, int], list[int]] = {}
        self._shares: dict[tuple[object, ...], list[Share]] = {}
        self._passes_of = {
            role: [
                number
                for number, part in enumerate(program)
                if isinstance(part, Pass) and any(stage.role == role for stage in part.stages)
            ]
            for role in teams
        }
        shares = {role: max(1, min(sizes) // team.rank_groups) for role, team in teams.items()}
        self._cycles = {role: -(-team.replicas // shares[role]) for role, team in teams.items()}
        seconds = dealt_seconds(teams, stage_seconds, max(sizes))
        shared = any(team.homes for team in teams.values())
        self._orders = {
            number: self._dealt(part, seconds) if shared else self._in_turns(part)
            for number, part in enumerate(program)
            if isinstance(part, Pass)
        }
        # Calls that the controller must hear of before it goes on.
        self._waits: tuple[int, ...] = ()

    def add_iteration(self, iteration: int, max_staleness: int, *, last: bool) -> None:
        """Lists one more iteration."""
        first = len(self.calls)
        for number, part in enumerate(self._program):
            if isinstance(part, Pass):
                for stage, index, replica in self._orders[number]:
                    self._ask_stage(iteration, number, stage, index, replica)
                continue
            if isinstance(part, WeightTransfer):
                given = self._ask_role(iteration, number, *part.giver)
                self._ask_role(iteration, number, *part.taker, inputs=(given[0],))
                continue
            after = number + 1
            if after < len(self._program):
                coming = (iteration, after)
            else:
                coming = (iteration + 1, 0) if max_staleness and not last else None
            self._update(iteration, number, part, coming, together=not max_staleness)
        if not max_staleness:
            steps = range(first, len(self.calls))
            self._waits = tuple(place for place in steps if self.calls[place].stage == STEP)

    def _update(
        self,
        iteration: int,
        part: int,
        update: Update,
        coming: tuple[int, int] | None,
        *,
        together: bool,
    ) -> None:
        reported = {role: self._ask_role(iteration, part, role, REPORT) for role in update.roles}
        groups = [update.roles] if together else [(role,) for role in update.roles]
        left = set(update.roles)
        for group in groups:
            if coming is not None:
                self._ask_ahead(*coming, left)
            self._waits += tuple(place for role in group for place in reported[role])
            for role in group:
                self._ask_role(iteration, part, role, STEP)
            left -= set(group)

    def _ask_ahead(self, iteration: int, part: int, updated: set[str]) -> None:
        """Asks for the beginning of a pass, as far as it needs none of these roles."""
        a_pass = self._program[part]
        if not isinstance(a_pass, Pass):
            return
        free: set[str] = set()
        # A role that cannot accumulate from one stage yet must not do so from a later one.
        waiting: set[str] = set()
        for stage in a_pass.stages:
            if stage.role in updated or not free.issuperset(stage.takes):
                waiting |= {stage.role} if stage.accumulates else set()
            elif not (stage.accumulates and stage.role in waiting):
                free.add(stage.name)
        ahead = num_ahead(a_pass, self._num_micro_batches, self._depth)
        for stage, index, replica in self._orders[part]:
            if stage.name in free and index < ahead:
                self._ask_stage(iteration, part, stage, index, replica)

    def _in_turns(self, part: Pass) -> list[_Turn]:
        """Order where each role has processes of its own; replicas share each micro-batch."""
        order = pass_order(part, self._num_micro_batches, self._depth, self._cycles)
        return [(stage, index, None) for stage, index in order]

    def _dealt(self, part: Pass, seconds: StageSeconds) -> list[_Turn]:
        """Order where roles share pools; a replica takes a micro-batch whole."""
        dealt = deal_pass(part, self._teams, self._num_micro_batches, self._depth, seconds)
        return [(deal.stage, deal.micro_batch, deal.replica) for deal in dealt.deals]

    def _ask_stage(
        self, iteration: int, part: int, stage: Stage, micro_batch: int, replica: int | None
    ) -> None:
        if (iteration, part, stage.name, micro_batch) in self._places:
            return
        passes = self._passes_of[stage.role]
        past = iteration * len(passes) + passes.index(part)
        round = past * self._num_micro_batches + micro_batch
        places: list[int] = []
        # The odd micro-batch of each batch would always meet the same replica.
        shares = self._shares_of(stage.role, micro_batch, replica, round, past + micro_batch)
        made = [
            (place, self.calls[place].samples)
            for name in stage.takes
            for place in self._places[iteration, part, name, micro_batch]
        ]
        for share in shares:
            inputs = tuple(place for place, samples in made if _overlap(samples, share.samples))
            call = Call(
                iteration,
                part,
                stage.role,
                share.rank,
                stage.name,
                micro_batch,
                share.samples,
                inputs,
                stands_in=share.stands_in,
                assists=share.assists,
                fed=stage.fed,
            )
            if call.counts:
                places.append(len(self.calls))
            self._ask(call)
        self._places[iteration, part, stage.name, micro_batch] = places

    def _shares_of(
        self, role: str, micro_batch: int, replica: int | None, round: int, odd_round: int
    ) -> list[Share]:
        """Shares of a micro-batch; those that have been found before are the same."""
        team, size = self._teams[role], self._sizes[micro_batch]
        turns = (round % team.replicas, odd_round % team.replicas)
        key = (role, size, *(turns if replica is None else (replica,)))
        if key not in self._shares:
            self._shares[key] = (
                partition_samples(size, team, *turns)
                if replica is None
                else share_in_replica(size, team, replica)
            )
        return self._shares[key]

    def _ask_role(
        self, iteration: int, part: int, role: str, stage: str, inputs: tuple[int, ...] = ()
    ) -> list[int]:
        places = [len(self.calls) + rank for rank in range(self._teams[role].size)]
        for rank in range(self._teams[role].size):
            self._ask(Call(iteration, part, role, rank, stage, None, (0, 0), inputs))
        return places

    def _ask(self, call: Call) -> None:
        self.calls.append(replace(call, waits_for=self._waits) if self._waits else call)
        self._waits = ()


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]
