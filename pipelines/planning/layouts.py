"""Finds the fastest layouts of a run on some GPUs.

    map     learn: generator and a copy of the teacher | score: fake score and another copy
    pools   generator | teacher, replicas | fake score
    fused   all roles on every GPU, one after the other

A discriminator, where the method has one, is on one of the two pools; with classic pools of its own
it is not planned.

Candidates are ordered by the least that their work can take; the best of them are simulated.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from pipelines.config.roles import DISCRIMINATOR, FAKE_SCORE, GENERATOR, TEACHER
from pipelines.config.topology import FUSED
from pipelines.planning.hardware import Hardware
from pipelines.planning.map_simulation import (
    exchanges_s_by,
    received_weight_bytes,
    simulate_map,
)
from pipelines.planning.planned_layout import ACCELERATOR, Layout, PoolUse
from pipelines.planning.pool_maps import (
    FEW_MICRO_BATCHES,
    PoolMap,
    fused_map,
    fused_maps,
    map_fits,
    map_memory,
    pool_maps,
)
from pipelines.planning.search import MAX_DEPTH, Prediction
from pipelines.planning.stage_times import StageTimes
from pipelines.planning.traffic import gathered_bytes
from pipelines.planning.workload import StageName, Workload
from pipelines.stages.algorithm import ROLLOUT

_SIMULATED, _SIMULATED_LONG, _SIMULATED_FUSED = 16, 2, 8
AS_FAST = 1.005
"""Times that are taken for equal: then fewer GPUs and micro-batches in flight decide."""


def fused_layout(work: Workload, times: StageTimes, hardware: Hardware, num_gpus: int) -> Layout:
    """The fastest layout with all three roles on every GPU that is used.

    Of equally fast ones it is that of the fewest GPUs and the fewest samples in a call. Where none
    fits, it is the one that takes the least memory.

    Args:
        work: The iteration.
        times: Of its stages.
        hardware: What it runs on.
        num_gpus: For the three roles.
    """
    maps = fused_maps(work, num_gpus) or [fused_map(work, num_gpus)]
    least_s = _least_s_by(work, times, hardware)
    # With small networks the number of calls decides.
    ordered = sorted(maps, key=lambda one: least_s(one) + one.micro_batches * hardware.call_s)
    fitting = (one for one in ordered if map_fits(work, hardware, one))
    tried = [*islice(fitting, _SIMULATED_FUSED)]
    smallest = min(maps, key=lambda one: map_memory(work, one)[FUSED].total)
    if not tried or (smallest not in tried and map_fits(work, hardware, smallest)):
        tried.append(smallest)
    found = [simulate_map(FUSED, work, times, hardware, one, _fused_settings(one)) for one in tried]
    fastest_s = min(one.iteration_s for one in found)
    equal = [one for one in found if one.iteration_s <= AS_FAST * fastest_s]
    return min(equal, key=lambda one: (one.num_gpus, -one.settings["batch.micro_batches"]))


def _fused_settings(one: PoolMap) -> dict[str, Any]:
    return {
        "topology.mode": FUSED,
        "topology.fused.ranks": one.ranks[FUSED],
        "topology.fused.gpus": 1,
        "batch.micro_batches": one.micro_batches,
        "topology.depth": 1,
    }


def map_layout(
    work: Workload,
    times: StageTimes,
    hardware: Hardware,
    num_gpus: int,
    below_s: float = math.inf,
) -> Layout | None:
    """The fastest two pools that fit, the teacher on both or on one; None if nothing fits.

    Args:
        work: The iteration.
        times: Of its stages.
        hardware: What it runs on.
        num_gpus: For the three roles.
        below_s: Pools whose work alone takes so long are left out.
    """
    least_s = _least_s_by(work, times, hardware)
    candidates = (one for one in pool_maps(work, num_gpus) if least_s(one) < below_s)
    return fastest_map(work, times, hardware, candidates)


def fastest_map(
    work: Workload, times: StageTimes, hardware: Hardware, candidates: Iterable[PoolMap]
) -> Layout | None:
    """The fastest of some maps, of equally fast ones the smallest; None if nothing fits."""
    least_s = _least_s_by(work, times, hardware)
    ordered = sorted(
        candidates, key=lambda one: least_s(one) + _start_s(work, times, hardware, one)
    )
    few = (one for one in ordered if one.micro_batches <= FEW_MICRO_BATCHES)
    many = (one for one in ordered if one.micro_batches > FEW_MICRO_BATCHES)
    fitting: list[PoolMap] = []
    # Schedules of many micro-batches take long to work through.
    for some, most in ((few, _SIMULATED), (many, _SIMULATED_LONG)):
        fitting = fitting or [*islice((one for one in some if map_fits(work, hardware, one)), most)]
    found = [
        simulate_map("map", work, times, hardware, deeper, _map_settings(deeper, hardware))
        for one in fitting
        for deeper in _depths(one)
        if map_fits(work, hardware, deeper)
    ]
    if not found:
        return None
    fastest_s = min(one.iteration_s for one in found)
    equal = [one for one in found if one.iteration_s <= AS_FAST * fastest_s]
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
        role: received_weight_bytes(work, {role: team.ranks}, {role: split.micro_batches})
        for role, team in split.teams.items()
    }
    # Copies of the teacher share each micro-batch as far as it has samples for them.
    gathered[TEACHER] *= min(1.0, samples / split.teacher_ranks / split.teacher)
    return Layout("pools", found.iteration_s, pools, settings, max(gathered.values()), fits=True)


def _map_settings(one: PoolMap, hardware: Hardware) -> dict[str, Any]:
    pools: dict[str, dict[str, Any]] = {
        pool: {"ranks": ranks, "gpus": 1} for pool, ranks in one.ranks.items()
    }
    for pool, kind in one.kinds.items():
        pools[pool] |= {"speed": round(one.speed_of(pool, hardware), 4)}
        pools[pool] |= {"labels": {ACCELERATOR: kind.name}}
    return {
        "topology.mode": "map",
        "batch.micro_batches": one.micro_batches,
        "topology.depth": one.depth,
        **({"topology.pools": pools} if one.kinds else _dotted(pools)),
        "topology.roles.generator": one.places[GENERATOR][0],
        "topology.roles.fake_score": one.places[FAKE_SCORE][0],
        "topology.roles.teacher": list(one.places[TEACHER]),
        **{f"topology.roles.{DISCRIMINATOR}": pool for pool in one.places.get(DISCRIMINATOR, ())},
    }


def _dotted(pools: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Settings of the pools that every map of a recipe has, one by one: others of theirs stay."""
    return {
        f"topology.pools.{pool}.{key}": value
        for pool, settings in pools.items()
        for key, value in settings.items()
    }


