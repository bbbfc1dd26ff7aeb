"""Recovery of a run in place: processes that are lost are replaced, and the run goes on.

    a process is lost -> budget -> replaced, with those that run collectives with it
                      -> a state that is being saved by others is committed
                      -> the learners go back to the last state that all of them have: the
                         copies in memory or the newest checkpoint, which is newer, else the
                         beginning
                      -> the iterations since are made again

Every draw is counted, and captions come in a fixed order, so on a CPU the iterations that are made
again have the bits of those that were lost, and so has the rest of the run. A validator is replaced
alone, on a budget of its own: it holds nothing that the training needs.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.errors import (
    LOST,
    ClusterError,
    NodeLostError,
    StartTimeoutError,
    WorkerDiedError,
    WorkerFrozenError,
)
from pipelines.distillation.groups import feed_arguments
from pipelines.distillation.loading import load_roles
from pipelines.distillation.open_run import OpenRun
from pipelines.distillation.position import Position, resume_position
from pipelines.distillation.snapshots import Snapshots
from pipelines.distillation.states import States
from pipelines.run.records import RunEvent
from sgmd_core.errors import CheckpointError, SgmdError

if TYPE_CHECKING:
    from cluster.ray.group import RayWorkerGroup
    from cluster.ray.replacement import Process

_SNAPSHOT, _CHECKPOINT, _BEGINNING = "copies in memory", "the newest checkpoint", "the beginning"
"""Sources of the state that a run goes back to."""
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
        per_iteration: Failures at one iteration.
        backoff_s: Pause before the second repair there; it doubles with each further one.
    """

    def __init__(self, per_hour: int, per_iteration: int, backoff_s: float) -> None:
        self._per_hour = per_hour
        self._per_iteration = per_iteration
        self._backoff_s = backoff_s
        self._failures: list[tuple[float, str]] = []
        self._at: Counter[int] = Counter()
        self._latest = -1

    def spend(self, what: str, iteration: int, now_s: float) -> str:
        """Counts a failure.

        Args:
            what: The failure in one sentence.
            iteration: Updates of the generator made before.
            now_s: Monotonic time.

        Returns:
            The reason why the run cannot go on; empty where it can.
        """
        self._at[iteration] += 1
        self._latest = iteration
        self._failures.append((now_s, f"iteration {iteration}: {what}"))
        recent = [then_s for then_s, _ in self._failures if now_s - then_s < _HOUR_S]
        if len(recent) > self._per_hour:
            return (
                f"{_failures(len(recent))} within an hour, and recovery.failures_per_hour is "
                f"{self._per_hour}"
            )
        if self._at[iteration] > self._per_iteration:
            return (
                f"{_failures(self._at[iteration])} at iteration {iteration}, and "
                f"recovery.failures_per_iteration is {self._per_iteration}"
            )
        return ""

    @property
    def pause_s(self) -> float:
        """Seconds to wait before the repair of the latest failure."""
        again = self._at[self._latest] - 2
        return 0.0 if again < 0 else min(_LONGEST_PAUSE_S, self._backoff_s * 2**again)

    @property
    def story(self) -> str:
        """All failures, one a line."""
        return "\n".join(f"  {what}" for _, what in self._failures)


