"""Placement groups of a run's pools, reserved all together or not at all.

The pools that only want to be packed share one placement group, whose bundles Ray reserves all or
none; a pool with another strategy has a group of its own. A run that holds some of its groups and
waits for the others could wait without end for a run that does the same, so groups that are not
complete after a while are all given back and asked for again a moment later.

PACK keeps the ranks on as few machines as possible. CPUs that no pool asks for stay free for Ray
Data, which starves on a cluster that is reserved to the last core.

A run inside a Ray Tune trial finds itself in the trial's placement group already: bundle 0 is the
trial's own process, the pools follow in order, and `Placement.adopt_current` takes them over.

Ray shows each process only the GPUs of its rank (CUDA_VISIBLE_DEVICES). On NVSwitch machines this
has slowed down or broken NCCL between ranks of one group, so a pool whose ranks talk NCCL to one
another should run with RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1 and choose its device from
`ray.get_gpu_ids()` (https://github.com/ray-project/ray/issues/61073).
"""

import logging
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import ClusterError, InsufficientResourcesError
from cluster.ray.pools import Pool, bundles_of, selectors_of
from cluster.ray.shortage import shortage

_log = logging.getLogger(__name__)

_QUIET_S = 15.0
_LONGEST_PAUSE_S = 2.0


@dataclass(frozen=True, slots=True)
class BundleRange:
    """Bundles of one pool in a placement group.

    Attributes:
        pool: The pool.
        group: Ray's placement group.
        first_bundle: Bundle of its first rank.
    """

    pool: Pool
    group: PlacementGroup
    first_bundle: int


def _bundle_ranges(
    pools: Sequence[Pool], group: PlacementGroup, first_bundle: int
) -> list[BundleRange]:
    found: list[BundleRange] = []
    for pool in pools:
        found.append(BundleRange(pool, group, first_bundle))
        first_bundle += pool.num_ranks
    return found


class Placement:
    """Reserved resources, by pool and rank; a context manager that gives them back.

    Args:
        ranges: Of every pool.
        owned: Whether to give the resources back at the end; an adopted group belongs to Ray Tune.
    """

    def __init__(self, ranges: Sequence[BundleRange], *, owned: bool) -> None:
        self._owned = owned
        self._ranges = {one.pool.name: one for one in ranges}

    @classmethod
    def adopt_current(cls, pools: Sequence[Pool]) -> Self:
        """The placement group that this process was started in, its own bundle 0 left out.

        Raises:
            ClusterError: The process is in no placement group, or in one that was made for others,
                or a pool wants another strategy than the trial's.
        """
        attempted = "placing the pools inside the placement group of this process"
        others = [f"{pool.name}: {pool.strategy}" for pool in pools if pool.strategy != "PACK"]
        if others:
            raise ClusterError(attempted, f"{others}", "PACK for every pool of a trial")
        expected = [{"CPU": 1.0}, *bundles_of(pools)]
        group = get_current_placement_group()
        if group is None:
            raise ClusterError(
                attempted, "no placement group", f"bundles like {expected}, the first its own"
            )
        found = group.bundle_specs[1:]
        given = [{kind: amount for kind, amount in own.items() if amount} for own in found]
        if given != expected[1:]:
            raise ClusterError(attempted, f"bundles {found} after its own", f"{expected[1:]}")
        return cls(_bundle_ranges(pools, group, first_bundle=1), owned=False)

    def pool(self, name: str) -> Pool:
        """The pool of that name.

        Raises:
            ClusterError: There is none.
        """
        return self._range_of(name).pool

    def nodes(self) -> dict[str, list[str]]:
        """Returns Ray's id of the node of each rank, by pool."""
        found: dict[str, list[str]] = {}
        for name, one in self._ranges.items():
            table: dict[str, Any] = placement_group_table(one.group)
            nodes = table["bundles_to_node_id"]
            found[name] = [nodes[one.first_bundle + rank] for rank in range(one.pool.num_ranks)]
        return found

    def actor_options(self, name: str, rank: int) -> dict[str, Any]:
        """Returns the options of the Ray actor that hosts one rank: placement and resources."""
        ranges = self._range_of(name)
        return {
            "num_cpus": ranges.pool.cpus_per_rank,
            "num_gpus": ranges.pool.gpus_per_rank,
            "resources": dict(ranges.pool.resources),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                ranges.group, placement_group_bundle_index=ranges.first_bundle + rank
            ),
        }

    def release(self) -> None:
        """Gives the resources back; ends what still runs on them. Harmless when repeated."""
        if self._owned and ray.is_initialized():
            _remove([one.group for one in self._ranges.values()])
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

    def _range_of(self, name: str) -> BundleRange:
        if name not in self._ranges:
            raise ClusterError(
                f"placing group {name}", f"pools {sorted(self._ranges)}", f"one called {name}"
            )
        return self._ranges[name]


