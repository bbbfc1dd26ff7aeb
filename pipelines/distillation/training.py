"""A distillation under way: the loop and its bookkeeping.

    captions -> iterate -> record -> save, validate -> ... -> export, summary
    a process is lost -> recover -> the loop goes on from the last common state

The controller passes references and small records; tensors stay with the roles.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from cluster.errors import ClusterError, StorageError, WorkerDiedError
from cluster.storage import write_json
from cluster.worker_group import Future
from pipelines.distillation.endings import Endings
from pipelines.distillation.exports import Exports
from pipelines.distillation.guards import UpdateGuard
from pipelines.distillation.iteration import IterationReport, run_iterations
from pipelines.distillation.iteration_plan import plan_iteration
from pipelines.distillation.lag import LagWatch
from pipelines.distillation.loading import load_generator, load_roles
from pipelines.distillation.monitor import RunMonitor, is_due
from pipelines.distillation.open_run import OpenRun
from pipelines.distillation.position import Position
from pipelines.distillation.prompts import PromptPlan, Prompts
from pipelines.distillation.recovery import Recovery
from pipelines.distillation.snapshots import Snapshots
from pipelines.distillation.states import States
from pipelines.distillation.summary import summarise
from pipelines.distillation.training_sets import takes_sizes_from_data
from pipelines.run.folder import append_jsonl, read_jsonl
from pipelines.run.places import shared_place
from pipelines.run.records import IterationRecord
from pipelines.run.stop_rule import StopRule
from pipelines.run.stopping import StopRequests
from pipelines.run.trace import RunTrace
from sgmd_core.errors import AlarmError, NonFiniteError
from sgmd_core.objectives import restarts_of
from sgmd_core.types import Text
from workers.generator_learner import GeneratorLearner
from workers.text_encoder import TextEncoder

# Iterations that may overlap before the loop waits for all; bounds the controller's list of calls.
_LONGEST = 10


class Distillation:
    """A run under way: the loop and its bookkeeping.

    Args:
        run: The run, with its roles started.
    """

    def __init__(self, run: OpenRun) -> None:
        config, groups, folder = run.config, run.groups, run.folder
        self._run, self._config, self._groups, self._folder = run, config, groups, folder
        self._observer = run.observer
        roles, recovery = groups.roles, config.recovery
        self._is_on_ray = config.topology.mode != "local"
        self._snapshots = Snapshots(
            roles,
            recovery.snapshot_share if self._is_on_ray and recovery.failures_per_hour else 0.0,
            config.topology.call_timeout_s,
            run.observer.warning,
        )
        self._recovery = Recovery(run, self._snapshots)
        lines = read_jsonl(folder.metrics)
        self._guard = UpdateGuard(
            config.guards, roles.scheduled, config.topology.call_timeout_s, lines
        )
        self._lag = LagWatch(config.lag, roles, lines, restarts_of(config.objective))
        self._position = Position()
        self._prompts: Prompts | None = None
        self._rebuilt: set[str] = set()
        self._noted: Exception | None = None
        self._monitor = self._new_monitor()
        self._states = States(config, roles, folder, run.checkpoints, self._monitor)
        self._plan = plan_iteration(config, self._negative())
        self._trace = RunTrace(
            [*roles.scheduled.values(), roles.text],
            [groups.feed, *([groups.validator] if groups.validator else [])],
            config.trace.iterations,
            config.topology.call_timeout_s,
            waits=not self._plan.max_staleness_iterations,
        )

    def load(self, start: Position) -> None:
        """Puts the learning roles back to a committed state."""
        if not start.iteration:
            return
        for iteration in self._monitor.lost(start.iteration):
            folder = self._run.checkpoints.folder(iteration)
            load_generator(self._groups.roles.generator, folder, self._config)
            self._validate(iteration, is_last=True)
        folder = self._run.checkpoints.folder(start.iteration)
        load_roles(self._groups.roles, folder, self._config)

    def train(
        self,
        start: Position,
        stop_rule: StopRule,
        stops: StopRequests,
    ) -> None:
        """Iterates to the end; checkpoints and validates on the way.

        Args:
            start: Where the run stands.
            stop_rule: Ends the training.
            stops: Requests from outside to end the run.

        Raises:
            StopRequestedError: A stop was asked for; the state is saved.
            NonFiniteError: More updates than may be skipped, with a note that says where the last
                good state is.
            AlarmError: An alarm that the recipe stops at, or more spikes than may be skipped; the
                state is saved.
            DataError: Too much of the data cannot be used, or their server failed.
        """
        if self._prompts is None:
            self._prompts = self._open_prompts(start.iteration)
        prompts, self._position, spent_s = self._prompts, start, self._seconds_spent()
        is_last = stop_rule.is_reached(start.iteration, spent_s)
        self._catch_up(is_last)
        if self._monitor.fatal is not None and not is_last:
            # It was raised just before a process was lost.
            raise self.endings.alarm(self._monitor.fatal, start)
        while not stop_rule.is_reached(self._position.iteration, spent_s):
            self._keep_snapshot()
            before_s = spent_s
            # Recorded seconds, not wall time: a resumed run stops at the same iteration.
            for took_s in self._iterations(prompts, stops):
                spent_s += took_s
            position = self._position
            is_last = stop_rule.is_reached(position.iteration, spent_s)
            is_time = stop_rule.saves_between(before_s, spent_s)
            due = is_time or self._saves_at(position.iteration)
            if is_last or due or self._states.is_owed(position.iteration):
                self._states.save(position)
            if is_last or self._monitor.validates_at(position.iteration):
                self._validate(position.iteration, is_last)
            self._monitor.collect()
            self._states.collect()
            self._folder.publisher.check()
            if self._monitor.fatal is not None and not is_last:
                raise self.endings.alarm(self._monitor.fatal, position)
            if stops.received:
                raise self.endings.stopped(stops, position)

    def _iterations(self, prompts: Prompts, stops: StopRequests) -> Iterator[float]:
        """Makes and records the iterations up to the next check of saves and validations.

        Yields:
            Recorded seconds of each.
        """
        first, began = self._position.iteration, time.perf_counter()
        together = self._num_together(first)
        with stops.ending_in(
            lambda: self.endings.gave_up(stops, self._position, is_in_step=self._is_in_step)
        ):
            try:
                if problem := self._lag.measure(self._plan, first, prompts.of, stops):
                    self._observer.warning(problem)
                if stops.received:
                    raise self.endings.stopped(stops, self._position)
                reports = run_iterations(
                    self._groups.roles,
                    replace(self._plan, generator_rate=self._lag.rate),
                    first,
                    together,
                    prompts.of,
                    guard=self._guard,
                    stops=stops,
                )
                # In one process, an interrupted update would be half done.
                for report in stops.bounded(reports, interrupts=self._is_on_ray):
                    yield self._record(report, prompts, began)
                    began = time.perf_counter()
            except (NonFiniteError, AlarmError) as error:
                may_save = self._is_in_step and self._guard.weights_are_finite
                self.note_last_good(error, may_save=may_save)
                raise

    def recover(self, error: ClusterError) -> Position:
        """Replaces lost processes, and returns both learners to their last common state.

        Args:
            error: The failure, one of `cluster.errors.LOST`.

        Returns:
            The position that the run continues from.

        Raises:
            SgmdError: The failure, if the run cannot continue.
        """
        if not self._is_on_ray:
            raise error
        prompts = self._prompts
        repaired = self._recovery.repair(
            error,
            self._position.iteration,
            self._states,
            lambda first: prompts is not None and prompts.remembers(first),
        )
        iteration = repaired.position.iteration
        self._rebuilt |= repaired.built.keys()
        # This may fail by another lost process; the next repair then does what follows.
        self._trace.rewind(iteration, self._rebuilt)
        built, self._rebuilt = self._rebuilt, set()
        lines = read_jsonl(self._folder.metrics)
        self._guard.replay(lines)
        self._lag.replay(lines)
        validator = self._groups.validator
        asks_again = validator is not None and validator.name in built
        former, self._monitor = self._monitor, self._new_monitor()
        self._states.follow(self._monitor)
        self._monitor.take_over(former, iteration, again=asks_again)
        self._plan = replace(
            self._plan, negative=self._negative(), incarnation=self._plan.incarnation + 1
        )
        if prompts is None or self._groups.feed.name in built:
            self._prompts = None
        else:
            prompts.rewind()
        return repaired.position

    def write_trace(self) -> None:
        """Writes trace.json of all calls so far, also after a failure."""
        try:
            self._trace.write(self._folder.trace)
        except StorageError as error:
            # This error must not hide an earlier one.
            self._observer.warning(f"{self._folder.trace.name} was not written. {error}")

    @property
    def has_given_up(self) -> bool:
        """True if failures are not repaired: no Ray, the budget is spent, or a repair failed."""
        return not self._is_on_ray or self._recovery.has_given_up

    def note_last_good(self, error: Exception, *, may_save: bool = False) -> None:
        """Adds a note to an error, once: the state that the run can be resumed from.

        Args:
            error: The error that ends the run.
            may_save: Whether the roles stand where the run does, in a state worth saving.
        """
        if error is not self._noted:
            self._noted = error
            error.add_note(self._states.keep_last_good(self._position, may_save=may_save))

    def finish(self, stops: StopRequests) -> dict[str, Any]:
        """Exports the generator, waits for the last validations and writes the summary.

        Raises:
            StopRequestedError: A stop was asked for; the last state is saved.
        """
        with stops.ending_in(lambda: self.endings.while_finishing(stops)):
            return self._finish()

    def _finish(self) -> dict[str, Any]:
        self._observer.note(f"writing the generator to {shared_place(self._folder.generator)}")
        self._states.settle_last(self._position)
        insist, exports = self._folder.publisher.insist, self._exports
        insist("the generator", lambda: exports.export(self._folder.generator))
        self._monitor.finish()
        insist("pruning", self._states.prune)
        insist("the best generator", exports.export_best)
        self._trace.close(self._monitor.silent)
        summary = summarise(
            self._config, self._folder, self._run.data.counts(), self._monitor.ranking
        )
        summary |= {
            "utilisation": self._trace.utilisation(),
            "critical_path_s": self._trace.critical_path(),
            "ranking_note": self._monitor.ranking_note,
            "validation_problem": self._monitor.problem,
            "left_out": self._left_out(),
        }
        write_json(str(self._folder.summary), summary)
        return summary

    def _left_out(self) -> list[str]:
        """Components without which the generator makes no clips of prompts, if it lacks some."""
        model = self._run.checked.model
        lacks_all = self._config.export.components == "none"
        return [name for name in model.layout.dispensable if lacks_all or name not in model.weights]

    def _new_monitor(self) -> RunMonitor:
        """A monitor that starts from the records in the run's folder."""
        return RunMonitor(
            self._config,
            self._folder,
            self._run.checkpoints,
            self._groups.validator,
            self._observer,
            self._replace_validator if self._is_on_ray else None,
        )

    def _replace_validator(self, error: WorkerDiedError) -> None:
        self._recovery.replace_validator(error, self._position.iteration)

    def _negative(self) -> Future[Text]:
        return self._groups.roles.text.call_rank(
            0, TextEncoder.encode_negative, self._config.model.negative_prompt
        )

    def _keep_snapshot(self) -> None:
        """Copies the learners' state into memory of other processes, if a copy is due."""
        if self._snapshots.is_due(self._position):
            self._snapshots.take(self._position)
            if self._prompts is not None:
                self._prompts.forget(self._position.iteration)

    def _catch_up(self, is_last: bool) -> None:
        """Makes the save and the validation that a failure has prevented."""
        iteration = self._position.iteration
        if not iteration:
            return
        if is_last or self._saves_at(iteration) or self._states.is_owed(iteration):
            self._states.save(self._position)
        validates = is_last or self._monitor.validates_at(iteration)
        if validates and not self._monitor.is_known(iteration):
            self._validate(iteration, is_last)

    @property
    def endings(self) -> Endings:
        """Ends of the run before its last iteration."""
        return Endings(self._config, self._folder, self._states, self._exports, self._run.events)

    @property
    def _exports(self) -> Exports:
        """Exports by the present monitor's ranking."""
        generator = self._groups.roles.generator
        return Exports(self._config, generator, self._folder, self._run.checkpoints, self._monitor)

    @property
    def _is_in_step(self) -> bool:
        """True if both roles still stand before an iteration that fails."""
        return not (self._plan.fresh_tracking or self._plan.max_staleness_iterations)

    def _saves_at(self, iteration: int) -> bool:
        every = self._config.checkpoint.every
        due = iteration == self._config.iterations or is_due(iteration, every)
        return due or (self._monitor.ranks and self._monitor.validates_at(iteration))

    def _open_prompts(self, first: int) -> Prompts:
        config = self._config
        return Prompts(
            self._groups.feed,
            self._run.data,
            PromptPlan(
                config.batch.size,
                self._plan.batches_per_iteration,
                stored=self._run.checked.has_stored_text,
                has_data=self._run.checked.has_data_latents,
                seed=config.seed,
                dropout=config.data.prompt_dropout,
                has_buckets=takes_sizes_from_data(config),
            ),
            iterations=(first, config.iterations),
            timeout_s=config.topology.call_timeout_s,
        )

    def _num_together(self, first: int) -> int:
        """Iterations from here that may overlap, up to the next save, validation or measurement."""
        if not self._plan.max_staleness_iterations:
            return 1
        last = first + 1
        ends = (self._saves_at, self._monitor.validates_at, self._lag.is_due)
        while last - first < _LONGEST and not any(is_one(last) for is_one in ends):
            last += 1
        return last - first

    def _record(self, report: IterationReport, prompts: Prompts, began: float) -> float:
        """Records a finished iteration, and moves the run's position; returns its seconds."""
        iteration = self._position.iteration
        taken = prompts.used(iteration)
        last = taken.batches[-1]
        self._run.data.record(iteration, taken.batches)
        record = IterationRecord(
            iteration=iteration,
            losses=report.losses,
            grad_norms=report.grad_norms,
            seconds=self._trace.add(iteration, report.issued),
            seconds_total=time.perf_counter() - began,
            data_wait_s=taken.waited_s,
            samples_seen=last.position,
            epoch=last.passes,
            cursor=last.cursor.to_json(),
            rejected=taken.rejected,
            exit_steps=report.exit_steps,
            stale_calls=report.stale_calls,
            skipped=tuple(one.to_json() for one in report.skipped),
            lag=self._lag.take(iteration),
            learning_rates=report.learning_rates,
            bucket=self._config.bucket_at(iteration).label if self._config.video.buckets else "",
        )
        append_jsonl(self._folder.metrics, record.to_json())
        for skipped in report.skipped:
            self._run.events.add(skipped.event(iteration))
        self._observer.iteration(record)
        self._monitor.iteration(record)
        self._snapshots.add_iteration(record.seconds_total)
        self._position = Position(iteration + 1, last.position, last.cursor)
        return record.seconds_total

    def _seconds_spent(self) -> float:
        """Training time of all iterations so far."""
        return sum(record["seconds"]["total"] for record in read_jsonl(self._folder.metrics))

    def _validate(self, iteration: int, is_last: bool) -> None:
        if self._groups.validator is not None:
            weights = self._groups.roles.generator.call(GeneratorLearner.validated_weights)[0]
            self._monitor.validate(iteration, weights, is_last=is_last)
