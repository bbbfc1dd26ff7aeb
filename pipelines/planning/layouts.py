"""Layouts of a run on some GPUs: named pools, classic pools, all roles together.

    map     learn: generator and a copy of the teacher | score: fake score and another copy
    pools   generator | teacher, replicas | fake score
    fused   all roles on every GPU, one after the other

A discriminator, where the method has one, is on one of the two pools; with classic pools of its own
it is not planned.

Each is the exact schedule of calls, worked through by the simulator, with the memory of a rank of
every pool. A pool's ranks work in step, so the simulator sees it as one process.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.schedule.program import Home, Team, split_evenly
from cluster.schedule.schedule import Call, order_calls
from cluster.schedule.simulate import Costs, simulate
from pipelines.config.roles import DISCRIMINATOR, FAKE_SCORE, GENERATOR, TEACHER
from pipelines.config.topology import FUSED
from pipelines.planning.hardware import GB, Hardware
from pipelines.planning.memory import RankMemory
from pipelines.planning.pool_maps import LEARN, PoolMap, fused_map, map_fits, map_memory, pool_maps
from pipelines.planning.search import Prediction
from pipelines.planning.stage_times import StageTimes, update_s
from pipelines.planning.workload import Workload

_MAX_DEPTH = 4
_SIMULATED = 16
_AS_FAST = 1.005
"""Times that are taken for equal: then fewer GPUs and micro-batches in flight decide."""


@dataclass(frozen=True, slots=True)
class PoolUse:
    """Use of one pool.

    Attributes:
        gpus: Its GPUs.
        roles: Roles that live on it.
        samples_per_call: Most samples of one of its ranks in a call.
        busy: Part of its time that it works.
        memory: Of one rank.
    """

    gpus: int
    roles: tuple[str, ...]
    samples_per_call: float
    busy: float
    memory: RankMemory

    def to_json(self) -> dict[str, Any]:
        """As `sgmd plan --json` prints it."""
        return {
            "gpus": self.gpus,
            "roles": list(self.roles),
            "samples_per_call": self.samples_per_call,
            "busy": self.busy,
            "memory_gb": self.memory.to_json(),
        }


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout of the three roles, and its costs.

    Attributes:
        name: `map`, `pools` or `fused`, the recipe's `topology.mode`.
        iteration_s: Seconds an iteration.
        pools: Its pools by name.
        settings: Settings of the recipe for it.
        gathered_bytes: Weights that a GPU is sent in an iteration, the most of any pool.
        fits: Whether a GPU of every pool holds its ranks.
    """

    name: str
    iteration_s: float
    pools: Mapping[str, PoolUse]
    settings: Mapping[str, Any]
    gathered_bytes: float
    fits: bool

    @property
    def num_gpus(self) -> int:
        """GPUs of the three roles."""
        return sum(pool.gpus for pool in self.pools.values())

    def to_json(self) -> dict[str, Any]:
        """As `sgmd plan --json` prints it."""
        return {
            "iteration_s": self.iteration_s,
            "gpus": self.num_gpus,
            "fits": self.fits,
            "gathered_gb": round(self.gathered_bytes / GB, 2),
            "settings": dict(self.settings),
            "pools": {name: pool.to_json() for name, pool in self.pools.items()},
        }


def fused_layout(work: Workload, times: StageTimes, hardware: Hardware, num_gpus: int) -> Layout:
    """All three roles on every GPU that shortens the iteration, one sample a rank at a time."""
    one = fused_map(work, num_gpus)
    settings = {
        "topology.mode": "fused",
        "topology.fused.ranks": one.ranks[FUSED],
        "topology.fused.gpus": 1,
        "batch.micro_batches": one.micro_batches,
        "topology.depth": 1,
    }
    return _simulated("fused", work, times, hardware, one, settings)


