"""Finds pool sizes, micro-batches and depth: candidates by arithmetic, the best by simulation.

    m micro-batches of s = batch / m samples
    g generator ranks and f ranks of the fake score share the s samples evenly, t teacher replicas
    any split that fits the GPUs and whose ranks fit their memory is a candidate

A group's ranks work in step, so the simulator sees a group as one process that is as many times
faster: that changes no time and keeps a plan for a thousand GPUs as quick as one for eight.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from cluster.schedule.dealing import MOST_KEPT
from cluster.schedule.program import Team
from cluster.schedule.schedule import STEP, Call, order_calls
from cluster.schedule.simulate import Costs, simulate
from pipelines.config.roles import FAKE_SCORE, GENERATOR, ROLES, TEACHER
from pipelines.planning.hardware import Hardware
from pipelines.planning.memory import (
    RankMemory,
    fake_score_memory,
    generator_memory,
    teacher_memory,
)
from pipelines.planning.stage_times import StageTimes, update_s
from pipelines.planning.traffic import gathered_bytes, result_bytes
from pipelines.planning.workload import TRACKING_STAGES, StageName, Workload, remember
from pipelines.stages.algorithm import TRAINED_WEIGHTS
from sgmd_core.objectives import ComparedStates

MAX_DEPTH = 4
"""Beyond it nothing is gained: three micro-batches in flight keep every role busy."""
_SIMULATED = 12
_ITERATIONS = 2
_TEACHER_RANKS = (1, 2, 4, 8)
_RATIOS = ((1, 1), (4, 3), (3, 2), (2, 1), (3, 4), (2, 3), (1, 2), (3, 1))
"""Fake score to generator; others would need batches of many more samples than there are GPUs."""
_MOST_FREE_PARTS = 33
_AS_FAST = 1.01
"""Times that are taken for equal: then fewer GPUs and less memory decide."""
_NOT_LESS = 1 - 1e-6
"""A sum of seconds that is added up in another order differs by less."""


@dataclass(frozen=True, slots=True)
class PoolSplit:
    """One way to lay a run out.

    Attributes:
        generator: Ranks of the generator.
        teacher: Copies of the teacher.
        fake_score: Ranks of the fake score.
        micro_batches: Parts of the batch.
        depth: Parts in flight.
        teacher_ranks: Ranks that share the network of one teacher replica.
    """

    generator: int
    teacher: int
    fake_score: int
    micro_batches: int
    depth: int = 1
    teacher_ranks: int = 1

    @property
    def num_gpus(self) -> int:
        """GPUs of the three roles."""
        return sum(self.sizes.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Processes of each role."""
        teachers = self.teacher * self.teacher_ranks
        return {GENERATOR: self.generator, TEACHER: teachers, FAKE_SCORE: self.fake_score}

    @property
    def teams(self) -> dict[str, Team]:
        """Processes by role."""
        return {
            GENERATOR: Team(ranks=self.generator),
            TEACHER: Team(self.teacher, self.teacher_ranks),
            FAKE_SCORE: Team(ranks=self.fake_score),
        }


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds and memory of a split.

    Attributes:
        split: The split.
        iteration_s: Seconds an iteration.
        busy: Part of its time that each role works, a mean over its processes.
        memory: Of one rank, by role.
    """

    split: PoolSplit
    iteration_s: float
    busy: dict[str, float]
    memory: dict[str, RankMemory]


def find_best(
    work: Workload,
    times: StageTimes,
    hardware: Hardware,
    num_gpus: int,
    below_s: float = math.inf,
) -> Prediction | None:
    """The fastest split that fits; of equally fast ones the smallest. None if nothing fits.

    Args:
        work: The iteration.
        times: Of its stages.
        hardware: What it runs on.
        num_gpus: For the three roles together, at least 3.
        below_s: Splits in which one role's work takes so long are left out.
    """
    work_s = _work_s_by(work, times, hardware)
    fitting = [
        split
        for split in candidates(work, num_gpus)
        if max(work_s(split, work.batch_size).values()) < below_s and _fits(work, hardware, split)
    ]
    fitting.sort(key=lambda split: _bound_s(work, times, split, work_s))
    found: list[Prediction] = []
    fastest_s = math.inf
    for split in fitting[:_SIMULATED]:
        # No order of its calls makes a role faster than its work.
        least_s = _NOT_LESS * max(work_s(split, work.batch_size).values())
        if least_s > _AS_FAST * fastest_s:
            continue
        for deeper in _depths(work, hardware, split):
            found.append(predict(work, times, hardware, deeper))
            fastest_s = min(fastest_s, found[-1].iteration_s)
    if not found:
        return None
    best = _smallest(found, fastest_s)
    return _with_fewer_teachers(work, times, hardware, best, fastest_s)


def find_batch(work: Workload, times: StageTimes, hardware: Hardware, num_gpus: int) -> int:
    """The batch size near the workload's with which the GPUs make most samples a second.

    Ranks of a group share a micro-batch evenly, so the size decides which splits there are: with
    16 samples there can be no generator of 3 ranks.

    Returns:
        A size within a quarter of the workload's, up or down; its own if no other is better, and
        where a rank has pairs of samples, with a discriminator, or where ranks work on samples
        together: classic pools are not planned for these two.
    """
    if work.heads is not None or work.ulysses or work.paired:
        return work.batch_size
    best: tuple[float, int] = (float("inf"), work.batch_size)
    work_s = _work_s_by(work, times, hardware)
    for split, size in _free_splits(work.batch_size, num_gpus):
        sized = replace(work, batch_size=size)
        per_sample_s = _bound_s(sized, times, split, work_s) / size
        if per_sample_s < 0.999 * best[0] and _fits(sized, hardware, replace(split, depth=2)):
            best = (per_sample_s, size)
    return best[1]


def candidates(work: Workload, num_gpus: int) -> Iterator[PoolSplit]:
    """Every split that a schedule allows, with as many teachers as there is room and use for.

    None for a method with a discriminator, or where ranks work on samples together: these are
    planned in shared pools alone.
    """
    if work.heads is not None or work.ulysses:
        return
    for micro_batches in _divisors(work.batch_size):
        samples = work.batch_size // micro_batches
        for generator, fake_score in product(_divisors(samples), repeat=2):
            for ranks in _TEACHER_RANKS if work.suits(micro_batches, fake_score) else ():
                left = (num_gpus - generator - fake_score) // ranks
                if left >= 1 and samples % ranks == 0:
                    teacher = min(left, work.batch_size // ranks)
                    yield PoolSplit(
                        generator, teacher, fake_score, micro_batches, teacher_ranks=ranks
                    )


def _free_splits(batch_size: int, num_gpus: int) -> Iterator[tuple[PoolSplit, int]]:
    """Splits over all GPUs with group sizes in simple ratios, and batch sizes that suit them."""
    for generator in range(1, num_gpus - 1):
        for (part, parts), ranks in product(_RATIOS, _TEACHER_RANKS):
            fake_score = generator * part // parts
            replicas = (num_gpus - generator - fake_score) // ranks
            if generator * part % parts or fake_score < 1 or replicas < 1:
                continue
            samples = math.lcm(generator, fake_score, ranks)
            for micro_batches in range(2, _MOST_FREE_PARTS):
                size = micro_batches * samples
                if 3 * batch_size <= 4 * size and 4 * size <= 5 * batch_size:
                    replicas = min(replicas, size // ranks)
                    yield PoolSplit(generator, replicas, fake_score, micro_batches, 1, ranks), size


def rank_memory(work: Workload, split: PoolSplit) -> dict[str, RankMemory]:
    """Returns the memory of a rank of each role."""
    samples = -(-work.batch_size // split.micro_batches)
    open_at_once = min(split.depth, split.micro_batches)
    own = {
        role: work.samples_of_a_rank(role, samples, ranks)
        for role, ranks in ((GENERATOR, split.generator), (FAKE_SCORE, split.fake_score))
    }
    of_teacher = work.samples_of_a_rank(TEACHER, samples, split.teacher_ranks * split.teacher)
    # A prediction that a discriminator compares is kept until its signal comes back.
    waits = work.kind.compared is ComparedStates.STEPS
    graphs = min(MOST_KEPT, open_at_once) if waits else 1
    return {
        GENERATOR: generator_memory(
            work, split.generator, own[GENERATOR], open_at_once * own[GENERATOR]
        ),
        TEACHER: teacher_memory(work, split.teacher_ranks, of_teacher),
        FAKE_SCORE: fake_score_memory(
            work, split.fake_score, own[FAKE_SCORE], graphs * own[FAKE_SCORE]
        ),
    }


def any_split_fits(work: Workload, hardware: Hardware, num_gpus: int) -> bool:
    """Returns True if classic pools of some sizes fit."""
    return any(_fits(work, hardware, split) for split in candidates(work, num_gpus))


def predict(work: Workload, times: StageTimes, hardware: Hardware, split: PoolSplit) -> Prediction:
    """Simulates some iterations of a split."""
    # The same splits are asked for with GPUs of several sizes, which change no seconds.
    seconds = tuple(times.seconds.items())
    iteration_s, busy = _simulated(work, seconds, hardware.unbound, split)
    return Prediction(split, iteration_s, dict(busy), rank_memory(work, split))


@remember
def _simulated(
    work: Workload,
    seconds: tuple[tuple[StageName, float], ...],
    hardware: Hardware,
    split: PoolSplit,
) -> tuple[float, Mapping[str, float]]:
    """Seconds of an iteration, and the part of its time that each role works."""
    timeline = simulate(*_schedule(work, dict(seconds), hardware, split))
    whole_s = timeline.duration_s
    busy = {role: 0.0 for role in ROLES}
    for usage in timeline.usage():
        count = split.teams[TEACHER].size if usage.role == TEACHER else 1
        busy[usage.role] += usage.busy_s / whole_s / count
    return timeline.iteration_s, busy


def _schedule(
    work: Workload, seconds: Mapping[StageName, float], hardware: Hardware, split: PoolSplit
) -> tuple[list[Call], Costs, dict[str, Team]]:
    teams = {GENERATOR: Team(), TEACHER: split.teams[TEACHER], FAKE_SCORE: Team()}
    samples = work.batch_size // split.micro_batches
    calls = order_calls(
        work.program,
        teams,
        split.micro_batches,
        split.depth,
        samples_per_micro_batch=samples,
        iterations=range(_ITERATIONS),
    )
    return calls, _costs(work, seconds, hardware, split, samples), teams


def _costs(
    work: Workload,
    sample_s: Mapping[StageName, float],
    hardware: Hardware,
    split: PoolSplit,
    samples: int,
) -> Costs:
    teams, weights = split.teams, 4 * work.shape.num_parameters
    step_s = {role: update_s(work, hardware, role, teams[role].ranks) for role in ROLES}
    gathered, sent = gathered_bytes(work), result_bytes(work)
    # A process takes what concerns its own samples: the largest share is what the others wait for.
    share = samples / min(samples, *(team.size for team in teams.values()))

    def seconds(call: Call) -> float:
        name = (call.role, call.stage)
        if call.micro_batch is None:
            return step_s[call.role] if call.stage == STEP else step_s[call.role] / 10
        folded = 1 if call.role == TEACHER else teams[call.role].ranks
        working_s = sample_s[name] * call.num_samples / folded
        # Weights are gathered while the layer before computes.
        return max(working_s, hardware.gather_s(gathered[name], teams[call.role].ranks))

    def bytes_of(call: Call) -> float:
        # The weights are handed over whole, whatever the number of samples.
        if call.stage == TRAINED_WEIGHTS.name:
            return weights
        return sent.get((call.role, call.stage), 0) * share

    return hardware.costs(seconds, bytes_of)


def _bound_s(
    work: Workload,
    times: StageTimes,
    split: PoolSplit,
    work_s: Callable[[PoolSplit, int], dict[str, float]],
) -> float:
    """About what an iteration takes: the busiest role, and what the others do before and after."""
    samples = work.batch_size // split.micro_batches
    own, sizes = work_s(split, work.batch_size), split.sizes
    one = {role: 0.0 for role in ROLES}
    for (role, stage), seconds in times.seconds.items():
        if (role, stage) not in TRACKING_STAGES:
            one[role] += seconds * samples / min(sizes[role], samples)
    # A role is idle while the first micro-batch is on its way to it, and after the last one.
    return max(own[role] + sum(one.values()) - one[role] for role in ROLES)


def _work_s_by(
    work: Workload, times: StageTimes, hardware: Hardware
) -> Callable[[PoolSplit, int], dict[str, float]]:
    """Seconds that each role works in an iteration of a split and a batch of some samples.

    A call takes as long as its samples, or as gathering the weights for it.
    """
    gathered = gathered_bytes(work)

    def work_s(split: PoolSplit, batch_size: int) -> dict[str, float]:
        own = {role: 0.0 for role in ROLES}
        for name, seconds in times.seconds.items():
            team = split.teams[name[0]]
            spent_s = seconds * batch_size / team.size
            if team.replicas == 1:
                gather_s = hardware.gather_s(gathered[name], team.ranks)
                spent_s = max(spent_s, split.micro_batches * gather_s)
            own[name[0]] += spent_s * work.updates_with(name)
        return own

    return work_s


def _fits(work: Workload, hardware: Hardware, split: PoolSplit) -> bool:
    return all(one.fits(hardware) for one in rank_memory(work, split).values())


def _depths(work: Workload, hardware: Hardware, split: PoolSplit) -> Iterator[PoolSplit]:
    for depth in range(1, min(MAX_DEPTH, split.micro_batches) + 1):
        deeper = replace(split, depth=depth)
        if _fits(work, hardware, deeper):
            yield deeper


def _smallest(found: Sequence[Prediction], fastest_s: float) -> Prediction:
    """The one that takes least, of those that are as fast as the fastest."""
    equal = [one for one in found if one.iteration_s <= _AS_FAST * fastest_s]
    return min(equal, key=lambda one: (one.split.num_gpus, one.split.depth, one.iteration_s))


def _with_fewer_teachers(
    work: Workload, times: StageTimes, hardware: Hardware, best: Prediction, fastest_s: float
) -> Prediction:
    """The same split without teachers that nobody waits for."""
    low, high, found = 1, best.split.teacher, best
    while low < high:
        middle = (low + high) // 2
        fewer = predict(work, times, hardware, replace(best.split, teacher=middle))
        if _fits(work, hardware, fewer.split) and fewer.iteration_s <= _AS_FAST * fastest_s:
            high, found = middle, fewer
        else:
            low = middle + 1
    return found


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]
