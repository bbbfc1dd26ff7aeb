"""Processes of frozen roles that several runs use at once.

    a sweep                      a trial                       another trial
      RoleService  starts -----> ServiceHost of `teacher` <---- BorrowedHosts
                                 one copy of each network       its own calls, times, errors

Only the controller of a run calls its groups, as two callers would deadlock collectives. A worker
that keeps nothing between calls and runs no collectives is another matter: each call stands alone,
and Ray keeps the order of the calls of each caller. So a process may serve several controllers if
its pool has one rank a copy; others are refused before.

A borrower neither ends nor restarts what it has borrowed. Where such a process dies, the service
starts another one, and borrowers build their workers there again.
"""

import hashlib
import logging
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Protocol, Self, cast, runtime_checkable

import ray
import ray.util
from ray.exceptions import RayError

from cluster.background import in_background
from cluster.errors import ClusterError
from cluster.ray.host import Host
from cluster.ray.hosts import Hosts
from cluster.ray.pools import Pool
from cluster.ray.rendezvous import Rendezvous
from cluster.ray.topology import Placement, reserve
from cluster.spans import Work

_log = logging.getLogger(__name__)

_POLL_S = 0.5
_APPEARS_S = 300.0


@runtime_checkable
class Lendable(Protocol):
    """A worker that records something of a run, and so is not the same one to several."""

    def for_another_run(self) -> Self:
        """The same worker with nothing recorded; what is large is shared."""
        ...


def lent(worker: object) -> object:
    """A worker as one more run has it: itself, unless it records something of a run."""
    return worker.for_another_run() if isinstance(worker, Lendable) else worker


class ServiceHost(Host):
    """The inside of a process that serves several runs: one worker for all that want the same."""

    def __init__(self, pool: str, rank: int, world_size: int, transport: str | None) -> None:
        super().__init__(pool, rank, world_size, transport)
        self._built: dict[bytes, Any] = {}

    def build(
        self,
        worker: str,
        factory: Callable[..., Any],
        args: tuple[Any, ...],
        rendezvous: Rendezvous | None,
        own_rank: int,
    ) -> None:
        """Makes a worker, or shares the one that was made in the same way for another run."""
        way = hashlib.sha256(pickle.dumps((factory, args))).digest()
        if way in self._built:
            self._ranks[worker] = own_rank
            self._workers[worker] = lent(self._built[way])
            return
        super().build(worker, factory, args, rendezvous, own_rank)
        self._built[way] = self._workers[worker]

    def release(self, worker: str) -> None:
        """Forgets a borrower; the worker itself stays for others."""
        self._workers.pop(worker, None)
        self._ranks.pop(worker, None)

    def take_work(self, worker: str) -> list[Work]:
        """Returns the work of this borrower's worker, under the name of the role."""
        return [replace(work, role=_role_of(worker)) for work in super().take_work(worker)]


class _ServiceHosts(Hosts):
    """Named processes of one role."""

    def __init__(self, service: str, pool: str, placement: Placement) -> None:
        self._service = service
        self._num_started = 0
        super().__init__(pool, placement)

    def _start(self, ranks: Sequence[int]) -> None:
        host_class = cast(Any, ray.remote)(ServiceHost)
        for rank in ranks:
            # A name of its own: Ray does not give that of a dead process away again at once.
            self._num_started += 1
            self.actors[rank] = host_class.options(
                max_restarts=0,
                max_task_retries=0,
                name=f"{_prefix(self.pool, rank)}{self._num_started}",
                namespace=self._service,
                **self._placement.actor_options(self.pool, rank),
            ).remote(self.pool, rank, 1, None)
            self._actor_ids.append(self.actors[rank]._actor_id.hex())
            self.places[rank] = self.actors[rank].place.remote()


