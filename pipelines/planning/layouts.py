"""Layouts of a run on some GPUs: named pools, classic pools, all roles together.

    map     learn: generator and a copy of the teacher | score: fake score and another copy
    pools   generator | teacher, replicas | fake score
    fused   all roles on every GPU, one after the other

A discriminator, where the method has one, is on one of the two pools; with classic pools of its own
it is not planned.

Each is the exact schedule of calls, worked through by the simulator, with the memory of a rank of
every pool. A pool's ranks work in step, so the simulator sees it as one process.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Self

from cluster.schedule.program import Home, Team, split_evenly
from cluster.schedule.schedule import STEP, Call, order_calls
from cluster.schedule.simulate import Costs, simulate
from pipelines.config.roles import DISCRIMINATOR, FAKE_SCORE, GENERATOR, TEACHER
from pipelines.config.topology import FUSED
from pipelines.planning.hardware import GB, Hardware
from pipelines.planning.memory import RankMemory
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
from pipelines.planning.stage_times import StageTimes, update_s
from pipelines.planning.traffic import exchanged_bytes, gathered_bytes, result_bytes
from pipelines.planning.workload import StageName, Workload
from pipelines.stages.algorithm import MIX_WEIGHTS, ROLLOUT, TRAINED_WEIGHTS
from sgmd_core.errors import ConfigError

ACCELERATOR = "ray.io/accelerator-type"
"""Label that Ray gives a machine by its GPUs."""
_SIMULATED, _SIMULATED_LONG, _SIMULATED_FUSED = 16, 2, 8
AS_FAST = 1.005
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
        kind: Name of its kind of GPU, where there are several.
        speed: Of one of its GPUs, over that of the first kind.
    """

    gpus: int
    roles: tuple[str, ...]
    samples_per_call: float
    busy: float
    memory: RankMemory
    kind: str = ""
    speed: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """As `sgmd plan --json` prints it."""
        return {
            "gpus": self.gpus,
            "roles": list(self.roles),
            "samples_per_call": self.samples_per_call,
            "busy": self.busy,
            "memory_gb": self.memory.to_json(),
            **({"kind": self.kind, "speed": self.speed} if self.kind else {}),
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
        alone: The only kind of GPU in use, where there are several.
    """

    name: str
    iteration_s: float
    pools: Mapping[str, PoolUse]
    settings: Mapping[str, Any]
    gathered_bytes: float
    fits: bool
    alone: str = ""

    @property
    def num_gpus(self) -> int:
        """GPUs of the three roles."""
        return sum(pool.gpus for pool in self.pools.values())

    @property
    def title(self) -> str:
        """Its name, and the kind of GPU that it leaves the others for."""
        return f"{self.name} on {self.alone} alone" if self.alone else self.name

    def on(self, kind: str) -> Self:
        """The same on machines of one kind of GPU, which its pools are pinned to by label."""
        section = "topology.fused" if self.name == FUSED else "topology.pools.{}"
        labels = {f"{section.format(pool)}.labels": {ACCELERATOR: kind} for pool in self.pools}
        return replace(
            self,
            pools={name: replace(pool, kind=kind) for name, pool in self.pools.items()},
            settings={**self.settings, **labels},
            alone=kind,
        )

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
    found = [_simulated(FUSED, work, times, hardware, one, _fused_settings(one)) for one in tried]
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
        _simulated("map", work, times, hardware, deeper, _map_settings(deeper, hardware))
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
        role: _gathered_bytes(work, {role: team.ranks}, {role: split.micro_batches})
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
        role: Team.on(*(_home(work, one, role, pool, hardware) for pool in pools))
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
            ranks,
            one.roles_on(pool),
            max(work.samples_of_a_rank(role, max(sizes), ranks) for role in one.roles_on(pool)),
            busy.get(pool, 0.0),
            memory[pool],
            one.kinds[pool].name if one.kinds else "",
            one.speed_of(pool, hardware),
        )
        for pool, ranks in one.ranks.items()
    }
    gathered = {
        pool: _gathered_bytes(
            work, dict.fromkeys(one.roles_on(pool), ranks), _micro_batches_on(calls, teams, pool)
        )
        for pool, ranks in one.ranks.items()
    }
    fits = one.shares_out(work) and all(
        part.fits(one.hardware_of(pool, hardware)) for pool, part in memory.items()
    )
    return Layout(name, timeline.iteration_s, pools, settings, max(gathered.values()), fits)


def _home(work: Workload, one: PoolMap, role: str, pool: str, hardware: Hardware) -> Home:
    """A pool as one process, faster by its ranks: as fast as the one with the most samples."""
    size = -(-work.batch_size // one.micro_batches)
    most = work.samples_of_a_rank(role, size, one.ranks[pool])
    return Home(pool, 1, speed=one.speed_of(pool, hardware) * size / most)


def _costs(
    work: Workload,
    times: StageTimes,
    hardware: Hardware,
    one: PoolMap,
    teams: Mapping[str, Team],
) -> Costs:
    weights = 4 * work.shape.num_parameters
    gathered, sent, exchanged = gathered_bytes(work), result_bytes(work), exchanged_bytes(work)
    giver, _ = teams[GENERATOR].process(GENERATOR, 0)
    measured = replace(work, ulysses=times.ulysses)
    in_measured = exchanged_bytes(measured)

    def pool_of(call: Call) -> str:
        return teams[call.role].process(call.role, call.rank)[0]

    def seconds(call: Call) -> float:
        pool = pool_of(call)
        ranks, own = one.ranks[pool], one.hardware_of(pool, hardware)
        if call.micro_batch is None:
            step_s = update_s(work, own, call.role, ranks)
            if call.stage == MIX_WEIGHTS.name and pool == giver and ranks > 1:
                # To the first rank it is no way, to the others that of any result.
                return step_s / 10 + own.wire_latency_s + weights / own.wire_bandwidth
            return step_s if call.stage == STEP else step_s / 10
        name = (call.role, call.stage)
        sample_s = times.seconds[name] / one.speed_of(pool, hardware)
        samples = work.samples_of_a_rank(call.role, call.num_samples, ranks)
        # Nothing is computed while ranks that work together exchange tokens for heads.
        exchange_s, measured_s = (
            own.gather_s(num_bytes.get(name, 0.0) * samples * width, width)
            for num_bytes, width in (
                (exchanged, work.ranks_per_sample(call.role)),
                (in_measured, measured.ranks_per_sample(call.role)),
            )
        )
        # Measured seconds contain the exchange of the measured run, in place of this one.
        computing_s = sample_s * samples - measured_s
        if computing_s < 0:
            raise _too_slow_exchange(name, sample_s, measured_s / samples)
        working_s = computing_s + exchange_s
        # Weights are gathered while the layer before computes.
        return max(working_s, own.gather_s(gathered[name], ranks))

    def bytes_of(call: Call) -> float:
        if call.stage == TRAINED_WEIGHTS.name:
            return weights
        # A process takes what concerns its own samples.
        groups = one.ranks[pool_of(call)] // work.ranks_per_sample(call.role)
        share = -(-call.num_samples // groups) if call.micro_batch is not None else 0
        return sent.get((call.role, call.stage), 0) * share

    return hardware.costs(seconds, bytes_of)


def _too_slow_exchange(name: StageName, sample_s: float, exchange_s: float) -> ConfigError:
    return ConfigError(
        "planning with measured times",
        f"{'.'.join(name)} took {sample_s:.3g} s a sample in a run with compute.ulysses, whose "
        f"exchange alone would take {exchange_s:.3g} s",
        "an exchange within the measured time",
        "Say what the measured machine has: --node-bandwidth (--network-bandwidth between several)",
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
    return sum(
        moved
        * work.updates_with((role, stage))
        * micro_batches.get(role, 0)
        * (ranks[role] - 1)
        / ranks[role]
        for (role, stage), moved in gathered_bytes(work).items()
        if role in ranks and (role, stage) in work.passes
    )


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

    A call takes as long as its samples, or as gathering the weights for it.
    """
    gathered = gathered_bytes(work)
    stages = {role: [name for name in times.seconds if name[0] == role] for role in work.roles}

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
                number
                * max(times.seconds[name] * samples / speed, own.gather_s(gathered[name], ranks))
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