def reserve(pools: Sequence[Pool], timeout_s: float = 60.0) -> Placement:
    """Reserves every bundle of every pool, or none.

    Args:
        pools: What the run needs.
        timeout_s: How long to wait for other runs to end, or for the cluster to grow.

    Raises:
        InsufficientResourcesError: Not everything was free in time. Nothing stays reserved.
        ClusterError: A strategy or a label selector is not valid.
    """
    bundles_of(pools)
    specs = _placement_group_specs(pools)
    pools = [pool for spec in specs for pool in spec]
    deadline_s = time.monotonic() + timeout_s
    while True:
        ranges = _ask(specs)
        groups = list(dict.fromkeys(one.group for one in ranges))
        try:
            if _complete(groups, pools, timeout_s, deadline_s):
                return Placement(ranges, owned=True)
        except BaseException:
            _remove(groups)
            raise
        _remove(groups)
        # A pause of random length, so that two runs do not meet again in the same way.
        time.sleep(random.uniform(0, _LONGEST_PAUSE_S))


def require_cpus(num_cpus: float, attempted: str) -> None:
    """Checks that the connected cluster is large enough for a job that reserves nothing itself.

    Raises:
        InsufficientResourcesError: It has fewer CPUs, busy ones included.
    """
    total = ray.cluster_resources().get("CPU", 0.0)
    if total < num_cpus:
        raise InsufficientResourcesError(
            attempted,
            f"a cluster of {total:g} CPU",
            f"at least {num_cpus:g} CPU",
            "Start Ray with more logical CPUs (`ray start --num-cpus`), add machines, or ask for"
            " fewer workers",
        )


def require_gpus(num_gpus: float, attempted: str) -> None:
    """Checks that the connected cluster has GPUs for a job that reserves nothing itself.

    Args:
        num_gpus: Shares of GPUs, added up.
        attempted: What the job is about to do.

    Raises:
        InsufficientResourcesError: It has fewer, busy ones included.
    """
    total = ray.cluster_resources().get("GPU", 0.0)
    if total < num_gpus:
        raise InsufficientResourcesError(
            attempted,
            f"a cluster of {total:g} GPU",
            f"at least {num_gpus:g} GPU",
            "Add machines with GPUs, or ask for fewer or for smaller shares of them",
        )


def _placement_group_specs(pools: Sequence[Pool]) -> list[list[Pool]]:
    """Pools that share a placement group: the packed ones; every other one has its own.

    Those that are the hardest to place come first, because Ray serves them in this order.
    """
    packed = [pool for pool in pools if pool.strategy == "PACK"]
    others = [[pool] for pool in pools if pool.strategy != "PACK"]
    others.sort(key=lambda spec: spec[0].strategy, reverse=True)
    return [*others, packed] if packed else others


def _ask(specs: Sequence[Sequence[Pool]]) -> list[BundleRange]:
    """Asks Ray for the placement groups; returns at once."""
    ranges: list[BundleRange] = []
    try:
        for spec in specs:
            selectors = selectors_of(spec)
            labels: dict[str, Any] = {"bundle_label_selector": selectors} if any(selectors) else {}
            group = placement_group(bundles_of(spec), strategy=spec[0].strategy, **labels)
            ranges += _bundle_ranges(spec, group, first_bundle=0)
    except BaseException as error:
        _remove([one.group for one in ranges])
        if isinstance(error, ValueError):
            raise ClusterError(
                "asking Ray for the pools of a run", str(error), "strategies and labels of Ray's"
            ) from error
        raise
    return ranges


def _complete(
    groups: Sequence[PlacementGroup], pools: Sequence[Pool], timeout_s: float, deadline_s: float
) -> bool:
    """Waits for all groups; False if it is better to give them back and to ask again.

    Raises:
        InsufficientResourcesError: The time is over.
    """
    patience_s = min(_QUIET_S, timeout_s)
    if _wait(groups, min(patience_s, max(1.0, deadline_s - time.monotonic()))):
        return True
    if time.monotonic() >= deadline_s - 1.0:
        raise shortage(pools, timeout_s)
    _log.warning("waiting for resources. %s", shortage(pools, patience_s))
    if len(groups) > 1:
        return False
    # A single group holds nothing while it waits, and keeps its place in Ray's queue.
    if _wait(groups, deadline_s - time.monotonic()):
        return True
    raise shortage(pools, timeout_s)


def _wait(groups: Sequence[PlacementGroup], seconds: float) -> bool:
    end_s = time.monotonic() + seconds
    # Ray cuts fractions of a second off, hence the rounding up.
    return all(group.wait(max(1, math.ceil(end_s - time.monotonic()))) for group in groups)


def _remove(groups: Sequence[PlacementGroup]) -> None:
    for group in dict.fromkeys(groups):
        remove_placement_group(group)