class Recovery:
    """Repairs a run on Ray.

    Args:
        run: The run; its lost processes are replaced in place.
        snapshots: Copies of the learners' state in memory.

    Attributes:
        has_given_up: True once a failure of the training has not been repaired.
    """

    def __init__(self, run: OpenRun, snapshots: Snapshots) -> None:
        self._run, self._config, self._groups = run, run.config, run.groups
        self._snapshots = snapshots
        self.has_given_up = False
        self._unbuilt: set[Process] = set()
        self._budget, self._validator_budget = (
            FailureBudget(
                run.config.recovery.failures_per_hour,
                run.config.recovery.failures_per_iteration,
                run.config.recovery.backoff_s,
            )
            for _ in range(2)
        )

    def repair(
        self,
        error: ClusterError,
        iteration: int,
        states: States,
        keeps_captions: Callable[[int], bool],
    ) -> Repaired:
        """Replaces what is lost and puts both learners back to one state.

        Args:
            error: The failure, one of `LOST`.
            iteration: Iteration that was under way.
            states: May be saving one.
            keeps_captions: Returns True if the captions since an iteration are still there.

        Raises:
            SgmdError: The failure itself, where the budget is spent, or the error because of which
                nothing could replace what is lost; a note tells the whole story.
            StartTimeoutError: No machine came, and `recovery.shortage` is `replan`.
        """
        began_s = time.monotonic()
        built: dict[str, list[int]] = {}
        while True:
            self._admit(error, iteration, self._budget)
            try:
                position, source = self._replace(states, keeps_captions, built)
                break
            except LOST as again:
                error = again
            except StartTimeoutError as failure:
                if self._config.recovery.shortage == "wait":
                    self._give_up(failure, f"the repair failed: {failure.found}", iteration)
                raise
            except SgmdError as failure:
                self._give_up(failure, f"the repair failed: {failure.found}", iteration)
                raise
        lost_s = time.monotonic() - began_s
        names = ", ".join(_in_words(name, ranks) for name, ranks in built.items()) or "no process"
        self._run.events.add(
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
        """Starts a new validator and returns at once; whoever has asked the lost one asks again.

        Raises:
            ClusterError: The budget is spent.
        """
        from cluster.ray.replacement import replace_lost

        began_s = time.monotonic()
        self._admit(error, iteration, self._validator_budget)
        (validator,) = self._ray_groups(self._groups.validator)
        lost = replace_lost([validator], 0.0, beside=[validator])
        # Calls wait behind the building, and training for neither.
        validator.rebuild(validator.ranks_in(lost))
        self._run.events.add(
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

    def _admit(self, error: ClusterError, iteration: int, budget: FailureBudget) -> None:
        """Counts a failure, and waits a moment where it is not the first in a row.

        Raises:
            ClusterError: The failure, where the run must end.
        """
        spent = budget.spend(_sentence(error), iteration, time.monotonic())
        if event := _event_of(error, iteration):
            self._run.events.add(event)
        if spent:
            self._give_up(error, spent, iteration, budget)
            raise error
        time.sleep(budget.pause_s)

    def _give_up(
        self, error: SgmdError, reason: str, iteration: int, budget: FailureBudget | None = None
    ) -> None:
        """Records that nothing is repaired any more, and tells the whole story in the error."""
        self.has_given_up |= budget is not self._validator_budget
        story = (budget or self._budget).story
        self._run.events.add(RunEvent(kind="gave_up", cause=reason, iteration=iteration))
        error.add_note(f"The run was not repaired again: {reason}. Its failures:\n{story}")

    def _replace(
        self, states: States, keeps_captions: Callable[[int], bool], built: dict[str, list[int]]
    ) -> tuple[Position, str]:
        """Replaces lost processes, and restores the learners; returns where, and from what."""
        from cluster.ray.replacement import rebuild, replace_lost, restart_all

        groups, roles = self._ray_groups(*self._groups.all), self._groups.roles
        learners = self._ray_groups(*roles.learners.values())
        states.wait_for_parts()
        beside = [group for group in groups if group is self._groups.validator]
        new = replace_lost(
            groups, self._config.topology.call_timeout_s, self._unbuilt, beside=beside
        )
        self._unbuilt = new
        states.keep_under_repair(
            [
                role
                for role, group in zip(roles.learners, learners, strict=True)
                if group.ranks_in(new)
            ]
        )
        position, source = self._newest_state()
        if source == _BEGINNING:
            # All start as they were loaded.
            new |= restart_all(learners)
        warn = self._run.observer.warning
        self._run.folder.rewind(position.iteration, warn)
        self._run.data.rewind(position.iteration, warn)
        feed = self._ray_groups(self._groups.feed)
        if not keeps_captions(position.iteration) and not feed[0].ranks_in(new):
            new |= restart_all(feed)
        progress = self._run.data.progress(position.cursor, position.rows)
        left = self._config.iterations - position.iteration
        arguments = feed_arguments(
            self._config, self._run.checked, progress, left * self._run.checked.rows_per_iteration
        )
        for group in groups:
            if ranks := group.ranks_in(new):
                built[group.name] = sorted({*built.get(group.name, ()), *ranks})
        given = {self._groups.feed.name: arguments}
        rebuild(groups, new, self._config.recovery.wait_s, given, beside)
        self._unbuilt = set()
        if source == _SNAPSHOT:
            self._snapshots.restore()
        elif source == _CHECKPOINT:
            load_roles(roles, self._run.checkpoints.folder(position.iteration), self._config)
        return position, source

    def _newest_state(self) -> tuple[Position, str]:
        """Position of the newest state that both learners have, and a word for what holds it."""
        kept = self._snapshots.position
        if kept is not None and kept.iteration >= (self._run.checkpoints.latest() or 0):
            return kept, _SNAPSHOT
        passed_over: list[RunEvent] = []
        try:
            saved = resume_position(
                self._config,
                self._run.checked,
                self._run.folder,
                self._run.checkpoints,
                self._run.observer.warning,
                passed_over.append,
            )
        except CheckpointError:
            if kept is None:
                raise
            return kept, _SNAPSHOT
        if kept is not None and kept.iteration >= saved.iteration:
            return kept, _SNAPSHOT
        for event in passed_over:
            self._run.events.add(event)
        return saved, _CHECKPOINT if saved.iteration else _BEGINNING

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


def _failures(count: int) -> str:
    return "1 failure" if count == 1 else f"{count} failures"
