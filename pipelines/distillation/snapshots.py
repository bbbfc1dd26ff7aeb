"""Copies of the learners' state in memory outside of their processes.

    generator rank r   -- snapshot --> object store, kept by the controller as a handle
    fake score rank r  -- snapshot -->    and copied to the controller's machine
    after a failure    -- restore  --> every rank goes back to the iteration of the snapshot

The copies outlive the process they are of, and the machine where the controller is on another one.
They are taken after every iteration, or every few: as often as their measured seconds stay within
their share of the training time.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.worker_group import Future, WorkerGroup, taken_by
from pipelines.distillation.iteration import Roles
from pipelines.distillation.position import Position
from workers.fake_score_tracker import FakeScoreTracker
from workers.generator_learner import GeneratorLearner
from workers.snapshots import RoleSnapshot

_RECENT = 5
_STORE_SHARE = 0.5
_OUTSIDE = frozenset({("snapshots", 0)})
"""No process of a pool: a shared pool then sends the result instead of keeping it."""


@dataclass(frozen=True, slots=True)
class _Taken:
    """A snapshot of all ranks."""

    position: Position
    generator: list[Future[RoleSnapshot]]
    fake_score: list[Future[RoleSnapshot]]


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
        roles, began_s = self._roles, time.perf_counter()
        with taken_by(_OUTSIDE):
            taken = _Taken(
                position,
                roles.generator.call(GeneratorLearner.snapshot),
                roles.fake_score.call(FakeScoreTracker.snapshot),
            )
            # Each rank works in order: with this answer its copy is complete.
            sizes = {
                roles.generator: roles.generator.call(GeneratorLearner.snapshot_bytes),
                roles.fake_score: roles.fake_score.call(FakeScoreTracker.snapshot_bytes),
            }
        phase = f"copying the state after iteration {position.iteration}"
        num_bytes = sum(
            sum(group.fetch(answers, self._timeout_s, phase)) for group, answers in sizes.items()
        )
        if not self._fits(num_bytes, taken):
            self._share, self._taken = 0.0, None
            return
        self._costs_s.append(time.perf_counter() - began_s)
        self._taken = taken

    def restore(self) -> Position:
        """Puts every rank back to the newest snapshot; returns where that was.

        Raises:
            ClusterError: A copy is lost, or a process is.
        """
        taken, roles = self._taken, self._roles
        assert taken is not None, "there is no snapshot"
        pending: Mapping[WorkerGroup[Any], list[Future[int]]] = {
            roles.generator: [
                roles.generator.call_rank(rank, GeneratorLearner.restore, part)
                for rank, part in enumerate(taken.generator)
            ],
            roles.fake_score: [
                roles.fake_score.call_rank(rank, FakeScoreTracker.restore, part)
                for rank, part in enumerate(taken.fake_score)
            ],
        }
        phase = f"going back to iteration {taken.position.iteration}"
        for group, restored in pending.items():
            group.fetch(restored, self._timeout_s, phase)
        return taken.position

    def forget(self) -> None:
        """Drops the snapshot: its copies are lost, or the state was set to another one."""
        self._taken = None

    def _fits(self, num_bytes: int, taken: _Taken) -> bool:
        """True if two snapshots, the old one and the new one, leave the stores room to work."""
        from cluster.ray.replacement import copy_to_this_machine, store_sizes

        own, everywhere = store_sizes()
        if 2 * num_bytes > _STORE_SHARE * everywhere:
            self._tell(
                f"No copies of the state in memory: two would take {2 * num_bytes / 1e9:.2g} GB of "
                f"object stores of {everywhere / 1e9:.2g} GB. After a failure the run goes back to "
                "its newest checkpoint. Start Ray with larger stores, or set "
                "recovery.snapshot_share to 0"
            )
            return False
        if 2 * num_bytes <= _STORE_SHARE * own:
            copy_to_this_machine([*taken.generator, *taken.fake_score])
        return True
