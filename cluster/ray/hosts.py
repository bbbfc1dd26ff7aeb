"""The processes of a pool, as the controller holds them: started, restarted, ended.

    Hosts              one Ray actor for each rank of the pool, each in its bundle
      Host             the inside of one: `cluster.ray.host`

Actors are synchronous and are never restarted and calls never retried by Ray: a restart would lose
the workers' state silently, and a retry would run out of order.
"""

import weakref
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any, cast

import ray
import ray.util

from cluster.ray.host import Host
from cluster.ray.progress import forget_report
from cluster.ray.topology import Placement

# Ray would show each process its own GPU alone, under which NCCL has been slow or wrong between
# ranks of one machine (https://github.com/ray-project/ray/issues/61073).
_SEES_ALL_GPUS = {"runtime_env": {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}}


class OwnedResult:
    """Handle of a result that stays in a process; the result is dropped with the handle.

    It is lost with the process: another one in the same place does not have it.
    """

    def __init__(self, hosts: "Hosts", rank: int, number: int, bf16_kinds: frozenset[str]) -> None:
        self.actor = hosts.actors[rank]
        self.number = number
        self.bf16_kinds = bf16_kinds
        weakref.finalize(self, hosts.dropped[rank].append, number)


class Hosts:
    """One process a rank of a pool.

    Args:
        pool: Name of the pool.
        placement: Reserved resources.
        world_size: So many ranks in a row run collectives among themselves.
        shared: Whether the workers of several groups live here; results then stay here.
        transport: Ray's name of the way past the object store that they must have; None: none.
    """

    def __init__(
        self,
        pool: str,
        placement: Placement,
        world_size: int = 1,
        *,
        shared: bool = False,
        transport: str | None = None,
    ) -> None:
        self.pool = pool
        self.shared = shared
        self._placement = placement
        self._world_size = world_size
        self._transport = transport
        size = placement.pool(pool).num_ranks
        self.actors: list[Any] = [None] * size
        self.places: list[Any] = [None] * size
        """Place of each process, once it runs."""
        self.dropped: list[deque[int]] = [deque() for _ in range(size)]
        self._number = 0
        self._actor_ids: list[str] = []
        self.rendezvous: list[ray.ObjectRef | None] = [None] * size
        self._start(range(size))

    def _start(self, ranks: Sequence[int]) -> None:
        """Starts the processes of these ranks: all those of each world that they belong to."""
        remote = cast(Any, ray.remote)
        transport, size = self._transport, self._world_size
        host_class = remote(enable_tensor_transport=True)(Host) if transport else remote(Host)
        options = _SEES_ALL_GPUS if size > 1 else {}
        for rank in ranks:
            placed = self._placement.actor_options(self.pool, rank)
            actor = host_class.options(max_restarts=0, max_task_retries=0, **options, **placed)
            self.actors[rank] = actor.remote(self.pool, rank, size, transport)
            self._actor_ids.append(self.actors[rank]._actor_id.hex())
            self.places[rank] = self.actors[rank].place.remote()
        for first in sorted({rank - rank % size for rank in ranks}) if size > 1 else ():
            world = range(first, first + size)
            rendezvous = self.actors[first].open_rendezvous.remote(
                *(self.places[rank] for rank in world)
            )
            for rank in world:
                self.rendezvous[rank] = rendezvous

    def worker_of(self, group: str) -> str:
        """Name of a group's worker in these processes."""
        return group

    def world_of(self, rank: int) -> range:
        """Ranks that run collectives with this one, itself included."""
        first = rank - rank % self._world_size
        return range(first, first + self._world_size)

    def end(self, rank: int) -> None:
        """Ends the process of a rank, if it is still there; its state is lost."""
        ray.kill(self.actors[rank])

    def restart(self, ranks: Collection[int]) -> None:
        """Starts new processes in the bundles of these ranks, whose own have ended.

        Args:
            ranks: All those of each world that they belong to.
        """
        assert all(other in ranks for rank in ranks for other in self.world_of(rank))
        self._start(sorted(ranks))

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.dropped)

    def next_number(self) -> int:
        """A number that no result has had."""
        self._number += 1
        return self._number

    def take_dropped(self, rank: int) -> tuple[int, ...]:
        """Numbers of a rank's kept results that are no longer needed; each is returned once."""
        waiting = self.dropped[rank]
        return tuple(waiting.popleft() for _ in range(len(waiting)))

    def close(self) -> None:
        """Ends the processes; what they hold is gone, and their reports. Harmless when repeated."""
        if ray.is_initialized():
            for actor in self.actors:
                ray.kill(actor)
            for actor_id in self._actor_ids:
                with suppress(Exception):  # Without an answer they go with the run.
                    forget_report(actor_id)
        self.actors.clear()
        self._actor_ids.clear()
