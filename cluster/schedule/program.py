"""An iteration as data: passes over the micro-batches, updates, transfers of weights.

    Pass(Stage("paint", "maker", keeps_until="learn"), Stage("look", "judge", takes=("paint",)), ..)
    Update("maker", "judge")
    WeightTransfer(("maker", "show"), ("judge", "copy"))

A program says what has to happen and who does it; `cluster.schedule.schedule` makes calls of it.
The order of the stages of one pass over its micro-batches, and how samples are shared out over the
processes of a role, are decided here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Self

from cluster.errors import ScheduleError


@dataclass(frozen=True, slots=True)
class Stage:
    """One role's work on each micro-batch of a pass.

    Attributes:
        name: Its method.
        role: Who does it.
        takes: Earlier stages of the pass whose results it is handed.
        keeps_until: Later stage of the same role that uses up what this one keeps in memory.
        accumulates: Adds to the gradient that the role's next update uses. Such stages of one role
            are interleaved in one way, whatever the depth.
        fed: Whether it also takes something from outside of the program, such as captions, which
            may arrive later than the results of other stages.
    """

    name: str
    role: str
    takes: tuple[str, ...] = ()
    keeps_until: str | None = None
    accumulates: bool = False
    fed: bool = False


@dataclass(frozen=True, slots=True)
class Pass:
    """Stages that every micro-batch goes through, each listed after what it takes.

    The first stage that keeps something opens a micro-batch: it and what stands before it run
    ahead of the others by the depth. Where nothing is kept, the first stage runs ahead freely.
    """

    stages: tuple[Stage, ...]


@dataclass(frozen=True, slots=True)
class Update:
    """Roles whose weights change together: all of them, or none if a gradient is not finite."""

    roles: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WeightTransfer:
    """A value about no samples that one role hands to another, such as its weights.

    Attributes:
        giver: Role and stage that make it: every rank is asked, the first one has the value.
        taker: Role and stage that every rank of another role takes it in with.
    """

    giver: tuple[str, str]
    taker: tuple[str, str]


Process = tuple[str, int]
"""Pool of a process, and its index in the pool."""


@dataclass(frozen=True, slots=True)
class Home:
    """A pool on which a role has a replica, on all of the pool's processes.

    Attributes:
        pool: Name of the pool.
        ranks: Processes of the pool.
        speed: Of one of them, over that of others; a stage takes so much less time there.
    """

    pool: str
    ranks: int = 1
    speed: float = 1.0


# Without slots: what is asked about every call of a schedule is found once.
@dataclass(frozen=True)
class Team:
    """The processes of one role.

    Attributes:
        replicas: Independent copies; each gets samples of its own.
        ranks: Processes of one replica, of the largest where they differ; they share its samples
            and work in step.
        homes: Pool of each replica, where roles share pools; empty: processes of the role's own.
        ranks_per_sample: Ranks in a row that get the same samples, each of which they work on
            together; it divides the ranks of every replica.
    """

    replicas: int = 1
    ranks: int = 1
    homes: tuple[Home, ...] = ()
    ranks_per_sample: int = 1

    @classmethod
    def on(cls, *homes: Home) -> Self:
        """A team with one replica on each of these pools."""
        return cls(len(homes), max(home.ranks for home in homes), homes)

    @cached_property
    def ranks_by_replica(self) -> tuple[int, ...]:
        """Processes of each replica."""
        return tuple(home.ranks for home in self.homes) or (self.ranks,) * self.replicas

    @property
    def rank_groups(self) -> int:
        """Groups of ranks, of the largest replica, that work on samples of their own."""
        return self.ranks // self.ranks_per_sample

    def samples_of_a_rank(self, num_samples: int, replica: int) -> float:
        """Most samples that a rank of a replica works through; part of one where several share it.

        Args:
            num_samples: Samples that the replica takes whole.
            replica: The replica.
        """
        rank_groups = self.ranks_by_replica[replica] // self.ranks_per_sample
        return -(-num_samples // rank_groups) / self.ranks_per_sample

    @property
    def size(self) -> int:
        """Processes in all; the ranks of a replica follow those of the replicas before it."""
        return sum(self.ranks_by_replica)

    def first_rank(self, replica: int) -> int:
        """Rank of the first process of a replica."""
        return self._first_ranks[replica]

    def replica_of(self, rank: int) -> int:
        """The replica that a rank belongs to."""
        return self._replicas[rank]

    def pool_of(self, role: str, replica: int) -> str:
        """Pool of a replica; of a role with processes of its own, the role."""
        return self.homes[replica].pool if self.homes else role

    def process(self, role: str, rank: int) -> Process:
        """The process of a rank: roles that share a pool share its processes."""
        if not self.homes:
            return role, rank
        replica = self.replica_of(rank)
        return self.homes[replica].pool, rank - self.first_rank(replica)

    @cached_property
    def _first_ranks(self) -> tuple[int, ...]:
        """Rank of the first process of each replica, and the number of processes."""
        return tuple(accumulate(self.ranks_by_replica, initial=0))

    @cached_property
    def _replicas(self) -> tuple[int, ...]:
        """The replica of each rank."""
        counts = enumerate(self.ranks_by_replica)
        return tuple(replica for replica, ranks in counts for _ in range(ranks))


Program = Sequence[Pass | Update | WeightTransfer]


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
        cycles: By role, micro-batches after which a replica gets its next one; 1 if not given.
    """
    opening = opening_of(a_pass)
    ahead = num_ahead(a_pass, num_micro_batches, depth)
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


