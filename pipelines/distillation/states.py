"""The states of a run on disk: saved and pruned.

    roles copy their state -> threads write checkpoints/step-000200/ -> manifest: whole from here on

Loaded again by `pipelines.distillation.loading`, exported by `pipelines.distillation.exports`.
"""

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from cluster.checkpoints import Checkpoints
from cluster.errors import LOST, StorageError
from cluster.worker_group import Future, WorkerGroup
from pipelines.config.recipe import DistillConfig
from pipelines.config.roles import FAKE_SCORE, GENERATOR
from pipelines.distillation.iteration import Roles
from pipelines.distillation.monitor import RunMonitor
from pipelines.distillation.position import Position
from pipelines.run.folder import RunFolder
from pipelines.run.revision import versions
from sgmd_core.errors import SgmdError, StaleCallError
from workers.generator_learner import AVERAGE
from workers.role_state import is_role_written
from workers.saving import LearningRole

_FAILED_RUN_WAIT_S = 60.0
"""Seconds that a run that has failed waits for the state that is being written."""
_PARTS_WAIT_S, _PARTS_POLL_S = 5.0, 0.1
_SAVING, _PRUNING = "saving", "pruning"

_Asked: TypeAlias = list[tuple[str, WorkerGroup[Any], list[Future[Any]]]]
"""Learners with their groups, and what each of their ranks was asked."""


@dataclass(frozen=True, slots=True)
class _Save:
    """A state that is being saved.

    Attributes:
        step: Iterations made.
        manifest: What to commit it with.
        folder: Folder that it is written to.
        begun: Calls that copy the state of each learner.
    """

    step: int
    folder: str
    manifest: dict[str, Any]
    begun: dict[str, list[Future[int]]]


