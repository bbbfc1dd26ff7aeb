"""Smaller topologies for a run that has lost a machine for which no other one comes.

    same pools, fewer ranks in each  ->  all roles in one pool  ->  the same with fewer ranks

The largest that fits on what is left is taken. Pools change no number of a run, and ranks change
the order of sums alone, so the run goes on from its newest checkpoint as one that is resumed with
`topology` settings of its own. It stays on the smaller topology: one more loss, or a resume by
hand, plans again.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster.ray.pools import Pool
from pipelines.config.recipe import DistillConfig
from pipelines.config.topology import FUSED, RolePoolSettings
from pipelines.distillation.pools import pools_of
from sgmd_core.errors import ConfigError

_SETTLE_S, _LONGEST_S = 1.0, 15.0


def smaller_topologies(config: DistillConfig) -> list[DistillConfig]:
    """The run with fewer processes, those with most first; the roles' light helpers stay.

    Args:
        config: The run.
    """
    found: list[DistillConfig] = []
    for settings in (*_fewer_ranks(config), *_together(config)):
        try:
            found.append(config.with_settings(settings))
        except ConfigError:
            # A batch, a method or a transport does not allow it.
            continue
    found = [each for each in found if _size(each) < _size(config)]
    # A stable order: of two with as many processes, the one that keeps the pools apart.
    return sorted(found, key=_size, reverse=True)


def topology_in_words(config: DistillConfig) -> str:
    """Mode and ranks of a run's pools: `fused (fused 2)`."""
    pools = config.topology.role_pools_of(config.roles)
    ranks = ", ".join(f"{name} {pool.ranks}" for name, pool in pools.items())
    return f"{config.topology.mode} ({ranks})"


def fitting_topology(config: DistillConfig) -> DistillConfig | None:
    """The largest smaller topology that the connected cluster has room for now; None: none.

    The run's own processes have been ended before; their resources are waited for.
    """
    from cluster.ray.shortage import first_fit, machines

    def fits(pools: Sequence[Pool]) -> bool:
        return all(row.verdict.startswith("fits") for row in first_fit(pools, found))

    found, deadline_s = machines(), time.monotonic() + _LONGEST_S
    while time.monotonic() < deadline_s:
        time.sleep(_SETTLE_S)
        before, found = found, machines()
        if [each.free for each in before] == [each.free for each in found]:
            break
    return next((each for each in smaller_topologies(config) if fits(pools_of(each))), None)


def _fewer_ranks(config: DistillConfig) -> Iterator[Mapping[str, Any]]:
    """Settings of the same pools with half the ranks, a quarter of them, down to one."""
    pools = config.topology.role_pools_of(config.roles)
    if config.topology.mode == FUSED:
        # Which is one pool already.
        return
    at = "topology.pools" if config.topology.mode == "map" else "topology"
    numbers = {f"{at}.{name}.ranks": pool.ranks for name, pool in pools.items()}
    if config.topology.mode == "pools":
        numbers["topology.teacher.replicas"] = config.topology.teacher.replicas
    divisor = 2
    while divisor <= max(numbers.values()):
        yield {key: max(1, number // divisor) for key, number in numbers.items()}
        divisor *= 2


def _together(config: DistillConfig) -> Iterator[Mapping[str, Any]]:
    """Settings of one pool with a rank of every role in each process, with fewer and fewer."""
    pools = list(config.topology.role_pools_of(config.roles).values())
    common = {
        "topology.mode": FUSED,
        f"topology.{FUSED}.cpus": max(pool.cpus for pool in pools),
        f"topology.{FUSED}.gpus": max(pool.gpus for pool in pools),
        f"topology.{FUSED}.labels": _shared([pool.labels for pool in pools]),
        f"topology.{FUSED}.resources": _shared([pool.resources for pool in pools]),
        "topology.max_staleness_iterations": 0,
        "topology.transport": "object_store",
    }
    ranks = max(pool.ranks for pool in pools)
    while ranks:
        yield {**common, f"topology.{FUSED}.ranks": ranks}
        ranks //= 2


def _shared(given: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Entries that all of them have."""
    first, *others = given
    return {
        key: value
        for key, value in first.items()
        if all(other.get(key) == value for other in others)
    }


def _size(config: DistillConfig) -> int:
    """Processes of the roles."""
    pools: Mapping[str, RolePoolSettings] = config.topology.role_pools_of(config.roles)
    return sum(pool.num_ranks for pool in pools_of(config) if pool.name in pools)
