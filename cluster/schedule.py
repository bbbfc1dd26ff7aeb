"""Who is asked for what, in which order: the schedule of an iteration as a pure function.

    maker    a0 a1 | e0 a2 | e1 a3 | e2    | e3 | update
    helper   b0    | b1    | b2    | b3    |    |
    judge       c0 |    c1 |    c2 |    c3 |    | update       d = 2 micro-batches in flight

A *program* says what has to happen, as data: passes, whose stages every micro-batch goes through,
and updates. `order_calls` turns it into the list of calls that one controller makes. Each process
works through its calls in the order in which they were made, so this order *is* the schedule. It
keeps four promises:

* A call comes after the calls whose results it takes.
* A role gathers gradients in one order, micro-batch after micro-batch, whatever the depth and the
  teams are, so the numbers of a run do not depend on them.
* What a stage keeps in memory for a later one (a graph) is kept for `depth` micro-batches at most.
* The samples of a micro-batch are shared out evenly: over the ranks of one copy, which work in
  step, and in turn over copies, which do not wait for one another.

Where the controller has to hear of results before it goes on (`Call.waits_for`) it has first asked
for everything that needs none of the roles being updated.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.errors import ScheduleError

GATHER = "gradient_report"
"""Stage of an update that tells whether what a role gathered is sound; changes nothing."""
STEP = "step"
"""Stage of an update that changes the role's weights."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What one role does to each micro-batch of a pass.

    Attributes:
        name: Its method.
        role: Who does it.
        takes: Earlier stages of the pass whose results it is handed.
        keeps_until: Later stage of the same role that uses up what this one keeps in memory.
        gathers: Whether it adds to what an update of the role uses. Such stages of one role are
            interleaved in one way, whatever the depth.
    """

    name: str
    role: str
    takes: tuple[str, ...] = ()
    keeps_until: str | None = None
    gathers: bool = False


@dataclass(frozen=True, slots=True)
class Pass:
    """Stages that every micro-batch goes through, each listed after what it takes.

    The first stage that keeps something opens a micro-batch: it and what stands before it run
    ahead of the others by the depth. Where nothing is kept, the first stage runs ahead freely.
    """

    stages: tuple[Stage, ...]


@dataclass(frozen=True, slots=True)
class Update:
    """Roles whose weights change together: all of them, or none if one has gathered nonsense."""

    roles: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Team:
    """The processes of one role.

    Attributes:
        copies: Independent copies; each gets samples of its own.
        ranks: Processes of one copy; they share its samples evenly and work in step.
    """

    copies: int = 1
    ranks: int = 1

    @property
    def size(self) -> int:
        """Processes in all; rank `copy * ranks + i` is the i-th of its copy."""
        return self.copies * self.ranks


@dataclass(frozen=True, slots=True)
class Call:
    """One call on one rank.

    Attributes:
        iteration: Which iteration it belongs to.
        phase: Which pass or update of the program, counted from 0.
        role: Whom it goes to.
        rank: Which of the role's processes.
        stage: What is asked for.
        micro_batch: Which micro-batch; None in an update.
        samples: First sample of the micro-batch that it is about, and one past the last.
        inputs: Places in the list of the calls whose results it is handed.
        waits_for: Places of calls that must have succeeded, to the controller's knowledge, before
            it makes this call, and with it all that follow.
    """

    iteration: int
    phase: int
    role: str
    rank: int
    stage: str
    micro_batch: int | None
    samples: tuple[int, int]
    inputs: tuple[int, ...] = ()
    waits_for: tuple[int, ...] = ()

    @property
    def num_samples(self) -> int:
        """Samples that it is about; 0 in an update."""
        return self.samples[1] - self.samples[0]


Program = Sequence[Pass | Update]


def order_calls(
    program: Program,
    teams: Mapping[str, Team],
    num_micro_batches: int,
    depth: int,
    *,
    samples_per_micro_batch: int | None = None,
    num_iterations: int = 1,
    first_iteration: int = 0,
    max_staleness: int = 0,
) -> list[Call]:
    """The calls of one or more iterations, in the order in which a controller makes them.

    Args:
        program: What an iteration consists of.
        teams: Processes by role.
        num_micro_batches: Parts of the batch.
        depth: Most micro-batches whose opening stage is ahead of the stage that uses up what it
            keeps.
        samples_per_micro_batch: Size of each part; None: the least that gives every rank some.
        num_iterations: How many iterations to list.
        first_iteration: Number of the first one.
        max_staleness: 0: an iteration starts when all updates of the one before have ended. 1: the
            roles of an update check themselves one by one, and the next iteration starts with
            what needs no role whose update is still to come. Which calls that concerns, and by
            how many updates, is what `cluster.staleness` tells.

    Raises:
        ScheduleError: The program contradicts itself, or the samples cannot be shared out.
    """
    if min(num_micro_batches, depth, num_iterations) < 1 or max_staleness not in (0, 1):
        raise ScheduleError(
            "ordering the calls of an iteration",
            f"{num_micro_batches} micro-batches, {depth} in flight, {num_iterations} iterations, "
            f"staleness {max_staleness}",
            "at least one of each, and a staleness of 0 or 1",
        )
    if samples_per_micro_batch is None:
        samples_per_micro_batch = math.lcm(*(team.ranks for team in teams.values()))
    check_program(program, teams, samples_per_micro_batch)
    builder = _Builder(program, teams, num_micro_batches, depth, samples_per_micro_batch)
    iterations = range(first_iteration, first_iteration + num_iterations)
    for iteration in iterations:
        builder.add_iteration(iteration, max_staleness, last=iteration == iterations[-1])
    return builder.calls


def pass_order(
    a_pass: Pass, num_micro_batches: int, depth: int, cycles: Mapping[str, int] | None = None
) -> list[tuple[Stage, int]]:
    """(stage, micro-batch) of one pass, in order.

    A role that is asked again about a micro-batch after another role has worked on it would stand
    idle in between; it is first asked about the next micro-batch, where the depth allows it.

    Args:
        a_pass: The stages.
        num_micro_batches: Parts of the batch.
        depth: Most micro-batches that are open at once.
        cycles: By role, micro-batches after which a copy gets its next one; 1 if not given.
    """
    opening = _opening(a_pass)
    ahead = _ahead(a_pass, num_micro_batches, depth)
    lags = _lags(a_pass, cycles or {}, most=min(depth, num_micro_batches) - 1)
    lag = max(lags.values(), default=0)
    order = [(stage, index) for index in range(ahead) for stage in opening]
    for slot in range(num_micro_batches + lag):
        for stage in a_pass.stages[len(opening) :]:
            index = slot - lags[stage.name]
            if 0 <= index < num_micro_batches:
                order.append((stage, index))
        if ahead <= slot - lag + ahead < num_micro_batches:
            order += [(stage, slot - lag + ahead) for stage in opening]
    return order


def share_out(num_samples: int, team: Team, turn: int) -> list[tuple[int, tuple[int, int]]]:
    """Which rank works on which samples of a micro-batch.

    Args:
        num_samples: Samples of the micro-batch; a multiple of the team's ranks a copy.
        team: The role's processes.
        turn: Micro-batches that the role has been given before; copies take turns.

    Returns:
        (rank, (first sample, one past the last)), in the order of the samples. Over many turns
        every copy gets the same number of samples, give or take one share.
    """
    shares, found, start = num_samples // team.ranks, [], 0
    fewest, left_over = divmod(shares, team.copies)
    for place in range(min(team.copies, shares)):
        copy = (turn * left_over + place) % team.copies
        size = fewest + (place < left_over)
        for member in range(team.ranks):
            found.append((copy * team.ranks + member, (start, start + size)))
            start += size
    return found


def graphs_kept(calls: Sequence[Call], program: Program) -> dict[tuple[str, int], int]:
    """Most samples whose results a rank keeps in memory at once, by (role, rank)."""
    keepers = {
        (phase, stage.name): stage.keeps_until
        for phase, part in enumerate(program)
        if isinstance(part, Pass)
        for stage in part.stages
        if stage.keeps_until
    }
    users = {(phase, user) for (phase, _), user in keepers.items()}
    kept, most = defaultdict[tuple[str, int], int](int), defaultdict[tuple[str, int], int](int)
    for call in calls:
        place, key = (call.role, call.rank), (call.phase, call.stage)
        if key in keepers:
            kept[place] += call.num_samples
            most[place] = max(most[place], kept[place])
        if key in users:
            kept[place] -= call.num_samples
    return dict(most)


def check_program(program: Program, teams: Mapping[str, Team], num_samples: int) -> None:
    """Refuses a program that cannot be worked through.

    Raises:
        ScheduleError: Names the first stage or role that is wrong.
    """
    for part in program:
        if isinstance(part, Update):
            _check_update(part, teams)
            continue
        known: dict[str, Stage] = {}
        for stage in part.stages:
            missing = [name for name in stage.takes if name not in known]
            if missing or stage.name in known:
                raise _contradiction(stage, f"takes {stage.takes} after {list(known)}")
            known[stage.name] = stage
            team = teams.get(stage.role)
            if team is None:
                raise _contradiction(stage, f"is done by {stage.role} of roles {sorted(teams)}")
            if num_samples % team.ranks:
                raise ScheduleError(
                    f"sharing {num_samples} samples of a micro-batch among {stage.role}",
                    f"{team.ranks} ranks that work in step",
                    "a number of samples that they divide",
                    "Change the size of the batch, the number of micro-batches or of ranks",
                )
        for stage in part.stages:
            user = known.get(stage.keeps_until or stage.name)
            if user is None or user.role != stage.role:
                raise _contradiction(stage, f"keeps something until {stage.keeps_until}")


def _check_update(update: Update, teams: Mapping[str, Team]) -> None:
    for role in update.roles:
        if role not in teams or teams[role].copies > 1:
            raise ScheduleError(
                "ordering the calls of an iteration",
                f"an update of {role}, which has {teams.get(role, 'no processes')}",
                "one copy of a role that learns: copies would drift apart",
            )


def _contradiction(stage: Stage, found: str) -> ScheduleError:
    return ScheduleError(
        "ordering the calls of an iteration",
        f"stage {stage.name} {found}",
        "stages with names of their own, each after what it takes, roles that have processes, and"
        " memory that is used up by a stage of the same role",
    )


class _Builder:
    """The list of calls so far, and what the next one has to know of it."""

    def __init__(
        self,
        program: Program,
        teams: Mapping[str, Team],
        num_micro_batches: int,
        depth: int,
        num_samples: int,
    ) -> None:
        self.calls: list[Call] = []
        self._program = program
        self._teams = teams
        self._num_micro_batches = num_micro_batches
        self._depth = depth
        self._num_samples = num_samples
        self._places: dict[tuple[int, int, str, int], list[int]] = {}
        self._passes_of = {
            role: [
                phase
                for phase, part in enumerate(program)
                if isinstance(part, Pass) and any(stage.role == role for stage in part.stages)
            ]
            for role in teams
        }
        shares = {role: num_samples // team.ranks for role, team in teams.items()}
        self._cycles = {role: -(-team.copies // shares[role]) for role, team in teams.items()}
        # Calls that the controller must hear of before it goes on.
        self._waits: tuple[int, ...] = ()

    def add_iteration(self, iteration: int, max_staleness: int, *, last: bool) -> None:
        """Lists one more iteration."""
        first = len(self.calls)
        for phase, part in enumerate(self._program):
            if isinstance(part, Pass):
                for stage, index in self._order(part):
                    self._ask_stage(iteration, phase, stage, index)
                continue
            after = phase + 1
            if after < len(self._program):
                coming = (iteration, after)
            else:
                coming = (iteration + 1, 0) if max_staleness and not last else None
            self._update(iteration, phase, part, coming, together=not max_staleness)
        if not max_staleness:
            steps = range(first, len(self.calls))
            self._waits = tuple(place for place in steps if self.calls[place].stage == STEP)

    def _update(
        self,
        iteration: int,
        phase: int,
        update: Update,
        coming: tuple[int, int] | None,
        *,
        together: bool,
    ) -> None:
        gathered = {role: self._ask_role(iteration, phase, role, GATHER) for role in update.roles}
        groups = [update.roles] if together else [(role,) for role in update.roles]
        left = set(update.roles)
        for group in groups:
            if coming is not None:
                self._ask_ahead(*coming, left)
            self._waits += tuple(place for role in group for place in gathered[role])
            for role in group:
                self._ask_role(iteration, phase, role, STEP)
            left -= set(group)

    def _ask_ahead(self, iteration: int, phase: int, updated: set[str]) -> None:
        """Asks for the beginning of a pass, as far as it needs none of these roles."""
        part = self._program[phase]
        if not isinstance(part, Pass):
            return
        free: set[str] = set()
        for stage in part.stages:
            if stage.role not in updated and free.issuperset(stage.takes):
                free.add(stage.name)
        ahead = _ahead(part, self._num_micro_batches, self._depth)
        for stage, index in self._order(part):
            if stage.name in free and index < ahead:
                self._ask_stage(iteration, phase, stage, index)

    def _order(self, part: Pass) -> list[tuple[Stage, int]]:
        return pass_order(part, self._num_micro_batches, self._depth, self._cycles)

    def _ask_stage(self, iteration: int, phase: int, stage: Stage, micro_batch: int) -> None:
        if (iteration, phase, stage.name, micro_batch) in self._places:
            return
        passes = self._passes_of[stage.role]
        past = iteration * len(passes) + passes.index(phase)
        turn = past * self._num_micro_batches + micro_batch
        places: list[int] = []
        for rank, samples in share_out(self._num_samples, self._teams[stage.role], turn):
            inputs = tuple(
                place
                for name in stage.takes
                for place in self._places[iteration, phase, name, micro_batch]
                if _overlap(self.calls[place].samples, samples)
            )
            places.append(len(self.calls))
            self._ask(
                Call(iteration, phase, stage.role, rank, stage.name, micro_batch, samples, inputs)
            )
        self._places[iteration, phase, stage.name, micro_batch] = places

    def _ask_role(self, iteration: int, phase: int, role: str, stage: str) -> list[int]:
        places = [len(self.calls) + rank for rank in range(self._teams[role].size)]
        for rank in range(self._teams[role].size):
            self._ask(Call(iteration, phase, role, rank, stage, None, (0, 0)))
        return places

    def _ask(self, call: Call) -> None:
        self.calls.append(replace(call, waits_for=self._waits) if self._waits else call)
        self._waits = ()


def _opening(a_pass: Pass) -> tuple[Stage, ...]:
    """The stages that run ahead: up to the first one that keeps something."""
    keeping = [number for number, stage in enumerate(a_pass.stages) if stage.keeps_until]
    return a_pass.stages[: (keeping[0] if keeping else 0) + 1]


def _ahead(a_pass: Pass, num_micro_batches: int, depth: int) -> int:
    """How many micro-batches are opened before the first one goes on."""
    bounded = any(stage.keeps_until for stage in a_pass.stages)
    return min(depth, num_micro_batches) if bounded else num_micro_batches


def _lags(a_pass: Pass, cycles: Mapping[str, int], most: int) -> dict[str, int]:
    """Micro-batches by which each stage after the opening follows the first of them."""
    stages = a_pass.stages[len(_opening(a_pass)) :]
    before = {stage.name: _roles_before(stage, stages) for stage in stages}
    lags: dict[str, int] = {}
    least: dict[str, int] = {}
    for _ in range(2):
        for stage in stages:
            taken = [other for other in stages if other.name in stage.takes]
            used_up = [other for other in stages if other.keeps_until == stage.name]
            asked_again = any(
                other.role != stage.role and stage.role in before[other.name] for other in taken
            )
            lag = max((lags[other.name] for other in [*taken, *used_up]), default=0)
            lag += cycles.get(stage.role, 1) if asked_again else 0
            lags[stage.name] = min(max(lag, least.get(stage.role, 0) * stage.gathers), most)
        # What a role gathers is gathered in one order: its gathering stages stay together.
        least = {
            role: max(lags[stage.name] for stage in stages if stage.gathers and stage.role == role)
            for role in {stage.role for stage in stages if stage.gathers}
        }
    return lags


def _roles_before(stage: Stage, stages: Sequence[Stage]) -> set[str]:
    """Roles that a stage depends on, the opening's left out."""
    found: set[str] = set()
    for other in stages:
        if other.name in stage.takes:
            found |= {other.role} | _roles_before(other, stages)
    return found


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]
