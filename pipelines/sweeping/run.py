"""Searches settings with Ray Tune: many short runs of one recipe.

    recipe -> points -> one trial each -> validation figures -> sweep.csv, best.yaml, report.html

A trial is a whole distillation. With pools it takes the bundles of its own placement group, the
first one for its controller; with the local topology it is one process. Trials see the same data in
the same order and are measured on the same captions and seeds.
"""

import logging
import os
import secrets
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal

import optuna
from ray import tune
from ray.tune.execution import class_cache

from cluster.ray.pools import Pool, bundles_of, selectors_of
from cluster.runtime import start_ray
from cluster.stores import store_address
from pipelines.config.captions_of_jobs import (
    kept_captions,
    require_kept_captions,
)
from pipelines.config.model_folders import model_on_this_machine
from pipelines.config.recipe import DistillConfig
from pipelines.distillation.pools import (
    lent_pools_of,
    own_cluster_size,
    own_pools_of,
    pools_of,
)
from pipelines.run.folder import TEACHER_CLIPS
from pipelines.run.observer import RunObserver
from pipelines.run.opened_copy import hold_place, working_copy
from pipelines.run.outputs import require_output_folder
from pipelines.run.places import local_of, shared_place
from pipelines.run.publisher import publish_now, publishing
from pipelines.run.ray_store import ray_store
from pipelines.run.stopping import StopRequests, stop_requests
from pipelines.sweeping.checks import checked_sweep, points_to_check
from pipelines.sweeping.events import OnProgress, OnTrials, TrialEvents
from pipelines.sweeping.folder import (
    delete_left_leases,
    from_kept_start,
    has_begun,
    keep_start,
    require_folder,
    take_folder,
)
from pipelines.sweeping.page import write_sweep_page
from pipelines.sweeping.places import ELSEWHERE, TRIALS, TUNE, sweep_place
from pipelines.sweeping.results import TABLE_FILE, SweepResult, write_results, write_table
from pipelines.sweeping.search import (
    keep_present,
    listed_runs,
    num_runs,
    param_space,
    scheduler,
    searcher,
    seed_global_draws,
)
from pipelines.sweeping.trial import CommonToTrials, run_trial, trial_config
from pipelines.sweeping.trials import Trial, TrialBook
from sgmd_core.errors import ConfigError, StopRequestedError
from workers.models.families import modules_of

_CONTROLLER_CPUS = 1.0
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")
# Starts of a trial whose process is lost; it goes on from its own checkpoint.
_MAX_LOSSES = 3
# Of what a trial imports, what does not import Ray: a second of a core in each process.
_MODULES_OF_TRIALS = ("pipelines.distillation.run", "pandas")
# Beginnings of what Tune logs and this project says in other words.
_SAID_HERE = ("Trials did not complete", "Stop signal received", "Experiment has been interrupted")
_GO_ON = "Go on with: sgmd sweep RECIPE --resume"


def sweep(
    config: DistillConfig,
    observer: RunObserver | None = None,
    on_progress: OnProgress = lambda what, done, total: None,
    on_trials: OnTrials = lambda trials, total: None,
    *,
    resume: bool | Literal["auto"] = False,
) -> SweepResult:
    """Runs the trials of a recipe's `sweep` section.

    Args:
        config: The recipe; its sweep section says what to try and how to rank.
        observer: Receives a note when a trial ends.
        on_progress: Called when a trial ends with (what is counted, trials ended, trials in all).
        on_trials: Called with all trials so far whenever one of them has news.
        resume: Go on with a sweep that was interrupted: trials that have ended are not run again,
            and those under way go on from their own last checkpoint. `auto`: where it has begun.

    Raises:
        SgmdError: A point does not fit, no trial came to its end, or a job brings other captions.
        StopRequestedError: The sweep was interrupted; `resume` goes on with it.
        ClusterError: Ray does not start.
        LeaseError: Another process sweeps in the folder.
        StorageError: The store of a sweep at an address has failed for too long.
    """
    # Tune's newer reporter prints to standard output even when asked to be silent.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # It would print a traceback for each trial whose failure is a row with its words.
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    # How much Tune may forget of a sweep whose process is killed.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")
    # Tune copies keys into the description of each trial's process, which Ray logs.
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(_KEYS)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    require_output_folder(config.output, "output")
    observer = observer or RunObserver()
    with _without_idle_words(), working_copy(sweep_place(config), ELSEWHERE):
        folder = local_of(sweep_place(config))
        if resume == "auto":
            resume = has_begun(folder)
        if resume:
            require_kept_captions(config.data, folder, shared_place(folder))
        recipe = from_kept_start(config, folder) if resume else config
        first_iteration = checked_sweep(recipe, is_new=not resume)
        with (
            hold_place(folder, f"sgmd sweep {config.name}", ELSEWHERE) as lease,
            publishing(folder, lease, config.recovery.storage_outage_s, observer.event),
        ):
            common = _begin(config, folder, first_iteration, resume=resume)
            book = TrialBook(folder / "trials.json", partial(publish_now, folder))
            events = TrialEvents(common, book, num_runs(config), observer, on_progress, on_trials)
            return _sweep(config, folder, common, book, events)


