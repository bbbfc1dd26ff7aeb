"""Resource requests of worker groups: pools, as plain records.

Pool("painter", num_ranks=2, cpus_per_rank=1)      bundles 0, 1
Pool("judge", num_ranks=1, gpus_per_rank=1)        bundle  2
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cluster.errors import ClusterError

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
"""Placement of a pool's ranks on the machines, as Ray defines it: on few or on many, if possible,
or (strict) necessarily on one or each on another."""


@dataclass(frozen=True, slots=True)
class Pool:
    """The resources of one group: one bundle per rank.

    Attributes:
        name: Name of the group.
        num_ranks: Processes.
        cpus_per_rank: CPU share of each; scheduling only, it limits nothing. Ray also gives each
            process this many OpenMP threads, at least one.
        gpus_per_rank: GPUs of each, 0 on a cluster without.
        resources: Custom resources of each, by the name under which machines offer them.
        labels: Which machines will do: label selectors by key, `value`, `!value`, `in(a, b)` or
            `!in(a, b)`.
        strategy: How the ranks lie on the machines.
    """

    name: str
    num_ranks: int = 1
    cpus_per_rank: float = 1.0
    gpus_per_rank: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    strategy: Strategy = "PACK"

    def __post_init__(self) -> None:
        """Refuses a pool without ranks or without resources.

        Raises:
            ClusterError: A count is negative, or nothing is asked for.
        """
        amounts = (self.cpus_per_rank, self.gpus_per_rank, *self.resources.values())
        if self.num_ranks < 1 or min(amounts) < 0 or not any(amounts):
            raise ClusterError(
                f"planning pool {self.name}",
                f"{self.num_ranks} ranks of {self.cpus_per_rank} CPU, {self.gpus_per_rank} GPU and "
                f"{dict(self.resources)}",
                "at least one rank, and some CPU, GPU or other resource for each",
            )

    @property
    def bundle(self) -> dict[str, float]:
        """Returns the resources of one rank in Ray's spelling, without zeros."""
        asked = {"CPU": self.cpus_per_rank, "GPU": self.gpus_per_rank, **self.resources}
        return {kind: float(amount) for kind, amount in asked.items() if amount}


def bundles_of(pools: Sequence[Pool]) -> list[dict[str, float]]:
    """The bundles of all pools, in the order in which `Placement` counts them."""
    names = [pool.name for pool in pools]
    if len(set(names)) < len(names):
        raise ClusterError("planning the pools of a run", f"names {names}", "a name for each pool")
    return [pool.bundle for pool in pools for _ in range(pool.num_ranks)]


def selectors_of(pools: Sequence[Pool]) -> list[dict[str, str]]:
    """The label selectors of all bundles, in the same order."""
    return [dict(pool.labels) for pool in pools for _ in range(pool.num_ranks)]
