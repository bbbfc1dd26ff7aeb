"""Recovery of a run in place: processes that are lost are replaced, and the run goes on.

    a process is lost -> budget -> replaced, with those that run collectives with it
                      -> generator and fake score go back to the last state that both have:
                         the copies in memory, else the newest checkpoint, else the beginning
                      -> the iterations since are made again

Every draw is counted, and captions come in a fixed order, so on a CPU the iterations that are made
again have the bits of those that were lost, and so has the rest of the run. A validator is replaced
alone: it holds nothing that the training needs.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.checkpoints import Checkpoints
from cluster.errors import (
    ClusterError,
    NodeLostError,
    ResultLostError,
    WorkerDiedError,
    WorkerFrozenError,
)
from pipelines.config.recipe import DistillConfig
from pipelines.distillation.groups import Groups, feed_arguments
from pipelines.distillation.position import Position, resume_position
from pipelines.distillation.preflight import Preflight
from pipelines.distillation.snapshots import Snapshots
from pipelines.distillation.states import load_roles
from pipelines.run.data_log import DataLog
from pipelines.run.events import EventLog
from pipelines.run.folder import RunFolder
from pipelines.run.observer import RunObserver
from pipelines.run.records import RunEvent

if TYPE_CHECKING:
    from cluster.ray.group import RayWorkerGroup

LOST = (WorkerDiedError, ResultLostError)
"""Failures after which a run can go on: what failed is where it runs, not what it computes."""

_HOUR_S = 3600.0
_LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True, slots=True)
class Repaired:
    """A run after a repair.

    Attributes:
        position: Where it goes on.
        built: Ranks that have new processes, by group.
    """

    position: Position
    built: dict[str, list[int]]


class FailureBudget:
    """Failures of a run, and how many of them it may recover from.

    Args:
        per_hour: Failures within an hour.
        in_a_row: Failures without a finished iteration between them.
        backoff_s: Pause before the second repair in a row; it doubles with each further one.
    """

    def __init__(self, per_hour: int, in_a_row: int, backoff_s: float) -> None:
        self._per_hour = per_hour
        self._in_a_row = in_a_row
        self._backoff_s = backoff_s
        self._failures: list[tuple[float, str]] = []
        self._furthest = -1
        self._row = 0

    def spend(self, what: str, iteration: int, now_s: float) -> str:
        """Counts a failure.

        Args:
            what: The failure in one sentence.
            iteration: Updates of the generator made before.
            now_s: Monotonic time.

        Returns:
            The reason why the run cannot go on; empty where it can.
        """
        self._row = 1 if iteration > self._furthest else self._row + 1
        self._furthest = max(self._furthest, iteration)
        self._failures.append((now_s, f"iteration {iteration}: {what}"))
        recent = [then_s for then_s, _ in self._failures if now_s - then_s < _HOUR_S]
        if len(recent) > self._per_hour:
            return (
                f"{len(recent)} failures within an hour, and recovery.failures_per_hour is "
                f"{self._per_hour}"
            )
        if self._row > self._in_a_row:
            return (
                f"{self._row} failures in a row without a finished iteration, and "
                f"recovery.failures_per_iteration is {self._in_a_row}"
            )
        return ""

    @property
    def pause_s(self) -> float:
        """Seconds to wait before the repair of the latest failure."""
        return (
            0.0 if self._row < 2 else min(_LONGEST_PAUSE_S, self._backoff_s * 2 ** (self._row - 2))
        )

    @property
    def story(self) -> str:
        """All failures, one a line."""
        return "\n".join(f"  {what}" for _, what in self._failures)


class Recovery:
    """Repairs a run on Ray.

    Args:
        config: The run's settings.
        checked: Result of the checks before the run.
        groups: Roles, feed and validator; their lost processes are replaced in place.
        folder: Where the run is written down.
        data: Log of the data that the run has used.
        checkpoints: Its committed states.
        snapshots: Copies of the learners' state in memory.
        observer: Receives what is done.
    """

    def __init__(
        self,
        config: DistillConfig,
        checked: Preflight,
        groups: Groups,
        folder: RunFolder,
        data: DataLog,
        checkpoints: Checkpoints,
        snapshots: Snapshots,
        observer: RunObserver,
    ) -> None:
        self._config = config
        self._checked = checked
        self._groups = groups
        self._folder = folder
        self._data = data
        self._checkpoints = checkpoints
        self._snapshots = snapshots
        self._observer = observer
        self._events = EventLog(folder, observer)
        settings = config.recovery
        self._budget = FailureBudget(
            settings.failures_per_hour, settings.failures_per_iteration, settings.backoff_s
        )

    def repair(self, error: ClusterError, iteration: int, *, keeps_captions: bool) -> Repaired:
        """Replaces what is lost and puts both learners back to one state.

        Args:
            error: The failure, one of `LOST`.
            iteration: Iteration that was under way.
            keeps_captions: Whether the captions since the newest snapshot are still there.

        Raises:
            ClusterError: The failure itself, where the budget is spent or nothing could replace
                what is lost; a note tells the whole story.
        """
        began_s = time.monotonic()
        built: dict[str, list[int]] = {}
        while True:
            self._admit(error, iteration)
            try:
                position, source = self._replace(keeps_captions, built)
                break
            except LOST as again:
                error = again
        lost_s = time.monotonic() - began_s
        names = ", ".join(_in_words(name, ranks) for name, ranks in built.items()) or "no process"
        self._events.add(
            RunEvent(
                kind="recovered",
                cause=_sentence(error),
                action=f"replaced {names}; went back to iteration {position.iteration} ({source})",
                iteration=iteration,
                lost_s=lost_s,
            )
        )
        return Repaired(position, built)

    def replace_validator(self, error: WorkerDiedError, iteration: int) -> None:
        """Starts a new validator; whoever has asked the lost one asks again.

        Raises:
            ClusterError: The budget is spent, or nothing could replace it in time.
        """
        from cluster.ray.replacement import rebuild, replace_lost

        began_s = time.monotonic()
        self._admit(error, iteration)
        validator = self._ray_groups(self._groups.validator)
        lost = replace_lost(validator, self._config.topology.call_timeout_s)
        rebuild(validator, lost, self._config.recovery.wait_s)
        self._events.add(
            RunEvent(
                kind="recovered",
                cause=_sentence(error),
                action="replaced the validator, and asked it again",
                role=error.group,
                rank=error.rank,
                iteration=iteration,
                lost_s=time.monotonic() - began_s,
            )
        )

    def _admit(self, error: ClusterError, iteration: int) -> None:
        """Counts a failure, and waits a moment where it is not the first in a row.

        Raises:
            ClusterError: The failure, where the run must end.
        """
        said = _sentence(error)
        spent = self._budget.spend(said, iteration, time.monotonic())
        if event := _event_of(error, iteration):
            self._events.add(event)
        if spent:
            story = f"The run was not repaired again: {spent}. Its failures:\n{self._budget.story}"
            self._events.add(RunEvent(kind="gave_up", cause=spent, iteration=iteration))
            error.add_note(story)
            raise error
        time.sleep(self._budget.pause_s)

    def _replace(self, keeps_captions: bool, built: dict[str, list[int]]) -> tuple[Position, str]:
        """Replaces lost processes, and restores the learners; returns where, and from what."""
        from cluster.ray.replacement import rebuild, replace_lost, restart_all

        groups, roles = self._ray_groups(*self._groups.all), self._groups.roles
        new = replace_lost(groups, self._config.topology.call_timeout_s)
        position = self._snapshots.position
        source = "copies in memory"
        if position is None:
            position = self._newest_checkpoint()
            source = "the newest checkpoint" if position.iteration else "the beginning"
            keeps_captions = False
            if not position.iteration:
                # Both start as they were loaded.
                new |= restart_all(self._ray_groups(roles.generator, roles.fake_score))
        self._folder.rewind(position.iteration, self._observer.warning)
        self._data.rewind(position.iteration, self._observer.warning)
        feed = self._ray_groups(self._groups.feed)
        if not keeps_captions and not feed[0].ranks_in(new):
            new |= restart_all(feed)
        progress = self._data.progress(position.cursor, position.rows)
        left = self._config.iterations - position.iteration
        arguments = feed_arguments(
            self._config, self._checked, progress, left * self._checked.rows_per_iteration
        )
        for name, ranks in rebuild(
            groups, new, self._config.recovery.wait_s, {self._groups.feed.name: arguments}
        ).items():
            built[name] = sorted({*built.get(name, ()), *ranks})
        if source == "copies in memory":
            try:
                self._snapshots.restore()
            except ResultLostError:
                self._snapshots.forget()
                raise
        elif position.iteration:
            load_roles(roles, self._checkpoints.folder(position.iteration), self._config)
        return position, source

    def _newest_checkpoint(self) -> Position:
        return resume_position(
            self._config, self._checked, self._folder, self._checkpoints, self._observer.warning
        )

    def _ray_groups(self, *groups: Any) -> "Sequence[RayWorkerGroup[Any]]":  # noqa: ANN401
        from cluster.ray.group import RayWorkerGroup

        assert all(isinstance(group, RayWorkerGroup) for group in groups), "processes of Ray only"
        return groups


def _event_of(error: ClusterError, iteration: int) -> RunEvent | None:
    """The event of a failure; None for a frozen process, of which the watch has said so."""
    if isinstance(error, WorkerFrozenError):
        return None
    if isinstance(error, NodeLostError):
        said = _sentence(error)
        return RunEvent(kind="node_died", cause=said, node=error.node, iteration=iteration)
    if isinstance(error, WorkerDiedError):
        return RunEvent(
            kind="worker_died",
            cause=error.cause,
            role=error.group,
            rank=error.rank,
            node=error.node,
            iteration=iteration,
            last_lines=error.last_lines,
        )
    return RunEvent(kind="worker_died", cause=_sentence(error), iteration=iteration)


def _sentence(error: ClusterError) -> str:
    """The failure, without its remedy and log lines."""
    if isinstance(error, WorkerDiedError) and not isinstance(error, NodeLostError):
        return f"{error.group} rank {error.rank}: {error.cause}"
    return " ".join(error.found.split())


def _in_words(name: str, ranks: Sequence[int]) -> str:
    numbers = ", ".join(map(str, ranks))
    return f"{name} rank {numbers}" if len(ranks) == 1 else f"{name} ranks {numbers}"
