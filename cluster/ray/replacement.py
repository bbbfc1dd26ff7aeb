"""Replacement of processes that are lost, in the bundles that they had.

    lost processes    those that are gone, and those that run collectives with them
    end, restart      new processes in the same bundles; Ray moves a bundle whose machine is gone
    rebuild           every group builds its workers there again; the caller gives them their state

A rank of a collective cannot come back alone: the others hold its connections. So a world is
replaced whole. Processes that are alive keep their workers, their networks included.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.ray.future import RayFuture
from cluster.ray.group import RayWorkerGroup
from cluster.ray.hosts import Hosts
from cluster.worker_group import Future

Process = tuple[str, int]
"""Pool and index of a process."""

_POLL_S = 0.2


def replace_lost(
    groups: Sequence[RayWorkerGroup[Any]],
    patience_s: float,
    unbuilt: AbstractSet[Process] = frozenset(),
    beside: Collection[RayWorkerGroup[Any]] = (),
) -> set[Process]:
    """Ends what is left of worlds that have lost a process, and starts them again.

    Waits until every other process has worked through the calls that it was given: they may fail,
    as they wait for results that are lost.

    Args:
        groups: All groups of a run.
        patience_s: A process that has not answered after so long counts as lost.
        unbuilt: Processes that an earlier attempt has started and not built; they count as lost.
        beside: Of the groups, those that may be busy with other things for long. A process that
            only they use counts as lost where Ray says so, and is not waited for.

    Returns:
        The processes that are new and have no workers yet.
    """
    pools = {pool.pool: pool for group in groups for pool in group.pools}
    hurried = {pool.pool for group in groups if group not in beside for pool in group.pools}
    lost = _lost(pools, patience_s, unbuilt, pools.keys() - hurried)
    for name, index in lost:
        pools[name].end(index)
    for name, pool in pools.items():
        if indices := {index for other, index in lost if other == name}:
            pool.restart(indices)
    return lost


def restart_all(groups: Sequence[RayWorkerGroup[Any]]) -> set[Process]:
    """Ends and starts every process of these groups; returns them."""
    pools = {pool.pool: pool for group in groups for pool in group.pools}
    for pool in pools.values():
        for index in range(pool.size):
            pool.end(index)
        pool.restart(range(pool.size))
    return {(name, index) for name, pool in pools.items() for index in range(pool.size)}


def rebuild(
    groups: Sequence[RayWorkerGroup[Any]],
    processes: set[Process],
    timeout_s: float,
    arguments: Mapping[str, tuple[Any, ...]] | None = None,
    beside: Collection[RayWorkerGroup[Any]] = (),
) -> None:
    """Builds the workers of new processes, and waits until all are ready.

    Args:
        groups: All groups of a run.
        processes: The new processes.
        timeout_s: How long to wait for machines and for networks to load.
        arguments: New arguments of the factory, by group.
        beside: Of the groups, those that are not waited for.

    Raises:
        StartTimeoutError: Not all were there in time.
        ClusterError: A process has ended meanwhile.
    """
    built = [group for group in groups if group.ranks_in(processes)]
    for group in built:
        group.rebuild(group.ranks_in(processes), (arguments or {}).get(group.name))
    deadline_s = time.monotonic() + timeout_s
    for group in built:
        if group not in beside:
            group.wait_ready(max(1.0, deadline_s - time.monotonic()))


def copy_to_this_machine(futures: Sequence[Future[Any]]) -> None:
    """Asks Ray for copies of results in this machine's object store; returns at once."""
    references = list({future.reference for future in futures if isinstance(future, RayFuture)})
    ray.wait(references, num_returns=len(references), timeout=0, fetch_local=True)


def this_machine() -> str:
    """Ray's name of the machine of this process."""
    return ray.get_runtime_context().get_node_id()


def store_sizes() -> dict[str, int]:
    """Bytes of the object store of each machine, by Ray's name."""
    return {
        node["NodeID"]: int(node["Resources"].get("object_store_memory", 0))
        for node in ray.nodes()
        if node["Alive"]
    }


def _lost(
    pools: Mapping[str, Hosts],
    patience_s: float,
    unbuilt: AbstractSet[Process],
    beside: AbstractSet[str],
) -> set[Process]:
    """Processes that are gone or do not answer, with those that run collectives with them."""
    asked = {
        pool.actors[index].process_id.remote(): (name, index)
        for name, pool in pools.items()
        for index in range(pool.size)
        if (name, index) not in unbuilt
    }
    lost = set(unbuilt)
    deadline_s = time.monotonic() + patience_s
    while True:
        # A rank beside a lost one may wait for it without end: it is not asked any longer.
        open_ones = [answer for answer, process in asked.items() if process not in lost]
        if not open_ones:
            return lost
        late = time.monotonic() > deadline_s
        done, _ = ray.wait(open_ones, num_returns=len(open_ones), timeout=0 if late else _POLL_S)
        waits = False
        for answer in open_ones:
            name, index = asked[answer]
            if answer in done and _answers(answer):
                del asked[answer]
            elif answer in done or (late and name not in beside):
                del asked[answer]
                lost |= {(name, other) for other in pools[name].world_of(index)}
            else:
                waits |= name not in beside
        if not waits:
            return lost


def _answers(answer: ray.ObjectRef) -> bool:
    try:
        ray.get(answer)
    except RayError:
        return False
    return True
