"""Pools of processes that a run reserves, one bundle per rank.

Of a run that borrows its frozen roles, the service that lends them reserves theirs.
"""

import math
import os
from collections.abc import Mapping, Sequence

from cluster.ray.pools import Pool, Strategy
from pipelines.config.recipe import DistillConfig
from pipelines.config.roles import TEACHER
from pipelines.config.topology import PoolSettings

_STRATEGIES: Mapping[str, Strategy] = {
    "pack": "PACK",
    "spread": "SPREAD",
    "strict_pack": "STRICT_PACK",
    "strict_spread": "STRICT_SPREAD",
}
BORROWED = frozenset({TEACHER, "text"})
"""Roles that keep nothing between calls, so that several runs may use one copy."""
# Left outside of the reservation, or Ray Data would never read a row.
_DATA_CPUS = 1.0


def own_cluster_size(config: DistillConfig, bundles: Sequence[Mapping[str, float]]) -> int | None:
    """Logical CPUs of a Ray that we start on this machine; None where a cluster exists.

    On a small machine the roles share cores, which Ray's own count would forbid.
    """
    if config.topology.address is not None or "RAY_ADDRESS" in os.environ:
        return None
    wanted = sum(bundle.get("CPU", 0.0) for bundle in bundles) + _DATA_CPUS
    return max(os.cpu_count() or 1, math.ceil(wanted))


def pools_of(config: DistillConfig) -> list[Pool]:
    """The pools that a run reserves, one bundle per rank."""
    topology = config.topology
    pools = [
        *_role_pools(config),
        _pool("text", topology.text),
        _pool("feed", topology.feed),
    ]
    if config.validation.every:
        pools.append(_pool("validator", topology.validator))
    return pools


def own_pools_of(config: DistillConfig) -> list[Pool]:
    """The pools of a run that borrows its frozen roles."""
    return [pool for pool in pools_of(config) if pool.name not in BORROWED]


def lent_pools_of(config: DistillConfig) -> list[Pool]:
    """The pools of the service that it borrows them from."""
    return [pool for pool in pools_of(config) if pool.name in BORROWED]


def _role_pools(config: DistillConfig) -> list[Pool]:
    topology = config.topology
    replicas = topology.teacher.replicas if topology.mode == "pools" else 1
    return [
        _pool(name, own, own.ranks * (replicas if name == TEACHER else 1))
        for name, own in topology.role_pools_of(config.roles).items()
    ]


def _pool(name: str, settings: PoolSettings, num_ranks: int = 1) -> Pool:
    return Pool(
        name,
        num_ranks,
        settings.cpus,
        settings.gpus,
        resources=settings.resources,
        labels=settings.labels,
        strategy=_STRATEGIES[settings.strategy],
    )
