"""Which group gets which resources: pools, and the one placement group of a run.

    Pool("painter", num_ranks=2, cpus_per_rank=1)      bundles 0, 1
    Pool("judge", num_ranks=1, gpus_per_rank=1)        bundle  2

One reservation for the whole run is all or nothing: two runs that each hold half of what they need
would wait for each other for ever. PACK keeps the ranks on as few machines as possible. CPUs that
no pool asks for stay free for Ray Data, which starves on a cluster that is reserved to the last
core.

A run inside a Ray Tune trial finds itself in the trial's placement group already: bundle 0 is the
trial's own process, the pools follow in order, and `Placement.adopt_current` takes them over.

Ray shows each process only the GPUs of its rank (CUDA_VISIBLE_DEVICES). On NVSwitch machines this
has slowed down or broken NCCL between ranks of one group, so a pool whose ranks talk NCCL to one
another should run with RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1 and choose its device from
`ray.get_gpu_ids()` (https://github.com/ray-project/ray/issues/61073).
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import ClusterError, InsufficientResourcesError

_log = logging.getLogger(__name__)

_QUIET_S = 15.0


@dataclass(frozen=True, slots=True)
class Pool:
    """The resources of one group: one bundle a rank.

    Attributes:
        name: Name of the group.
        num_ranks: Processes.
        cpus_per_rank: CPU share of each; scheduling only, it limits nothing. Ray also gives each
            process this many OpenMP threads, at least one.
        gpus_per_rank: GPUs of each, 0 on a cluster without.
    """

    name: str
    num_ranks: int = 1
    cpus_per_rank: float = 1.0
    gpus_per_rank: float = 0.0

    def __post_init__(self) -> None:
        """Refuses a pool without ranks or without resources.

        Raises:
            ClusterError: A count is negative, or nothing is asked for.
        """
        asked = self.cpus_per_rank + self.gpus_per_rank
        if self.num_ranks < 1 or min(self.cpus_per_rank, self.gpus_per_rank) < 0 or asked == 0:
            raise ClusterError(
                f"planning pool {self.name}",
                f"{self.num_ranks} ranks of {self.cpus_per_rank} CPU and {self.gpus_per_rank} GPU",
                "at least one rank, and some CPU or GPU for each",
            )

    @property
    def bundle(self) -> dict[str, float]:
        """What one rank asks for, as Ray spells it; zeros are left out."""
        asked = {"CPU": float(self.cpus_per_rank), "GPU": float(self.gpus_per_rank)}
        return {kind: amount for kind, amount in asked.items() if amount}


def bundles_of(pools: Sequence[Pool]) -> list[dict[str, float]]:
    """The bundles of all pools, in the order in which `Placement` counts them."""
    names = [pool.name for pool in pools]
    if len(set(names)) < len(names):
        raise ClusterError("planning the pools of a run", f"names {names}", "a name for each pool")
    return [pool.bundle for pool in pools for _ in range(pool.num_ranks)]


class Placement:
    """Reserved resources, by pool and rank; a context manager that gives them back.

    Args:
        group: Ray's placement group.
        pools: In the order of its bundles.
        first_bundle: Bundle of the first rank of the first pool.
        owned: Whether to give the resources back at the end; an adopted group belongs to Ray Tune.
    """

    def __init__(
        self, group: PlacementGroup, pools: Sequence[Pool], *, first_bundle: int, owned: bool
    ) -> None:
        self._group = group
        self._owned = owned
        self._pools = {pool.name: pool for pool in pools}
        self._first_bundles: dict[str, int] = {}
        for pool in pools:
            self._first_bundles[pool.name] = first_bundle
            first_bundle += pool.num_ranks

    @classmethod
    def adopt_current(cls, pools: Sequence[Pool]) -> Self:
        """The placement group that this process was started in, its own bundle 0 left out.

        Raises:
            ClusterError: The process is in no placement group, or in one that was made for others.
        """
        attempted = "placing the pools inside the placement group of this process"
        expected = [{"CPU": 1.0}, *bundles_of(pools)]
        group = get_current_placement_group()
        if group is None:
            raise ClusterError(
                attempted, "no placement group", f"bundles like {expected}, the first its own"
            )
        found = group.bundle_specs[1:]
        if [_without_zeros(bundle) for bundle in found] != expected[1:]:
            raise ClusterError(attempted, f"bundles {found} after its own", f"{expected[1:]}")
        return cls(group, pools, first_bundle=1, owned=False)

    def pool(self, name: str) -> Pool:
        """The pool of that name.

        Raises:
            ClusterError: There is none.
        """
        if name not in self._pools:
            raise ClusterError(
                f"placing group {name}", f"pools {sorted(self._pools)}", f"one called {name}"
            )
        return self._pools[name]

    def actor_options(self, name: str, rank: int) -> dict[str, Any]:
        """Where one rank of a pool runs and what it takes, as options of a Ray actor."""
        pool = self.pool(name)
        return {
            "num_cpus": pool.cpus_per_rank,
            "num_gpus": pool.gpus_per_rank,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=self._first_bundles[name] + rank
            ),
        }

    def release(self) -> None:
        """Gives the resources back; ends what still runs on them. Harmless when repeated."""
        if self._owned and ray.is_initialized():
            remove_placement_group(self._group)
        self._owned = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


def reserve(pools: Sequence[Pool], timeout_s: float = 60.0, strategy: str = "PACK") -> Placement:
    """Reserves every bundle of every pool at once.

    Args:
        pools: What the run needs.
        timeout_s: How long to wait for other runs to end, or for the cluster to grow.
        strategy: PACK, SPREAD, STRICT_PACK or STRICT_SPREAD, as Ray defines them.

    Raises:
        InsufficientResourcesError: Not everything was free in time. Nothing stays reserved.
    """
    group = placement_group(bundles_of(pools), strategy=strategy)
    try:
        _wait(group, pools, timeout_s, strategy)
    except BaseException:
        remove_placement_group(group)
        raise
    return Placement(group, pools, first_bundle=0, owned=True)


def require_cpus(num_cpus: float, attempted: str) -> None:
    """Checks that the connected cluster is large enough for a job that reserves nothing itself.

    Raises:
        InsufficientResourcesError: It has fewer CPUs, busy ones included.
    """
    total = _counted(ray.cluster_resources())
    if total["CPU"] < num_cpus:
        raise InsufficientResourcesError(
            attempted,
            f"a cluster of {_worded(total)}",
            f"at least {num_cpus:g} CPU",
            "Start Ray with more logical CPUs (`ray start --num-cpus`), add machines, or ask for"
            " fewer workers",
        )


def _wait(group: PlacementGroup, pools: Sequence[Pool], timeout_s: float, strategy: str) -> None:
    """Waits for a reservation; says what it is waiting for when that takes long."""
    quiet_s = min(_QUIET_S, timeout_s)
    # Ray cuts fractions of a second off, hence the rounding up.
    if group.wait(math.ceil(quiet_s)):
        return
    shortage = _shortage(pools, quiet_s, strategy)
    if quiet_s < timeout_s:
        _log.warning("waiting for resources. %s", shortage)
        if group.wait(math.ceil(timeout_s - quiet_s)):
            return
        shortage = _shortage(pools, timeout_s, strategy)
    raise shortage


def _shortage(pools: Sequence[Pool], timeout_s: float, strategy: str) -> InsufficientResourcesError:
    """Says, bundle by bundle, what the cluster could serve and what it lacks."""
    free = _counted(ray.available_resources())
    total = _counted(ray.cluster_resources())
    nodes = [_counted(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    rows = [
        f"  {bundle:<20} asks for {_worded(asked):<16} {verdict}"
        for bundle, asked, verdict in first_fit(pools, free)
    ]
    free_now = f"{_worded(free)} of {_worded(total)} are free"
    machines = f"{len(nodes)} machines ({'; '.join(map(_worded, nodes))})"
    table = "\n".join(rows)
    return InsufficientResourcesError(
        f"reserving resources for {len(rows)} ranks ({strategy})",
        f"after {timeout_s:g} s {free_now} on {machines}:\n{table}\n",
        "all of them to be free at once, each rank on one machine",
        "Lower the ranks, or the CPUs and GPUs of each, in the recipe, add machines, or wait for"
        " other runs to end (`ray status` shows what is in use)",
    )


def first_fit(
    pools: Sequence[Pool], free: Mapping[str, float]
) -> list[tuple[str, dict[str, float], str]]:
    """Serves the bundles in order from the cluster as a whole, and says which come away empty.

    Args:
        pools: What is asked for.
        free: Free CPU and GPU.

    Returns:
        (rank, what it asks for, "fits" or "lacks ..."), one row a rank.
    """
    left, rows = dict(free), []
    for pool in pools:
        for rank in range(pool.num_ranks):
            asked = _counted(pool.bundle)
            lacking = {k: v - left[k] for k, v in asked.items() if v > left[k]}
            if not lacking:
                left = {kind: left[kind] - asked[kind] for kind in left}
            verdict = f"lacks {_worded(lacking)}" if lacking else "fits"
            rows.append((f"{pool.name}[{rank}]", asked, verdict))
    return rows


def _counted(resources: Mapping[str, float]) -> dict[str, float]:
    return {"CPU": resources.get("CPU", 0.0), "GPU": resources.get("GPU", 0.0)}


def _without_zeros(bundle: Mapping[str, float]) -> dict[str, float]:
    return {kind: float(amount) for kind, amount in bundle.items() if amount}


def _worded(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {kind}" for kind, amount in resources.items())