class RoleService:
    """Processes of frozen roles, for as long as this context lasts.

    Args:
        name: Borrowers find it by this name.
        pools: One a role; each bundle is one copy.
        timeout_s: How long to wait for the resources.
        tell: Called with one sentence when a process was lost and started again.
    """

    def __init__(
        self,
        name: str,
        pools: Sequence[Pool],
        timeout_s: float,
        tell: Callable[[str], None] = lambda words: None,
    ) -> None:
        self.name = name
        self._pools = list(pools)
        self._timeout_s = timeout_s
        self._tell = tell
        self._stack = ExitStack()
        self.hosts: dict[str, Hosts] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            placement = stack.enter_context(reserve(self._pools, self._timeout_s))
            for pool in self._pools:
                self.hosts[pool.name] = _ServiceHosts(self.name, pool.name, placement)
                stack.callback(self.hosts[pool.name].close)
            stack.enter_context(in_background("watch-service", self._replace_lost))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _replace_lost(self, over: threading.Event) -> None:
        """Restarts the processes that no longer answer."""
        places = [(hosts, rank) for hosts in self.hosts.values() for rank in range(hosts.size)]
        asked = {self._ask(hosts, rank): (hosts, rank) for hosts, rank in places}
        lost: dict[tuple[Hosts, int], str] = {}
        while not over.wait(_POLL_S):
            done = ray.wait(list(asked), num_returns=len(asked), timeout=0)[0] if asked else []
            for answer in done:
                hosts, rank = asked.pop(answer)
                try:
                    ray.get(answer)
                except RayError as error:
                    lost[hosts, rank] = type(error).__name__
                else:
                    asked[self._ask(hosts, rank)] = (hosts, rank)
            for (hosts, rank), why in list(lost.items()):
                try:
                    hosts.restart([rank])
                except (RayError, ValueError) as error:
                    _log.warning("starting %s %d again: %s", hosts.pool, rank, error)
                    continue
                del lost[hosts, rank]
                asked[self._ask(hosts, rank)] = (hosts, rank)
                self._tell(f"the shared {hosts.pool} {rank} was lost ({why}), and started again")

    @staticmethod
    def _ask(hosts: Hosts, rank: int) -> Any:  # noqa: ANN401 - Ray's reference
        return hosts.actors[rank].process_id.remote()


class BorrowedHosts(Hosts):
    """Processes of a service, as a run sees them.

    Args:
        service: Its name.
        pool: The role.
        size: Copies.
        borrower: Name of the run.

    Raises:
        ClusterError: There is no such service.
    """

    def __init__(self, service: str, pool: str, size: int, borrower: str) -> None:
        self.pool = pool
        self.shared = False
        self._service = service
        self._borrower = borrower
        self._number = 0
        self.actors = [self._find(rank) for rank in range(size)]
        self.places = [actor.place.remote() for actor in self.actors]
        self.dropped = [deque() for _ in range(size)]
        self.rendezvous = [None] * size

    def worker_of(self, group: str) -> str:
        """Name of this run's worker there."""
        return f"{group}@{self._borrower}"

    def world_of(self, rank: int) -> range:
        """Only the rank itself: copies run no collectives."""
        return range(rank, rank + 1)

    def end(self, rank: int) -> None:
        """Does nothing: others use it, too."""

    def restart(self, ranks: Collection[int]) -> None:
        """Waits until the service has started new processes.

        Raises:
            ClusterError: It does not.
        """
        for rank in ranks:
            self.actors[rank] = self._find(rank, other_than=self.actors[rank]._actor_id)
            self.places[rank] = self.actors[rank].place.remote()

    def close(self) -> None:
        """Lets the processes go; they stay."""
        if ray.is_initialized():
            for actor in self.actors:
                actor.release.remote(self.worker_of(self.pool))
        self.actors.clear()

    def _newest(self, rank: int) -> Any:  # noqa: ANN401 - Ray's handle
        """Returns the process that was started last; None where there is none."""
        start = _prefix(self.pool, rank)
        alive: list[Any] = ray.util.list_named_actors(all_namespaces=True)
        names: list[str] = [
            each["name"]
            for each in alive
            if each["namespace"] == self._service and each["name"].startswith(start)
        ]
        if not names:
            return None
        newest = max(names, key=lambda name: int(name.removeprefix(start)))
        with suppress(ValueError):  # It may have ended meanwhile.
            return ray.get_actor(newest, namespace=self._service)
        return None

    def _find(self, rank: int, other_than: object = None) -> Any:  # noqa: ANN401 - Ray's handle
        deadline_s = time.monotonic() + _APPEARS_S
        while True:
            found = self._newest(rank)
            if found is not None and found._actor_id != other_than:
                return found
            if found is None and other_than is None:
                raise ClusterError(
                    f"borrowing {self.pool} {rank} of the service {self._service}",
                    "no process of that name",
                    "a service that runs for as long as its borrowers",
                    "The sweep that started it has ended: go on with sgmd sweep --resume",
                )
            if time.monotonic() > deadline_s:
                raise ClusterError(
                    f"borrowing {self.pool} {rank} of the service {self._service}",
                    f"its process was lost and no other one started in {_APPEARS_S:g} s",
                    "a new one in its bundle",
                    "Look for its machine: `ray status`",
                )
            time.sleep(_POLL_S)


def _prefix(pool: str, rank: int) -> str:
    return f"{pool}-{rank}-"


def _role_of(worker: str) -> str:
    return worker.partition("@")[0]
