"""Monitors a run while it goes on: validations, alarms, the ranking of its states.

    after every iteration   losses          -> alarms
    when one is due         averaged weights -> validator, on its own resources
    when one is back        validation.jsonl, sheet, tracker -> alarms -> ranking.json

Nothing here waits for a validation before the end of the run. The validator works through what it
is asked one after another; while two validations wait, a further one is left out rather than kept,
because each holds a copy of the weights.

Training does not depend on it:

    the validator's process is lost    replaced as often as the recipe allows, and asked again
    so is its machine, with roles      goes up to the run, which replaces all that was there at once
    weights that it waits for          that validation is left out; the training's own next call
                                       fails if the role that had them is lost
    it fails, or times out at the end  reported, and not asked again
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from cluster.checkpoints import Checkpoints
from cluster.errors import (
    LOST,
    CallTimeoutError,
    ClusterError,
    NodeLostError,
    StorageError,
    WorkerDiedError,
)
from cluster.storage import write_json
from cluster.worker_group import Future, WorkerGroup
from pipelines.config.recipe import DistillConfig
from pipelines.distillation.validation import Validator
from pipelines.run.alarms import Alarm, AlarmWatch
from pipelines.run.folder import RunFolder, append_jsonl, read_jsonl
from pipelines.run.observer import RunObserver
from pipelines.run.opened_copy import copy_at
from pipelines.run.ranking import Contender, Ranked, not_told_apart, ranked, scores_of
from pipelines.run.records import IterationRecord, ValidationRecord

_MAX_WAITING = 2
_LISTING = "listing"
"""Validations under way at a time, except for those that must not be left out."""


@dataclass(frozen=True, slots=True)
class _Validation:
    """One that has been asked for."""

    iteration: int
    weights: Future[Any]
    future: Future[ValidationRecord]


@dataclass
class RunMonitor:
    """Watches one run.

    Attributes:
        config: The run's settings.
        folder: Where the run is written down.
        checkpoints: Its committed states.
        validator: Validates on resources of its own; None where the recipe wants none.
        observer: Receives validations and alarms.
        replace_validator: Starts a new process for the validator, or raises the error it is given;
            None: nothing can be replaced.
    """

    config: DistillConfig
    folder: RunFolder
    checkpoints: Checkpoints
    validator: WorkerGroup[Validator] | None
    observer: RunObserver
    replace_validator: Callable[[WorkerDiedError], None] | None = None
    _watch: AlarmWatch = field(init=False)
    _scores: dict[int, float] = field(init=False)
    _waiting: deque[_Validation] = field(init=False, default_factory=deque)
    _fatal: Alarm | None = field(init=False, default=None)
    _judged_until: int = field(init=False, default=0)
    _lost: set[int] = field(init=False, default_factory=set)
    _problem: str | None = field(init=False, default=None)
    _steps: list[int] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        """Takes note of what an earlier part of the run has found."""
        self._watch = AlarmWatch(self.config.alarms)
        validations = read_jsonl(self.folder.validation)
        self._watch.replay(read_jsonl(self.folder.metrics), validations)
        self._scores = scores_of(validations, self.config.checkpoint.score) if self.ranks else {}
        self._judged_until = max((line["iteration"] for line in validations), default=0)

    @property
    def ranks(self) -> bool:
        """True if checkpoints are ranked: every validated state is then one."""
        return self.validator is not None and self.config.checkpoint.keep_best > 0

    @property
    def fatal(self) -> Alarm | None:
        """The alarm that the recipe stops at, once it has sounded."""
        return self._fatal

    @property
    def problem(self) -> str | None:
        """Reason why the validator is not called any more; None while it is."""
        return self._problem

    @property
    def silent(self) -> list[WorkerGroup[Validator]]:
        """The validator, where it is no longer asked: it may not answer."""
        return [self.validator] if self.validator and self._problem is not None else []

    @property
    def ranking(self) -> list[Ranked]:
        """Checkpoints that are there, the best first."""
        if not self.ranks:
            return []
        return ranked(self._scores, self.config.checkpoint.mode, self._kept_steps())

    @property
    def ranking_note(self) -> str:
        """Names the states that may be as good as the best one; empty where it is the best."""
        if not self._scores:
            return ""
        score = self.config.checkpoint.score
        lines = {line["iteration"]: line for line in read_jsonl(self.folder.validation)}
        contenders = [
            Contender.of_validation(str(entry.iteration), lines[entry.iteration], score)
            for entry in ranked(self._scores, self.config.checkpoint.mode)
            if score in lines.get(entry.iteration, {}).get("figures", {})
        ]
        return not_told_apart(contenders, "checkpoints", score)

    @property
    def spared(self) -> set[int]:
        """Checkpoints that must not be deleted: the best ones, and those not yet judged."""
        if not self.ranks:
            return set()
        best = self.ranking[: self.config.checkpoint.keep_best]
        waiting = {job.iteration for job in self._waiting}
        return {entry.iteration for entry in best} | waiting | self._lost

    def validates_at(self, iteration: int) -> bool:
        """Returns True if a validation is due after so many iterations."""
        every = self.config.validation.every
        return every > 0 and (iteration == self.config.iterations or is_due(iteration, every))

    def lost(self, now: int) -> list[int]:
        """States up to here whose validations were under way when the run ended."""
        lost = [
            step
            for step in self.checkpoints.steps()
            if self._judged_until < step <= now and self.validates_at(step)
        ]
        # Of many, those before the last one that were asked for first: each holds weights.
        return [*lost[:-1][:_MAX_WAITING], *lost[-1:]]

    def iteration(self, record: IterationRecord) -> None:
        """Compares the losses of an iteration with the limits of the alarms."""
        self._raise(self._watch.iteration(record))

    def validate(self, iteration: int, weights: Future[Any], *, is_last: bool = False) -> None:
        """Asks for a validation and returns at once.

        Args:
            iteration: Updates that the weights have seen.
            weights: The generator's averaged weights, on their way.
            is_last: Never leave it out: no other one follows.
        """
        self.collect()
        if self.validator is None or self._problem is not None:
            return
        if len(self._waiting) >= _MAX_WAITING and not is_last:
            busy = ", ".join(str(job.iteration) for job in self._waiting)
            self.observer.note(
                f"validation at iteration {iteration} left out: those at {busy} are under way. "
                "Give topology.validator more, or raise validation.every"
            )
            return
        self._waiting.append(self._asked(iteration, weights))

    def is_known(self, iteration: int) -> bool:
        """Returns True if a state has been validated, or its validation is under way."""
        asked = {job.iteration for job in self._waiting}
        return iteration <= self._judged_until or iteration in asked

    def take_over(self, former: "RunMonitor", iteration: int, *, again: bool) -> None:
        """Goes on with the validations and the fatal alarm of a monitor, before this iteration.

        Args:
            former: The monitor of the run before it went back.
            iteration: Where the run stands now; later validations will be asked for again.
            again: The validator is a new process, and is asked again.
        """
        self._problem, self._lost = former._problem, former._lost
        if former._fatal is not None and former._fatal.iteration <= iteration:
            # It is part of what was replayed, so it would not sound again.
            self._fatal = former._fatal
        for job in former._waiting:
            # The weights of the state itself may be lost: it is validated again.
            if job.iteration < iteration:
                self._waiting.append(self._asked(job.iteration, job.weights) if again else job)

    def collect(self) -> None:
        """Writes down the validations that are back; waits for none."""
        while self._waiting and self.validator and self.validator.is_done(self._waiting[0].future):
            self._take()

    def finish(self) -> None:
        """Waits for the validations that were asked for, as long as the recipe says."""
        while self._waiting:
            self._take()

    def write_ranking(self) -> None:
        """Rewrites ranking.json: after a validation, and when checkpoints have been deleted."""
        if not self._scores:
            return
        settings = self.config.checkpoint
        there = set(self._kept_steps())
        entries = [
            {
                "iteration": entry.iteration,
                "score": entry.score,
                "checkpoint": (
                    self.checkpoints.folder(entry.iteration) if entry.iteration in there else None
                ),
            }
            for entry in ranked(self._scores, settings.mode)
        ]
        content = {
            "score": settings.score,
            "mode": settings.mode,
            "states": entries,
            "note": self.ranking_note,
        }
        write_json(str(self.folder.ranking), content)

    def _kept_steps(self) -> list[int]:
        """Steps of the checkpoints; while the run tolerates a failing store, those of before."""
        try:
            self._steps = self.checkpoints.steps()
            self.folder.publisher.succeeded(_LISTING)
        except StorageError as error:
            self.folder.publisher.tolerate(error, _LISTING)
        return self._steps

    def _bring_sheet(self, record: ValidationRecord) -> None:
        """Brings the contact sheet to a working copy: the validator has put it at the address."""
        copy = copy_at(self.folder.root)
        if copy is None:
            return
        sheet = self.folder.samples / record.sheet
        try:
            copy.fetch_files(sheet, sheet.with_suffix(".gif"))
        except StorageError as error:
            self.observer.warning(f"The sheet {record.sheet} is not shown here. {error}")

    def _asked(self, iteration: int, weights: Future[Any]) -> _Validation:
        assert self.validator is not None, "nothing validates"
        future = self.validator.call_rank(0, Validator.validate, iteration, weights)
        return _Validation(iteration, weights, future)

    def _take(self) -> None:
        """Fetches the oldest validation and draws conclusions; nothing is taken where it failed."""
        assert self.validator is not None, "only a validator's work waits"
        job = self._waiting[0]
        attempted = f"validating iteration {job.iteration}"
        timeout_s = self.config.validation.timeout_s
        try:
            (record,) = self.validator.fetch([job.future], timeout_s=timeout_s, attempted=attempted)
        except Exception as error:
            self._do_without(job, error)
            return
        self._waiting.popleft()
        self._lost.discard(record.iteration)
        self._judged_until = max(self._judged_until, record.iteration)
        append_jsonl(self.folder.validation, record.to_json())
        self._bring_sheet(record)
        self.observer.validation(record, self.folder.samples)
        self._raise(self._watch.validation(record))
        if self.ranks:
            self._scores |= scores_of([record.to_json()], self.config.checkpoint.score)
            self.write_ranking()

    def _do_without(self, job: _Validation, error: Exception) -> None:
        """Asks again, leaves one validation out, or gives the validator up; see the file's top.

        Raises:
            NodeLostError: The validator's machine is gone, with processes of the training.
        """
        lost = _groups_lost(error)
        own = self.validator.name if self.validator else ""
        if own in lost and lost != {own}:
            raise error
        if own not in lost and isinstance(error, LOST):
            self._waiting.remove(job)
            self._lost.add(job.iteration)
            self.observer.warning(
                f"The validation of iteration {job.iteration} is left out: its weights are lost. "
                f"{type(error).__name__}: {error.found}"
            )
        elif not self._ask_again(error):
            # Whatever it is, hours of training are worth more than the figures.
            self._give_up(job, error)

    def _ask_again(self, error: Exception) -> bool:
        """Asks a new validator for all that a lost one was asked for; False if there is none."""
        if self.replace_validator is None or not isinstance(error, WorkerDiedError):
            return False
        try:
            self.replace_validator(error)
        except ClusterError:
            return False
        self._waiting = deque(self._asked(job.iteration, job.weights) for job in self._waiting)
        return True

    def _give_up(self, job: _Validation, error: Exception) -> None:
        """Does without the validator from here on."""
        self._lost |= {job.iteration, *(other.iteration for other in self._waiting)}
        self._waiting.clear()
        late = isinstance(error, CallTimeoutError)
        what = "was not back in time" if late else "failed"
        self._problem = (
            f"The validation of iteration {job.iteration} {what}, and no other one is made; the "
            f"training does not depend on it. {type(error).__name__}: {error}"
        )
        self.observer.warning(self._problem)

    def _raise(self, alarms: Iterable[Alarm]) -> None:
        for alarm in alarms:
            append_jsonl(self.folder.alarms, alarm.to_json())
            self.observer.alarm(alarm)
            if alarm.name in self.config.alarms.stop and self._fatal is None:
                self._fatal = alarm


def _groups_lost(error: Exception) -> set[str]:
    """Groups that have lost a process; empty where the error tells of none."""
    if isinstance(error, NodeLostError):
        return {group for group, _ in error.lost}
    return {error.group} if isinstance(error, WorkerDiedError) else set()


def is_due(iteration: int, every: int) -> bool:
    """Returns True after every so many iterations; 0 is never."""
    return every > 0 and iteration % every == 0