class States:
    """Saves the learning roles, and says what is saved.

    Args:
        config: The run's settings.
        roles: Whose states they are.
        folder: The run.
        checkpoints: Its committed states.
        monitor: Ranks them.
    """

    def __init__(
        self,
        config: DistillConfig,
        roles: Roles,
        folder: RunFolder,
        checkpoints: Checkpoints,
        monitor: RunMonitor,
    ) -> None:
        self._config = config
        self._roles = roles
        self._folder = folder
        self._checkpoints = checkpoints
        self._monitor = monitor
        self._saving: _Save | None = None
        self._asked: _Asked | None = None
        self._owed: int | None = None
        self._put_off: StorageError | None = None

    def save(self, position: Position, timeout_s: float | None = None) -> None:
        """Saves the present state, and deletes what is then neither new nor among the best.

        With `checkpoint.background` this returns once the roles have been asked to copy their
        state; `collect` commits it later. A state that is still being written is waited for first,
        and one that is committed already is left alone. A store that fails puts it off, as long as
        the run tolerates it: see `is_owed`.

        Args:
            position: Where the run stands.
            timeout_s: Limit of a wait; None: that of a call.

        Raises:
            StorageError: The disk is full or cannot be written to; older states are kept.
            NonFiniteError: A weight of the former state is not finite.
        """
        with self._tolerating(position.iteration):
            self._save(position, timeout_s)

    def _save(self, position: Position, timeout_s: float | None) -> None:
        self.settle()
        if self._put_off is not None and self._folder.publisher.is_out:
            self._owed = position.iteration
            return
        if self._owed is not None:
            # Those that live may still be writing the lost one, perhaps to the same folder.
            self._wait_for_writers()
        self._folder.publisher.require_lease()
        self._owed = self._put_off = None
        step, roles = position.iteration, self._roles
        if not self._checkpoints.fault(step):
            # A repair has kept the save of this state, and went back behind it.
            return
        self._checkpoints.begin(step)
        folder = self._checkpoints.folder(step)
        self._saving = _Save(
            step,
            folder,
            manifest={
                "iteration": step,
                "rows": position.rows,
                "cursor": position.cursor.to_json(),
                "config_digest": self._config.digest,
                "seed": self._config.seed,
                "versions": versions(),
            },
            begun={
                role: group.call(LearningRole.begin_save, folder)
                for role, group in roles.learners.items()
            },
        )
        if not self._config.checkpoint.background:
            self.settle(timeout_s)

    def collect(self) -> None:
        """Commits the state that is being saved once all its parts are written; waits for nothing.

        Raises:
            StorageError, NonFiniteError: As in `save`, of this state.
        """
        if self._saving is not None and self._asked is None:
            self._asked = self._ask_saved(self._saving, wait=False)
        if self._asked is not None and all(
            group.is_done(future) for _, group, futures in self._asked for future in futures
        ):
            assert self._saving is not None, "a save has been begun"
            self._take_and_prune(self._asked, self._config.topology.call_timeout_s)

    def settle(self, timeout_s: float | None = None) -> None:
        """Waits for the state that is being saved, and commits it.

        Args:
            timeout_s: Limit of the wait; None: that of a call.

        Raises:
            StorageError, NonFiniteError: As in `save`, of this state.
        """
        if self._saving is not None:
            limit_s = self._config.topology.call_timeout_s if timeout_s is None else timeout_s
            self._take_and_prune(self._ask_saved(self._saving, wait=True), limit_s)

    def settle_last(self, position: Position) -> None:
        """Waits for the state of the run's end, and for the store where that has put it off.

        Raises:
            StorageError, NonFiniteError: As in `save`, of this state.
        """
        self.settle()
        while self._put_off is not None:
            self._folder.publisher.wait()
            self.save(position)
            self.settle()

    @contextmanager
    def _tolerating(self, step: int) -> Iterator[None]:
        """Puts the state of a step off where the store fails and the run tolerates it."""
        try:
            yield
        except StorageError as error:
            self._saving = self._asked = None
            self._folder.publisher.tolerate(error, _SAVING)
            self._owed, self._put_off = step, error
            self._monitor.observer.warning(
                f"the state of iteration {step} is not saved ({error.found}); the next one is "
                "saved once the store answers"
            )

    def _ask_saved(
        self, saving: _Save, *, wait: bool, roles: Collection[str] | None = None
    ) -> _Asked:
        return [
            (role, group, group.call(LearningRole.finish_save, saving.folder, wait=wait))
            for role, group in self._roles.learners.items()
            if roles is None or role in roles
        ]

    def _take_and_prune(self, asked: _Asked, timeout_s: float) -> None:
        """Commits a state; then old ones go, which is tolerated apart: the new one is saved."""
        assert self._saving is not None, "a save has been begun"
        is_committed = False
        with self._tolerating(self._saving.step):
            is_committed = self._take(asked, timeout_s)
        if not is_committed:
            return
        try:
            self.prune()
            self._folder.publisher.succeeded(_PRUNING)
        except StorageError as error:
            self._folder.publisher.tolerate(error, _PRUNING)
            self._monitor.observer.warning(
                f"old states are not deleted ({error.found}); the next save tries it again"
            )

    def _take(self, asked: _Asked, timeout_s: float) -> bool:
        """Fetches what the ranks have written; returns True if all are done and it is committed."""
        saving, self._asked = self._saving, None
        assert saving is not None, "a save has been begun"
        try:
            digests = self._written(saving, asked, timeout_s)
            if digests is None:
                return False
            self._folder.flush()
            self._checkpoints.commit(saving.step, saving.manifest, digests)
            self._folder.publisher.succeeded(_SAVING)
        except LOST:
            # A repair looks whether the processes that write it are still there.
            raise
        except Exception:
            # A stop is not a failure: after it, the state may still be waited for.
            self._saving = None
            raise
        self._saving = None
        return True

    def _written(self, saving: _Save, asked: _Asked, timeout_s: float) -> dict[str, str] | None:
        """SHA-256 by path of what all ranks have written; None while one is writing."""
        attempted = f"saving the state of iteration {saving.step}"
        parts: list[dict[str, str] | None] = []
        for role, group, futures in asked:
            # Copying comes first in every rank's order, and its errors are to be raised.
            updates = group.fetch(saving.begun[role], timeout_s=timeout_s, attempted=attempted)
            if set(updates) != {self._updates(role, saving)}:
                expected = f"{self._updates(role, saving)} updates on each rank"
                raise StaleCallError(attempted, f"a {group.name} of {updates} updates", expected)
            parts += group.fetch(futures, timeout_s=timeout_s, attempted=attempted)
        written = [part for part in parts if part is not None]
        if len(written) < len(parts):
            return None
        return {name: digest for part in written for name, digest in part.items()}

    def follow(self, monitor: RunMonitor) -> None:
        """Ranks states by another monitor from here on."""
        self._monitor = monitor

    def keep_under_repair(self, lost: Collection[str] = ()) -> None:
        """Commits the state that was being saved when a process was lost, or notes that it is lost.

        Learners whose processes live are waited for. What a lost process has written whole counts.

        Args:
            lost: Learners that have new processes; their former ones write no more.

        Raises:
            WorkerDiedError, ResultLostError: Another process is lost meanwhile.
        """
        saving = self._saving
        if saving is None:
            return
        reason = "a process that was writing it is lost"
        if all(self._is_written(saving, role) for role in lost):
            try:
                self._settle_of(lost)
                return
            except LOST:
                raise
            except SgmdError as error:
                reason = str(error)
        self._saving = self._asked = None
        self._owed = saving.step
        self._monitor.observer.warning(
            f"the state of iteration {saving.step} is not saved ({reason}); the next one is saved "
            "once the run is repaired"
        )

    def wait_for_parts(self) -> None:
        """Waits a moment for a state that ranks of one learner are writing.

        A repair ends the ranks that live with one that is lost, and with them their threads.
        """
        saving, deadline_s = self._saving, time.monotonic() + _PARTS_WAIT_S
        shared = [role for role, group in self._roles.learners.items() if group.size > 1]
        while saving is not None and time.monotonic() < deadline_s:
            if all(self._is_written(saving, role) for role in shared):
                return
            time.sleep(_PARTS_POLL_S)

    def _settle_of(self, lost: Collection[str]) -> None:
        """Commits the state of learners that live, and of lost ones that have written theirs."""
        if not lost:
            self.settle()
            return
        assert self._saving is not None, "a save has been begun"
        live = [role for role in self._roles.learners if role not in lost]
        asked = self._ask_saved(self._saving, wait=True, roles=live)
        self._take_and_prune(asked, self._config.topology.call_timeout_s)

    def _is_written(self, saving: _Save, role: str) -> bool:
        """Tells whether all parts of a learner's state are in the folder."""
        parts = [role]
        if role == GENERATOR and self._config.generator.ema_decay:
            parts.append(AVERAGE)
        return all(
            is_role_written(saving.folder, part, self._updates(role, saving)) for part in parts
        )

    def _updates(self, role: str, saving: _Save) -> int:
        return saving.step * (self._config.objective.fake_updates if role == FAKE_SCORE else 1)

    def _wait_for_writers(self) -> None:
        waiting = [
            (group, group.call(LearningRole.wait_for_writer))
            for group in self._roles.learners.values()
        ]
        for group, answers in waiting:
            self._fetch(group, answers, "waiting for a lost save to end")

    def is_owed(self, iteration: int) -> bool:
        """Returns True if a state was to be saved up to here, and a repair has lost it.

        Or the store has put it off, and answers again.
        """
        is_owed = self._owed is not None and self._owed <= iteration
        return is_owed and not self._folder.publisher.is_out

    def give_up(self) -> None:
        """Waits a while for a state that is being saved by a run that has failed."""
        try:
            self.settle(_FAILED_RUN_WAIT_S)
        except Exception as error:
            # What ended the run is the error to raise; without its manifest the state is not there.
            self._monitor.observer.warning(f"The state that was being saved is lost. {error}")

    def save_if_newer(self, position: Position) -> None:
        """Commits the present state where no state of this iteration or a later one is saved.

        Waits until it is written.
        """
        self.settle()
        if position.iteration > (self._checkpoints.latest() or 0):
            self.save(position)
            self.settle()
        if self._put_off is not None:
            raise self._put_off

    def save_given_up(self, position: Position, timeout_s: float) -> str:
        """Saves the state before an iteration that was given up, where the roles still stand there.

        Args:
            position: Where the run stood before it.
            timeout_s: How long to wait for the calls that are under way, and for the save.

        Returns:
            Empty, or why it could not be saved.
        """
        roles = self._roles
        try:
            self.settle(timeout_s)
            if position.iteration > (self._checkpoints.latest() or 0):
                for group in roles.learners.values():
                    group.call(LearningRole.discard)
                self.save(position, timeout_s)
                self.settle(timeout_s)
            if self._put_off is not None:
                raise self._put_off
        except Exception as error:
            return f"Saving the state before it failed: {error} "
        return ""

    def folder(self, position: Position) -> str:
        """Folder of the checkpoint of a position."""
        return self._checkpoints.folder(position.iteration)

    def prune(self) -> None:
        """Deletes checkpoints that are neither new nor among the best."""
        self._folder.publisher.require_lease()
        self._checkpoints.prune(self._config.checkpoint.keep, self._monitor.spared)
        self._monitor.write_ranking()

    def keep_last_good(self, position: Position, *, may_save: bool) -> str:
        """Says which state is the last good one; saves the present one before, where it is good.

        Args:
            position: Where the run stood before the iteration that failed.
            may_save: Whether the roles still stand there. Several ranks may wait for a failed one,
                so those are not asked.
        """
        one_rank = all(group.size == 1 for group in self._roles.learners.values())
        unsaved = ""
        try:
            if may_save and one_rank:
                self.save_if_newer(position)
        except Exception as error:
            # What ended the run is the error to raise; this one is added to its message.
            unsaved = f"Saving the state before iteration {position.iteration} failed: {error} "
        return unsaved + self.last_good()

    def last_good(self) -> str:
        """Says which state the run can be taken up at; waits a while for one being written."""
        self.give_up()
        if not self._has_files():
            root, place = self._folder.root, str(self._folder)
            return f"The files in {root} are gone, deleted, moved or unmounted: " + (
                f"put them back and go on with --resume {place}, or start the run again."
                if place == str(root)
                else f"what was written to {place} is still there; go on with --resume {place}."
            )
        try:
            latest = self._checkpoints.latest()
        except StorageError as error:
            # What ends the run is the error to raise.
            return (
                f"The states cannot be listed ({error.found}); go on from the newest one with"
                f" --resume {self._folder}."
            )
        if latest is None:
            return (
                f"No state was saved; --resume {self._folder} starts at the beginning, with"
                " the same settings."
            )
        return (
            f"The last good state is {self._checkpoints.folder(latest)}; go on from it with"
            f" --resume {self._folder}."
        )

    def _has_files(self) -> bool:
        try:
            return self._folder.config.exists()
        except OSError:
            # A mount that fails: what ends the run is the error to raise.
            return False

    def _fetch(self, group: Any, pending: Sequence[Future[Any]], attempted: str) -> list[Any]:  # noqa: ANN401
        return group.fetch(
            pending, timeout_s=self._config.topology.call_timeout_s, attempted=attempted
        )
