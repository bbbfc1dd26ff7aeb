"""The main job: distils a many-step teacher into a few-step generator.

    check everything -> start the roles -> [take captions -> iterate -> record] -> export

    distill              opens the run's folder, or a working copy of one at an address
    _checked_distill     checks settings, model, data and machine; locks the folder, handles signals
    _distill             starts or resumes the run; repeats with a smaller topology if machines are
                         lost for good
    _place_and_train     starts the roles' processes and the trackers, loads the state
    _train               trains to the end, and repairs failures

The controller, the process that runs this, passes references and small records; tensors stay with
the roles. The loop over iterations is in `training.py`, one iteration in `iteration.py`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cluster.checkpoints import Checkpoints
from cluster.errors import LOST, ClusterError, StartTimeoutError
from pipelines.config.recipe import DistillConfig
from pipelines.distillation.endings import stopped_early
from pipelines.distillation.groups import open_groups
from pipelines.distillation.open_run import OpenRun
from pipelines.distillation.position import (
    Position,
    begin,
    resume_position,
    warn_of_gaps,
    with_draws_of,
)
from pipelines.distillation.preflight import Preflight, run_preflight
from pipelines.distillation.readiness import check_machine
from pipelines.distillation.replanning import fitting_topology, topology_in_words
from pipelines.distillation.training import Distillation
from pipelines.distillation.training_sets import training_sets
from pipelines.run.data_log import DataLog
from pipelines.run.events import EventLog
from pipelines.run.folder import RunFolder
from pipelines.run.log import RunLog, hearing_loggers
from pipelines.run.observer import Observers, RunObserver
from pipelines.run.opened_copy import hold_place, working_copy
from pipelines.run.places import shared_place
from pipelines.run.publisher import publishing
from pipelines.run.records import RunEvent
from pipelines.run.stop_rule import StopRule
from pipelines.run.stopping import StopRequests, stop_requests
from pipelines.run.tensorboard import open_tensorboard
from pipelines.run.tracker import open_tracker
from sgmd_core.errors import AlarmError, StopRequestedError

NOT_NEEDED = ("samples", "stacks", "wandb", "tensorboard")
"""Folders of an earlier part of the run that a resume does not read."""


def dry_run(config: DistillConfig, *, resume: bool = False) -> dict[str, Any]:
    """Checks a configuration against model, data and this machine without starting anything.

    Args:
        config: The run.
        resume: Whether an earlier run is to be resumed.

    Returns:
        Size and cost of the run; the checks made and left out, under `checked` and `not_checked`.

    Raises:
        SgmdError: A setting, the model or the data do not fit.
    """
    found = run_preflight(config)
    with working_copy(config.run_folder, NOT_NEEDED):
        encoding = found.texts.encoding
        machine = check_machine(config, found.model, resume=resume, encoding=encoding)
    return found.to_json(config) | {
        "checked": found.checked | dict(machine.checked),
        "not_checked": found.not_checked | dict(machine.not_checked),
    }


def distill(
    config: DistillConfig,
    *,
    resume: bool = False,
    observer: RunObserver | None = None,
    in_trial: bool = False,
    stop_rule: StopRule | None = None,
    service: str = "",
) -> dict[str, Any]:
    """Runs the distillation that a configuration describes.

    Args:
        config: The run; its folder is `config.run_folder`.
        resume: Continue from the newest checkpoint in that folder. The resumed run makes the same
            numbers as an uninterrupted one (bitwise on a CPU).
        observer: Receives the events of the run.
        in_trial: Use the placement group of the Tune trial that this process is.
        stop_rule: Ends the run, at `config.iterations` at the latest, which is its default.
        service: Name of a `cluster.ray.service` whose frozen roles the run uses; empty: own ones.

    Returns:
        The run's summary, as summary.json holds it.

    Raises:
        SgmdError: A wrong setting, model folder or shard, before anything is started; or a loss
            that stopped being finite, with a note of where the last good state is.
        ClusterError: Ray, a pool or a worker is missing or lost.
        LeaseError: Another process runs in the folder.
    """
    terminal = observer or RunObserver()
    terminal.note("checking model folder, shards and settings")
    with working_copy(config.run_folder, NOT_NEEDED):
        return _checked_distill(
            config,
            resume=resume,
            terminal=terminal,
            in_trial=in_trial,
            stop_rule=stop_rule or StopRule(config.iterations),
            service=service,
        )


@dataclass(frozen=True)
class _Job:
    """A checked distillation, in a folder that this process holds.

    Args:
        checked: Result of the checks before the run.
        folder: Of the run.
        log: The folder's log.
        events: Receives what happens to the run.
        stops: Requests to stop.
        stop_rule: Ends the run.
        resume: Whether an earlier run is resumed.
        in_trial: Whether the run has the placement group of a Tune trial.
        service: Name of the service whose frozen roles the run uses; empty: own ones.
    """

    checked: Preflight
    folder: RunFolder
    log: RunLog
    events: EventLog
    stops: StopRequests
    stop_rule: StopRule
    resume: bool
    in_trial: bool
    service: str


def _checked_distill(
    config: DistillConfig,
    *,
    resume: bool,
    terminal: RunObserver,
    in_trial: bool,
    stop_rule: StopRule,
    service: str,
) -> dict[str, Any]:
    """Checks a distillation, and runs it in its folder on this machine."""
    folder = RunFolder(config.run_folder)
    log = RunLog(folder.log, config.name, terminal.warning)
    observer = Observers([terminal, log])
    config = with_draws_of(config, folder) if resume else config
    checked = run_preflight(config)
    if checked.data.found:
        observer.warning(f"data.train: {checked.data.found}")
    for unfinished in checked.unfinished_sets:
        observer.warning(f"data.train: {unfinished}")
    if checked.unknown_words.num_affected:
        observer.warning(checked.unknown_words.in_words())
    encoding = checked.texts.encoding
    check_machine(config, checked.model, resume=resume, gpus=False, encoding=encoding)
    with (
        stop_requests(observer.warning, config.checkpoint.stop_after_s) as stops,
        hold_place(folder.root, f"sgmd distill {config.name}", NOT_NEEDED) as lease,
        hearing_loggers(log, terminal.warning),
    ):
        events = EventLog(folder, observer)
        with (
            stops.ending_in(lambda: stopped_early(stops, config, str(folder))),
            publishing(folder.root, lease, config.recovery.storage_outage_s, events.add),
            _errors_in(log, stops),
        ):
            job = _Job(checked, folder, log, events, stops, stop_rule, resume, in_trial, service)
            return _distill(config, job)


@contextmanager
def _errors_in(log: RunLog, stops: StopRequests) -> Iterator[None]:
    """Writes the error that ends a run into its log, before that is published."""
    try:
        yield
    except Exception as error:
        if isinstance(error, StopRequestedError) or not stops.broke_off:
            log.write("ERROR", f"{type(error).__name__}: {error}")
        raise


def _distill(config: DistillConfig, job: _Job) -> dict[str, Any]:
    """Runs a job, on a smaller topology if machines are lost for good."""
    earlier: list[RunEvent] = []
    if job.resume:
        start, earlier = _resume(config, job)
    else:
        start = Position()
        begin(config, job.checked, job.folder)
    job.log.open()
    if job.in_trial:
        # Tune made the placement group, so the topology cannot change.
        config = config.with_settings({"recovery.shortage": "wait"})
    observer = job.events.observer
    while True:
        try:
            return _place_and_train(config, job, start, earlier)
        except _NotPlacedAgain as failure:
            config, event = _replanned(config, failure.error)
        # The trackers of the attempt that failed are closed.
        job.events.observer = observer
        job.events.add(event)
        start, earlier = _resume(config, job, event)


class _NotPlacedAgain(Exception):
    """No machine replaces a lost one, and the run may use a smaller topology.

    Args:
        error: The timeout of the wait for a machine.
    """

    def __init__(self, error: StartTimeoutError) -> None:
        super().__init__(error)
        self.error = error


def _replanned(config: DistillConfig, error: StartTimeoutError) -> tuple[DistillConfig, RunEvent]:
    """A smaller topology for the rest of the cluster, and the event that reports it.

    Raises:
        StartTimeoutError: No topology fits.
    """
    from cluster.runtime import start_ray

    with start_ray(config.topology.address):
        smaller = fitting_topology(config)
    if smaller is None:
        error.add_note("No smaller topology fits on what is left of the cluster.")
        raise error
    cause = f"no machine came within recovery.wait_s ({config.recovery.wait_s:g} s)"
    action = f"goes on as {topology_in_words(smaller)} in place of {topology_in_words(config)}"
    return smaller, RunEvent(kind="replanned", cause=cause, action=action)


def _place_and_train(
    config: DistillConfig, job: _Job, start: Position, earlier: Sequence[RunEvent]
) -> dict[str, Any]:
    """Starts the groups of a run, and trains from a position to the end."""
    checked, folder, events = job.checked, job.folder, job.events
    observer = events.observer
    # The files that the run starts from are stored before any process is started.
    folder.flush()
    data = DataLog(folder, len(training_sets(config)))
    observer.note(f"starting the roles ({config.topology.mode})")
    if checked.has_stored_text:
        observer.note(checked.texts.in_words())
    if checked.autoencoder_in_words:
        observer.note(checked.autoencoder_in_words)
    rows_left = (config.iterations - start.iteration) * checked.rows_per_iteration
    progress = data.progress(start.cursor, start.rows)
    with (
        open_groups(
            config,
            checked,
            folder,
            progress,
            rows_left,
            in_trial=job.in_trial,
            events=events,
            service=job.service,
        ) as groups,
        _open_trackers(config, folder) as trackers,
    ):
        beside = Observers([*trackers, _exporter(config, start)])
        # Events of the resume are older than the trackers.
        for event in earlier:
            beside.event(event)
        observers = Observers([observer, beside])
        events.observer = observers
        checkpoints = Checkpoints(shared_place(folder.checkpoints))
        run = Distillation(OpenRun(config, checked, groups, folder, data, checkpoints, events))
        run.load(start)
        may_replan = config.recovery.shortage == "replan"
        is_replanned = False
        try:
            return _train(run, start, job, may_replan=may_replan)
        except _NotPlacedAgain:
            is_replanned = True
            raise
        except (StopRequestedError, AlarmError):
            # These name the state to resume from.
            raise
        except Exception as error:
            # Ranks raise errors of torch and CUDA, too.
            run.note_last_good(error)
            raise
        finally:
            if not is_replanned:
                job.stops.end()
            run.write_trace()


def _resume(
    config: DistillConfig, job: _Job, why: RunEvent | None = None
) -> tuple[Position, list[RunEvent]]:
    """Rewinds the logs of an earlier run to the state that it resumes from.

    Args:
        config: The run's settings.
        job: The run.
        why: Event that caused the resume; None: the user asked for it.

    Returns:
        The position, and the events of the resume.
    """
    folder, warn = job.folder, job.events.observer.warning
    new_events: list[RunEvent] = [why] if why else []
    checkpoints = Checkpoints(shared_place(folder.checkpoints))

    def report(event: RunEvent) -> None:
        job.events.add(event)
        new_events.append(event)

    start = resume_position(config, job.checked, folder, checkpoints, warn, report)
    folder.rewind(start.iteration, warn)
    warn_of_gaps(folder, start.iteration, warn)
    DataLog(folder, len(training_sets(config))).rewind(start.iteration, warn)
    report(
        RunEvent(
            kind="restarted",
            cause=why.action if why else "the run was resumed with --resume",
            action=f"goes on at iteration {start.iteration}",
            iteration=start.iteration,
        )
    )
    if start.iteration >= config.iterations:
        warn(
            f"the run has made {start.iteration} iterations, and iterations={config.iterations} "
            "asks for no more: nothing is trained, and its results are written again"
        )
    return start, new_events


@contextmanager
def _open_trackers(config: DistillConfig, folder: RunFolder) -> Iterator[list[RunObserver]]:
    """The trackers that the recipe asks for: W&B and TensorBoard."""
    asked = config.tracker
    settings = config.model_dump(mode="json")
    with (
        open_tracker(asked.wandb, asked.project, config.name, folder.root, settings) as tracker,
        open_tensorboard(asked.tensorboard, folder.root) as board,
    ):
        yield [tracker, board]


def _exporter(config: DistillConfig, start: Position) -> RunObserver:
    """Exports the run's figures through Ray's metrics, if the run uses Ray."""
    if config.topology.mode == "local":
        return RunObserver()
    from pipelines.run.ray_metrics import RayMetrics

    return RayMetrics(config.name, start.rows)


def _train(run: Distillation, start: Position, job: _Job, *, may_replan: bool) -> dict[str, Any]:
    """Trains to the end, and repairs failures; returns the run's summary."""
    stops = job.stops
    failure: ClusterError | None = None
    with stops.ending_in(lambda: run.endings.while_repairing(stops)):
        while True:
            try:
                if failure is not None:
                    try:
                        start, failure = run.recover(failure), None
                    except StartTimeoutError as error:
                        if may_replan and not stops.received:
                            raise _NotPlacedAgain(error) from error
                        raise
                with stops.finishing_iterations():
                    run.train(start, job.stop_rule, stops)
                return run.finish(stops)
            except LOST as error:
                if stops.received:
                    raise run.endings.lost(stops, error) from error
                if run.has_given_up:
                    raise
                failure = error