@contextmanager
def _without_idle_words() -> Iterator[None]:
    """Leaves out, inside, what Tune says of trials, stops and populations that is said here too."""

    def is_new(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_SAID_HERE)

    log = logging.getLogger(tune.run.__module__)
    log.addFilter(is_new)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Consider boosting PBT performance")
            warnings.filterwarnings("ignore", module=r"sklearn\.gaussian_process")
            yield
    finally:
        log.removeFilter(is_new)


def _begin(
    config: DistillConfig, folder: Path, first_iteration: int, *, resume: bool
) -> CommonToTrials:
    """Writes what a sweep begins with; returns what its trials have in common."""
    take_folder(config, folder, resume=resume)
    publish_now(folder)
    keep_start(config, folder, first_iteration)
    service = f"{config.name}-{secrets.token_hex(4)}" if config.sweep.share_teacher else ""
    inside = _inside(config, folder)
    return CommonToTrials(inside, first_iteration, listed_runs(config), service)


def _inside(config: DistillConfig, folder: Path) -> DistillConfig:
    """The recipe as trials have it, who work in folders of Tune's."""
    place = shared_place(folder)
    of_sweep = {
        "output": f"{place}/{TRIALS}",
        "validation.teacher_clips": config.validation.teacher_clips or f"{place}/{TEACHER_CLIPS}",
        **kept_captions(config.data, folder, place),
    }
    return from_kept_start(config.with_absolute_paths(), folder).with_settings(of_sweep)


def dry_run_sweep(
    config: DistillConfig, *, resume: bool | Literal["auto"] = False
) -> dict[str, int]:
    """Checks a sweep without starting anything.

    Args:
        config: The recipe.
        resume: As in `sweep`.

    Returns:
        Trials, iterations of each, and points that were checked.

    Raises:
        SgmdError: A point does not fit, or the folder.
    """
    require_output_folder(config.output, "output")
    with working_copy(sweep_place(config), ELSEWHERE):
        folder = local_of(sweep_place(config))
        if resume == "auto":
            resume = has_begun(folder)
        require_folder(config, folder, resume=resume)
        if resume:
            require_kept_captions(config.data, folder, shared_place(folder))
        checked_sweep(from_kept_start(config, folder) if resume else config, is_new=not resume)
    return {
        "trials": num_runs(config),
        "iterations": config.sweep.iterations,
        "checked": len(points_to_check(config)),
    }


def _sweep(
    config: DistillConfig,
    folder: Path,
    common: CommonToTrials,
    book: TrialBook,
    events: TrialEvents,
) -> SweepResult:
    """Runs a checked sweep in a folder that this process holds."""
    total = num_runs(config)

    def tell(_: str) -> None:
        events.note(f"{stops.received}: ending the trials; once more ends the process at once")

    def interrupted() -> StopRequestedError:
        return StopRequestedError(
            f"sweeping {config.name}",
            f"interrupted by {stops.received or 'Ray Tune'} with {book.num_ended} of {total} "
            "trials ended",
            "all of them",
            _GO_ON,
        )

    with stop_requests(tell) as stops, stops.ending_in(interrupted):
        if book.num_ended < total:
            _search(config, folder, common, book, events, stops)
        if book.num_ended < total:
            raise interrupted()
        trials = book.trials
        if not any(trial.state == "done" for trial in trials):
            write_table(config, folder, trials)
            write_sweep_page(folder)
            raise _nothing_to_rank(config, folder, trials)
        result = write_results(config, folder, trials)
        write_sweep_page(folder)
        return result