def _start_s(work: Workload, times: StageTimes, hardware: Hardware, one: PoolMap) -> float:
    """About how long a pool without the generator has nothing to do: during the first rollout."""
    # Where the generator makes no samples, the teacher starts at once, at data.
    rollout_s = times.seconds.get((GENERATOR, ROLLOUT.name), 0.0)
    (learn,) = one.places[GENERATOR]
    size = -(-work.batch_size // one.micro_batches)
    first = work.samples_of_a_rank(GENERATOR, size, one.ranks[learn])
    return rollout_s * first / one.speed_of(learn, hardware)


def _least_s_by(
    work: Workload, times: StageTimes, hardware: Hardware
) -> Callable[[PoolMap], float]:
    """The least that an iteration of a map takes: the pools' work, with the teacher's shared out.

    A call takes as long as its samples, or as gathering the weights for it. Measured times contain
    the exchanges of the measured run, which may be more than this one's.
    """
    gathered, exchanges_s = gathered_bytes(work), exchanges_s_by(work, times)
    stages = {role: [name for name in times.seconds if name[0] == role] for role in work.roles}

    def call_s(own: Hardware, speed: float, name: StageName, samples: float) -> float:
        alone_s = times.seconds[name] * samples / speed
        if not times.ulysses:
            return alone_s
        exchange_s, measured_s = exchanges_s(own, name, samples)
        return alone_s - measured_s + exchange_s

    def busy_s(one: PoolMap, pool: str, role: str) -> float:
        ranks, own = one.ranks[pool], one.hardware_of(pool, hardware)
        speed = one.speed_of(pool, hardware)
        fewest, larger = divmod(work.batch_size, one.micro_batches)
        rounds = [
            (number, work.samples_of_a_rank(role, size, ranks))
            for size, number in ((fewest + 1, larger), (fewest, one.micro_batches - larger))
            if number
        ]
        return sum(
            work.updates_with(name)
            * sum(
                number * max(call_s(own, speed, name, samples), own.gather_s(gathered[name], ranks))
                for number, samples in rounds
            )
            for name in stages[role]
        )

    def least_s(one: PoolMap) -> float:
        load = {
            pool: sum(busy_s(one, pool, role) for role in one.roles_on(pool) if role != TEACHER)
            for pool in one.ranks
        }
        shared_s = shared_out(
            (load[pool], busy_s(one, pool, TEACHER)) for pool in one.places[TEACHER]
        )
        return max(shared_s, *load.values())

    return least_s


def shared_out(pools: Iterable[tuple[float, float]]) -> float:
    """Seconds until pools that share the teacher's calls end, if calls could be cut anywhere.

    Pools with less of other work take more of the calls; one that is busy for longer takes none.

    Args:
        pools: Of each, seconds of its other work, and of all calls if it took them alone.
    """
    rate = level = ends_s = 0.0
    for load_s, calls_s in sorted(pools):
        if not calls_s or (rate and ends_s <= load_s):
            break
        rate += 1 / calls_s
        level += load_s / calls_s
        # Their parts of the calls make one whole.
        ends_s = (1 + level) / rate
    return ends_s


def _depths(one: PoolMap) -> Iterator[PoolMap]:
    for depth in range(1, min(MAX_DEPTH, one.micro_batches) + 1):
        yield replace(one, depth=depth)