@dataclass(frozen=True, slots=True)
class Share:
    """Samples of a micro-batch that one rank works on.

    Attributes:
        rank: The rank.
        samples: First sample, and one past the last.
        stands_in: The rank has no sample of its own; it computes the first one again, with weight
            0, so that the collectives of its replica have all ranks.
        assists: The rank works on the samples of one before it, whose result is that of both.
    """

    rank: int
    samples: tuple[int, int]
    stands_in: bool = False
    assists: bool = False


def partition_samples(
    num_samples: int, team: Team, round: int, odd_round: int | None = None
) -> list[Share]:
    """Assigns the samples of a micro-batch to the replicas of a team.

    Args:
        num_samples: Samples of the micro-batch.
        team: The role's processes.
        round: Micro-batches that the role has been given before; replicas take turns.
        odd_round: The same for a micro-batch whose samples do not divide among the ranks of a
            replica; None: `round`.

    Returns:
        Shares in the order of the samples. Over many rounds every replica gets the same number of
        samples, give or take one share. Where the samples do not divide among the ranks of a
        replica, one replica takes them all. Ranks that work on samples together count as one.
    """
    if num_samples % team.rank_groups:
        turn = round if odd_round is None else odd_round
        return share_in_replica(num_samples, team, turn % team.replicas)
    shares, found, start = num_samples // team.rank_groups, list[Share](), 0
    fewest, left_over = divmod(shares, team.replicas)
    for place in range(min(team.replicas, shares)):
        replica = (round * left_over + place) % team.replicas
        size = fewest + (place < left_over)
        for group in range(team.rank_groups):
            first = replica * team.ranks + group * team.ranks_per_sample
            found += _shares_of_group(first, team.ranks_per_sample, (start, start + size))
            start += size
    return found


def split_evenly(number: int, parts: int) -> tuple[int, ...]:
    """Whole numbers that differ by 1 at most and add up to the number, the larger ones first."""
    fewest, left_over = divmod(number, parts)
    return tuple(fewest + (part < left_over) for part in range(parts))


def share_in_replica(num_samples: int, team: Team, replica: int) -> list[Share]:
    """Shares a micro-batch out over the ranks of one replica, the first ones with one more."""
    ranks, first = team.ranks_by_replica[replica], team.first_rank(replica)
    width = team.ranks_per_sample
    sizes = [size for size in split_evenly(num_samples, ranks // width) if size]
    shares = [
        share
        for group, (size, end) in enumerate(zip(sizes, accumulate(sizes), strict=True))
        for share in _shares_of_group(first + group * width, width, (end - size, end))
    ]
    idle = range(first + len(shares), first + ranks)
    return shares + [Share(rank, (0, 1), stands_in=True) for rank in idle]


def _shares_of_group(first: int, width: int, samples: tuple[int, int]) -> list[Share]:
    """Shares of ranks that work on the same samples together."""
    return [Share(first + member, samples, assists=member > 0) for member in range(width)]


def check_program(program: Program, teams: Mapping[str, Team]) -> None:
    """Refuses a program that cannot be worked through.

    Raises:
        ScheduleError: Names the first stage or role that is wrong.
    """
    for part in program:
        if isinstance(part, Update):
            _check_update(part, teams)
            continue
        if isinstance(part, WeightTransfer):
            _check_transfer(part, teams)
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
        for stage in part.stages:
            user = known.get(stage.keeps_until or stage.name)
            if user is None or user.role != stage.role:
                raise _contradiction(stage, f"keeps something until {stage.keeps_until}")


def _check_update(update: Update, teams: Mapping[str, Team]) -> None:
    for role in update.roles:
        if role not in teams or teams[role].replicas > 1:
            raise ScheduleError(
                "ordering the calls of an iteration",
                f"an update of {role}, which has {teams.get(role, 'no processes')}",
                "one replica of a role that learns: several would drift apart",
            )


def _check_transfer(transfer: WeightTransfer, teams: Mapping[str, Team]) -> None:
    for role, stage in (transfer.giver, transfer.taker):
        if role not in teams:
            raise _contradiction(Stage(stage, role), f"is done by {role} of {sorted(teams)}")


def _contradiction(stage: Stage, found: str) -> ScheduleError:
    return ScheduleError(
        "ordering the calls of an iteration",
        f"stage {stage.name} {found}",
        "stages with names of their own, each after what it takes, roles that have processes, and"
        " memory that is used up by a stage of the same role",
    )


def opening_of(a_pass: Pass) -> tuple[Stage, ...]:
    """The stages that run ahead: up to the first one that keeps something."""
    keeping = [number for number, stage in enumerate(a_pass.stages) if stage.keeps_until]
    return a_pass.stages[: (keeping[0] if keeping else 0) + 1]


def num_ahead(a_pass: Pass, num_micro_batches: int, depth: int) -> int:
    """Number of micro-batches that are opened before the first one goes on."""
    bounded = any(stage.keeps_until for stage in a_pass.stages)
    return min(depth, num_micro_batches) if bounded else num_micro_batches


def _lags(a_pass: Pass, cycles: Mapping[str, int], most: int) -> dict[str, int]:
    """Micro-batches by which each stage after the opening follows the first of them."""
    stages = a_pass.stages[len(opening_of(a_pass)) :]
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
            lags[stage.name] = min(max(lag, least.get(stage.role, 0) * stage.accumulates), most)
        # Gradients are accumulated in one order: the accumulating stages stay together.
        least = {
            role: max(
                lags[stage.name] for stage in stages if stage.accumulates and stage.role == role
            )
            for role in {stage.role for stage in stages if stage.accumulates}
        }
    return lags


def _roles_before(stage: Stage, stages: Sequence[Stage]) -> set[str]:
    """Roles that a stage depends on, the opening's left out."""
    found: set[str] = set()
    for other in stages:
        if other.name in stage.takes:
            found |= {other.role} | _roles_before(other, stages)
    return found