def map_layout(
    work: Workload, times: StageTimes, hardware: Hardware, num_gpus: int
) -> Layout | None:
    """The fastest two pools that fit, the teacher on both or on one; None if nothing fits."""
    fitting = [
        one for one in pool_maps(work, num_gpus) if map_fits(work, hardware, replace(one, depth=1))
    ]
    fitting.sort(key=lambda one: _bound_s(work, times, one))
    found = [
        _simulated("map", work, times, hardware, deeper, _map_settings(deeper))
        for one in fitting[:_SIMULATED]
        for deeper in _depths(one)
        if map_fits(work, hardware, deeper)
    ]
    if not found:
        return None
    fastest_s = min(one.iteration_s for one in found)
    equal = [one for one in found if one.iteration_s <= _AS_FAST * fastest_s]
    return min(equal, key=lambda one: (one.num_gpus, one.settings["topology.depth"]))


def pools_layout(work: Workload, found: Prediction) -> Layout:
    """Classic pools, as `pipelines.planning.search` has found them."""
    split = found.split
    samples = work.batch_size // split.micro_batches
    settings = {
        "topology.mode": "pools",
        "batch.micro_batches": split.micro_batches,
        "topology.depth": split.depth,
        "topology.generator.ranks": split.generator,
        "topology.teacher.replicas": split.teacher,
        "topology.teacher.ranks": split.teacher_ranks,
        "topology.fake_score.ranks": split.fake_score,
        **{f"topology.{role}.gpus": 1 for role in split.teams},
    }
    pools = {
        role: PoolUse(
            team.size,
            (role,),
            samples / min(samples, team.size),
            found.busy[role],
            found.memory[role],
        )
        for role, team in split.teams.items()
    }
    gathered = {
        role: _gathered_bytes(work, {role: team.ranks}, {role: split.micro_batches})
        for role, team in split.teams.items()
    }
    # Copies of the teacher share each micro-batch as far as it has samples for them.
    gathered[TEACHER] *= min(1.0, samples / split.teacher_ranks / split.teacher)
    return Layout("pools", found.iteration_s, pools, settings, max(gathered.values()), fits=True)


def _map_settings(one: PoolMap) -> dict[str, Any]:
    return {
        "topology.mode": "map",
        "batch.micro_batches": one.micro_batches,
        "topology.depth": one.depth,
        **{f"topology.pools.{pool}.ranks": ranks for pool, ranks in one.ranks.items()},
        **{f"topology.pools.{pool}.gpus": 1 for pool in one.ranks},
        "topology.roles.generator": one.places[GENERATOR][0],
        "topology.roles.fake_score": one.places[FAKE_SCORE][0],
        "topology.roles.teacher": list(one.places[TEACHER]),
        **{f"topology.roles.{DISCRIMINATOR}": pool for pool in one.places.get(DISCRIMINATOR, ())},
    }