def _nothing_to_rank(config: DistillConfig, folder: Path, trials: Sequence[Trial]) -> ConfigError:
    """The error of a sweep of which no trial came to its end."""
    failed = [trial for trial in trials if trial.error]
    others = len(trials) - len(failed)
    first = f": of {failed[0].name} ({failed[0].in_words}) {failed[0].error}" if failed else ""
    return ConfigError(
        f"sweeping {', '.join(config.sweep.dimensions)}",
        f"{len(failed)} of {len(trials)} trials failed{first}"
        + (f"; the scheduler ended the other {others}" if others else ""),
        f"at least one trial that comes to its end with a {config.sweep.score}",
        f"Every trial with its error: {shared_place(folder)}/{TABLE_FILE}. Try one of them alone "
        "with `sgmd distill`; then sweep other values under another name=...",
    )


def _search(
    config: DistillConfig,
    folder: Path,
    common: CommonToTrials,
    book: TrialBook,
    events: TrialEvents,
    stops: StopRequests,
) -> None:
    """Runs the trials that have not ended, until all have or a stop is asked for."""
    total = num_runs(config)
    pools, lent = _pools(config)
    side_by_side = min(config.sweep.concurrent_trials, total)
    bundles = [*_bundles(pools) * side_by_side, *bundles_of(lent)]
    num_cpus = own_cluster_size(config, bundles)
    preload = (*modules_of(model_on_this_machine(config.model.folder)), *_MODULES_OF_TRIALS)
    with (
        start_ray(config.topology.address, num_cpus=num_cpus, preload=preload),
        _lending(config, common.service, lent, events),
    ):
        events.note(f"sweeping {total} trials in {shared_place(folder)}")
        events.tell()
        seed_global_draws(config.seed)
        tuner = _tuner(config, folder, common, pools, book.trials, events)
        with stops.finishing_iterations(), events.ending_on(stops):
            results = tuner.fit()
    delete_left_leases(folder)
    book.keep({Path(result.path).name for result in results}, events.note)


@contextmanager
def _lending(
    config: DistillConfig, service: str, pools: Sequence[Pool], events: TrialEvents
) -> Iterator[None]:
    """Keeps the frozen roles of all trials, where they share them."""
    if not service:
        yield
        return
    from cluster.ray.service import RoleService

    with RoleService(service, pools, config.topology.start_timeout_s, events.note):
        yield


def _pools(config: DistillConfig) -> tuple[list[Pool], list[Pool]]:
    """Returns the resources of one trial besides its controller, and those that all share."""
    trial = trial_config(config, {}, config.seed, "bundles")
    if trial.topology.mode == "local":
        return [], []
    if config.sweep.share_teacher:
        return own_pools_of(trial), lent_pools_of(trial)
    return pools_of(trial), []


def _bundles(pools: Sequence[Pool]) -> list[dict[str, float]]:
    """Returns the bundles of one trial: its controller first, then its pools."""
    return [{"CPU": _CONTROLLER_CPUS}, *bundles_of(pools)]


def _resources(pools: Sequence[Pool]) -> tune.PlacementGroupFactory:
    selectors = [{}, *selectors_of(pools)]
    if not any(selectors):
        return tune.PlacementGroupFactory(_bundles(pools))
    return tune.PlacementGroupFactory(_bundles(pools), "PACK", bundle_label_selector=selectors)


def _tuner(
    config: DistillConfig,
    folder: Path,
    common: CommonToTrials,
    pools: Sequence[Pool],
    earlier: Sequence[Trial],
    events: TrialEvents,
) -> tune.Tuner:
    files, kept = None, f"{shared_place(folder)}/{TUNE}"
    if store_address(kept):
        files, kept = ray_store(kept)
    run = partial(run_trial, sweep=common)
    trainable = tune.with_resources(run, _resources(pools))
    ends_early = scheduler(config, earlier)
    keep_present(ends_early)
    if tune.Tuner.can_restore(kept, storage_filesystem=files):
        return tune.Tuner.restore(kept, trainable, resume_unfinished=True, storage_filesystem=files)
    return tune.Tuner(
        trainable,
        param_space=param_space(config),
        tune_config=tune.TuneConfig(
            num_samples=1 if listed_runs(config) else num_runs(config),
            max_concurrent_trials=config.sweep.concurrent_trials,
            search_alg=searcher(config),
            scheduler=ends_early,
            # In one process without Ray a trial leaves nothing behind, and starting one takes
            # longer than a short trial. A population moves states between processes.
            reuse_actors=not pools and config.sweep.search != "pb2",
            trial_name_creator=lambda trial: f"trial-{trial.trial_id}",
            trial_dirname_creator=lambda trial: f"trial-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=str(PurePosixPath(kept).parent),
            storage_filesystem=files,
            verbose=0,
            callbacks=[events],
            failure_config=tune.FailureConfig(max_failures=_MAX_LOSSES),
        ),
    )
