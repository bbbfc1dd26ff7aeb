"""Copies of the learners' state in memory outside of their processes.

    learner rank r     -- snapshot --> object store, kept by the controller as a handle
                                          and copied to the controller's machine
    after a failure    -- restore  --> every rank goes back to the iteration of the snapshot

The copies outlive the process they are of, and the machine where the controller is on another one.
They are taken after every iteration, or every few: as often as their measured seconds stay within
their share of the training time.
"""

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import RemoteCallError, ResultLostError
from cluster.worker_group import Future, WorkerGroup, taken_by
from pipelines.distillation.iteration import Roles
from pipelines.distillation.position import Position
from workers.saving import LearningRole
from workers.snapshots import RoleSnapshot

_RECENT = 5
_STORE_SHARE = 0.5
_OUTSIDE = frozenset({("snapshots", 0)})
"""No process of a pool: a shared pool then sends the result instead of keeping it."""


@dataclass(frozen=True, slots=True)
class _Taken:
    """A snapshot of all ranks."""

    position: Position
    parts: dict[str, list[Future[RoleSnapshot]]]


class Snapshots:
    """The newest snapshot of a run.

    Args:
        roles: Whose state is copied.
        share: Share of the training time that snapshots may take; 0 takes none.
        timeout_s: How long to wait for the ranks.
        tell: Called with one sentence where no snapshots can be kept.
    """

    def __init__(
        self, roles: Roles, share: float, timeout_s: float, tell: Callable[[str], None]
    ) -> None:
        self._roles = roles
        self._share = share
        self._timeout_s = timeout_s
        self._tell = tell
        self._taken: _Taken | None = None
        self._has_room: bool | None = None
        self._copies_here = False
        self._costs_s: deque[float] = deque(maxlen=_RECENT)
        self._iterations_s: deque[float] = deque(maxlen=_RECENT)

    @property
    def position(self) -> Position | None:
        """Position of the run at the newest snapshot; None without one."""
        return None if self._taken is None else self._taken.position

    @property
    def every(self) -> int:
        """Iterations from one snapshot to the next, by the seconds that both have taken."""
        if not (self._costs_s and self._iterations_s):
            return 1
        # The first copies and the first iterations of a process are the slowest.
        return max(1, math.ceil(min(self._costs_s) / (self._share * min(self._iterations_s))))

    def is_due(self, position: Position) -> bool:
        """Returns True if a snapshot is to be taken here."""
        if not self._share:
            return False
        if self.position is None:
            return True
        return position.iteration - self.position.iteration >= self.every

    def add_iteration(self, seconds: float) -> None:
        """Takes note of the seconds of an iteration."""
        self._iterations_s.append(seconds)

    def take(self, position: Position) -> None:
        """Copies the state of all ranks; no call may be under way.

        Args:
            position: Where the run stands.
        """
        if self._has_room is None:
            self._look_for_room()
        if not self._has_room:
            self._share, self._taken = 0.0, None
            return
        roles, began_s = self._roles, time.perf_counter()
        with taken_by(_OUTSIDE):
            taken = _Taken(
                position,
                {role: group.call(LearningRole.snapshot) for role, group in roles.learners.items()},
            )
            # Each rank works in order: with this answer its copy is complete.
            sizes = self._ask_sizes()
        self._fetch_all(sizes, f"copying the state after iteration {position.iteration}")
        if self._copies_here:
            self._copy_here(taken)
        self._costs_s.append(time.perf_counter() - began_s)
        self._taken = taken

    def restore(self) -> Position:
        """Puts every rank back to the newest snapshot; returns where that was.

        Raises:
            ResultLostError: A copy is lost, or was never kept; the snapshot is forgotten.
            ClusterError: A process is lost.
        """
        taken, roles = self._taken, self._roles
        # The machines may be others now.
        self._has_room = None
        assert taken is not None, "there is no snapshot"
        pending: Mapping[WorkerGroup[Any], list[Future[int]]] = {
            group: [
                group.call_rank(rank, LearningRole.restore, part)
                for rank, part in enumerate(taken.parts[role])
            ]
            for role, group in roles.learners.items()
        }
        attempted = f"going back to iteration {taken.position.iteration}"
        try:
            self._fetch_all(pending, attempted)
        except ResultLostError:
            self._taken = None
            raise
        except RemoteCallError as error:
            # A store that is full says so to whoever takes what it could not keep.
            self._taken = None
            expected = "room for it in the object stores"
            raise ResultLostError(
                attempted, f"a copy was not kept: {error.found}", expected
            ) from error
        return taken.position

    def _look_for_room(self) -> None:
        """Compares two snapshots, the old one and the new one, with the store of each machine."""
        from cluster.ray.group import RayWorkerGroup
        from cluster.ray.replacement import store_sizes, this_machine

        needed: dict[str, int] = defaultdict(int)
        for group, asked in self._ask_sizes().items():
            assert isinstance(group, RayWorkerGroup), "copies are kept by Ray"
            sizes = group.fetch(asked, self._timeout_s, "sizing copies of the state")
            for machine, size in zip(group.machines(), sizes, strict=True):
                needed[machine] += 2 * size
        stores, own = store_sizes(), this_machine()
        together = sum(needed.values())
        self._copies_here = needed.keys() != {own} and (
            together <= _STORE_SHARE * stores.get(own, 0)
        )
        full = {
            machine: size
            for machine, size in needed.items()
            if size > _STORE_SHARE * stores.get(machine, 0)
        }
        self._has_room = not full
        if full:
            machine, size = max(full.items(), key=lambda one: one[1])
            self._tell(
                f"No copies of the state in memory: two would take {size / 1e9:.2g} GB of the "
                f"object store of a machine, which has {stores.get(machine, 0) / 1e9:.2g} GB and "
                f"may lend {_STORE_SHARE:.0%}. After a failure the run goes back to its newest "
                "checkpoint. Start Ray with larger stores, or set recovery.snapshot_share to 0"
            )

    def _ask_sizes(self) -> Mapping[WorkerGroup[Any], list[Future[int]]]:
        return {
            group: group.call(LearningRole.snapshot_bytes)
            for group in self._roles.learners.values()
        }

    def _fetch_all(
        self, asked: Mapping[WorkerGroup[Any], Sequence[Future[int]]], attempted: str
    ) -> None:
        for group, answers in asked.items():
            group.fetch(answers, self._timeout_s, attempted)

    def _copy_here(self, taken: _Taken) -> None:
        from cluster.ray.replacement import copy_to_this_machine

        copy_to_this_machine([part for parts in taken.parts.values() for part in parts])
