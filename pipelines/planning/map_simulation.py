"""Simulates an iteration of roles on named pools: its time, and the use of each pool.

The exact schedule of calls is worked through by the simulator. A pool's ranks work in step, so the
simulator sees it as one process.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster.schedule.program import Home, Team, split_evenly
from cluster.schedule.schedule import STEP, Call, order_calls
from cluster.schedule.simulate import Costs, simulate
from pipelines.config.roles import GENERATOR
from pipelines.planning.hardware import Hardware
from pipelines.planning.planned_layout import Layout, PoolUse
from pipelines.planning.pool_maps import (
    PoolMap,
    map_memory,
)
from pipelines.planning.stage_times import StageTimes, update_s
from pipelines.planning.stage_work import units_by_stage
from pipelines.planning.traffic import exchanged_bytes, gathered_bytes, result_bytes
from pipelines.planning.workload import StageName, Workload
from pipelines.stages.algorithm import MIX_WEIGHTS, TRAINED_WEIGHTS
from sgmd_core.errors import ConfigError


def simulate_map(
    name: str,
    work: Workload,
    times: StageTimes,
    hardware: Hardware,
    one: PoolMap,
    settings: Mapping[str, Any],
) -> Layout:
    """Works the schedule of a map through; every pool is one process.

    Args:
        name: Kind of layout.
        work: The iteration.
        times: Of its stages.
        hardware: What it runs on.
        one: Ranks of the pools, and the pools of each role.
        settings: Settings of the recipe for it.

    Raises:
        ConfigError: A measured time is shorter than the exchange that it contains.
    """
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
        pool: received_weight_bytes(
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
    gathered, sent = gathered_bytes(work), result_bytes(work)
    exchanges_s = exchanges_s_by(work, times)
    giver, _ = teams[GENERATOR].process(GENERATOR, 0)

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
        exchange_s, measured_s = exchanges_s(own, name, samples)
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


def exchanges_s_by(
    work: Workload, times: StageTimes
) -> Callable[[Hardware, StageName, float], tuple[float, float]]:
    """Seconds in which ranks that work together exchange tokens for heads, by stage and samples.

    Args:
        work: The iteration.
        times: Of its stages.

    Returns:
        A function of the GPUs, a stage and the samples of a rank: the seconds of this iteration,
        and those that measured times of the stage contain.
    """
    measured = replace(work, ulysses=times.ulysses)
    both = [(exchanged_bytes(one), one.ranks_per_sample) for one in (work, measured)]

    def exchanges_s(own: Hardware, name: StageName, samples: float) -> tuple[float, float]:
        planned_s, measured_s = (
            own.gather_s(num_bytes.get(name, 0.0) * samples * width_of(name[0]), width_of(name[0]))
            for num_bytes, width_of in both
        )
        return planned_s, measured_s

    return exchanges_s


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


def received_weight_bytes(
    work: Workload, ranks: Mapping[str, int], micro_batches: Mapping[str, float]
) -> float:
    """Bytes of weights and gradients that a rank is sent in an iteration.

    Args:
        work: The iteration.
        ranks: That share the network of each role on the rank's GPU.
        micro_batches: That each of these roles works on.
    """
    return sum(
        moved
        * work.updates_with((role, stage))
        * micro_batches.get(role, 0)
        * (ranks[role] - 1)
        / ranks[role]
        for (role, stage), moved in gathered_bytes(work).items()
        if role in ranks and (role, stage) in units_by_stage(work)
    )