def _simulated(
    name: str,
    work: Workload,
    times: StageTimes,
    hardware: Hardware,
    one: PoolMap,
    settings: Mapping[str, Any],
) -> Layout:
    """Works the schedule of a map through; every pool is one process."""
    sizes = split_evenly(work.batch_size, one.micro_batches)
    teams = {
        role: Team.on(*(_home(one, pool, sizes) for pool in pools))
        for role, pools in one.places.items()
    }
    calls = order_calls(
        work.program,
        teams,
        one.micro_batches,
        one.depth,
        samples_per_micro_batch=sizes,
        stage_seconds=times.seconds,
    )
    timeline = simulate(calls, _costs(work, times, hardware, one, teams), teams)
    busy = {usage.role: usage.busy_share for usage in timeline.usage()}
    memory = map_memory(work, one)
    pools = {
        pool: PoolUse(
            ranks, one.roles_on(pool), -(-max(sizes) // ranks), busy.get(pool, 0.0), memory[pool]
        )
        for pool, ranks in one.ranks.items()
    }
    gathered = {
        pool: _gathered_bytes(
            work, dict.fromkeys(one.roles_on(pool), ranks), _micro_batches_on(calls, teams, pool)
        )
        for pool, ranks in one.ranks.items()
    }
    fits = all(part.fits(hardware) for part in memory.values())
    return Layout(name, timeline.iteration_s, pools, settings, max(gathered.values()), fits)


def _home(one: PoolMap, pool: str, sizes: Sequence[int]) -> Home:
    """A pool as one process, faster by its ranks: as fast as the one with the most samples."""
    size = max(sizes)
    return Home(pool, 1, speed=size / -(-size // one.ranks[pool]))


def _costs(
    work: Workload,
    times: StageTimes,
    hardware: Hardware,
    one: PoolMap,
    teams: Mapping[str, Team],
) -> Costs:
    weights = 4 * work.shape.num_parameters
    gathered, sent = work.gathered_bytes, work.result_bytes

    def ranks_of(call: Call) -> int:
        return one.ranks[teams[call.role].process(call.role, call.rank)[0]]

    def seconds(call: Call) -> float:
        ranks = ranks_of(call)
        if call.micro_batch is None:
            step_s = update_s(work, hardware, call.role, ranks)
            return step_s if call.stage == "step" else step_s / 10
        name = (call.role, call.stage)
        working_s = times.seconds[name] * -(-call.num_samples // ranks)
        # Weights are gathered while the layer before computes.
        return max(working_s, hardware.gather_s(gathered[name], ranks))

    def result_bytes(call: Call) -> float:
        if call.stage == "trained_weights":
            return weights
        # A process takes what concerns its own samples.
        share = -(-call.num_samples // ranks_of(call)) if call.micro_batch is not None else 0
        return sent.get((call.role, call.stage), 0) * share

    return Costs(
        seconds,
        result_bytes,
        bandwidth=hardware.wire_bandwidth,
        latency_s=hardware.wire_latency_s,
        call_s=hardware.call_s,
        answer_s=hardware.answer_s,
    )


def _micro_batches_on(
    calls: Sequence[Call], teams: Mapping[str, Team], pool: str
) -> dict[str, float]:
    """Micro-batches of each role that are worked on by a pool."""
    found: dict[str, set[int]] = {}
    for call in calls:
        if call.micro_batch is None:
            continue
        if teams[call.role].process(call.role, call.rank)[0] == pool:
            found.setdefault(call.role, set()).add(call.micro_batch)
    return {role: len(micro_batches) for role, micro_batches in found.items()}


def _gathered_bytes(
    work: Workload, ranks: Mapping[str, int], micro_batches: Mapping[str, float]
) -> float:
    """Bytes of weights and gradients that a rank is sent in an iteration."""
    updates = max(1, work.fresh_updates)
    return sum(
        moved
        * (updates if stage in ("sample", "track") else 1)
        * micro_batches.get(role, 0)
        * (ranks[role] - 1)
        / ranks[role]
        for (role, stage), moved in work.gathered_bytes.items()
        if role in ranks and (role, stage) in work.passes
    )


def _bound_s(work: Workload, times: StageTimes, one: PoolMap) -> float:
    """About what an iteration takes: the pools' work with the teacher's shared out, and a start."""
    sizes = split_evenly(work.batch_size, one.micro_batches)
    rounds = {pool: sum(-(-size // ranks) for size in sizes) for pool, ranks in one.ranks.items()}
    own: dict[str, float] = dict.fromkeys(one.places, 0.0)
    for (role, stage), seconds in times.seconds.items():
        updates = max(1, work.fresh_updates) if stage in ("sample", "track") else 1
        own[role] += seconds * updates
    load = {
        pool: rounds[pool] * sum(own[role] for role in one.roles_on(pool) if role != TEACHER)
        for pool in one.ranks
    }
    teacher = {pool: rounds[pool] * own[TEACHER] for pool in one.places[TEACHER]}
    if len(teacher) == 1:
        (pool,) = teacher
        load[pool] += teacher[pool]
        whole_s = max(load.values())
    else:
        # The part of the calls on the first pool that makes both end together.
        first, second = teacher
        part = (load[second] + teacher[second] - load[first]) / (teacher[first] + teacher[second])
        part = min(1.0, max(0.0, part))
        whole_s = max(
            load[first] + part * teacher[first], load[second] + (1 - part) * teacher[second]
        )
    # Where the generator makes no samples, the teacher starts at once, at data.
    rollout_s = times.seconds.get((GENERATOR, "rollout"), 0.0)
    first_s = rollout_s * -(-sizes[0] // one.ranks[LEARN])
    return whole_s + first_s


def _depths(one: PoolMap) -> Iterator[PoolMap]:
    for depth in range(1, min(_MAX_DEPTH, one.micro_batches) + 1):
        yield replace(one, depth=depth)
