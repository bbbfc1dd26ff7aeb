"""One trial, in its own process: a whole distillation that tells Tune of its validations.

    settings -> config -> [resume | go on from another run's state] -> distill -> figures to Tune

A trial that is started again goes on from its own newest checkpoint; one that has ended says again
what it has measured. What a trial has failed with is written down and raised again, so that a retry
after the loss of a process does not repeat what would fail in the same way.
"""

import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from cluster.errors import ClusterError, LeaseError
from cluster.storage import read_json, write_json
from pipelines.config.recipe import DistillConfig
from pipelines.distillation.branching import ensure_branch
from pipelines.distillation.run import NOT_NEEDED, distill
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.run.observer import RunObserver
from pipelines.run.opened_copy import copy_at, working_copy
from pipelines.run.places import shared_place
from pipelines.run.publisher import publish_now
from pipelines.run.records import ValidationRecord
from pipelines.sweeping.space import at_share
from sgmd_core.errors import SgmdError, StopRequestedError

LISTED, POINT, SEED, SHARES = "listed", "point", "seed", "shares"
"""Keys of what Tune has of a trial: its place in the list of runs; or its settings by dotted key
and its seed; or, in a population, shares of the ranges, as `at_share` reads them."""
CLOCK = "clock"
"""Iterations as PB2 counts them: the last report comes too early to change anything."""
ERROR_FILE = "error.json"
_STATE_FILE = "state.json"
# The lease of a trial at an address whose machine is lost runs out meanwhile.
_LEASE_S, _AGAIN_S = 120.0, 5.0
# And a trial that the scheduler ends brings its last files there, before its process is used again.
_LAST_FILES_S = "30"


@dataclass(frozen=True, slots=True)
class CommonToTrials:
    """Settings that all trials have in common.

    Attributes:
        config: The recipe; paths are absolute and `output` is the folder of the trials.
        first_iteration: Iteration of the state that all go on from; 0 without one.
        listed: Settings and seed of every run, where they are known beforehand.
        service: Name of the service that has the frozen roles of all trials; empty: none.
    """

    config: DistillConfig
    first_iteration: int = 0
    listed: tuple[tuple[Mapping[str, Any], int], ...] = ()
    service: str = ""

    def trial_config(self, settings: Mapping[str, Any], seed: int, name: str) -> DistillConfig:
        """The run of a point."""
        return trial_config(self.config, settings, seed, name, self.first_iteration)

    def run_of(self, tuned: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Settings by dotted key and seed, from what Tune has of a trial."""
        if LISTED in tuned:
            settings, seed = self.listed[tuned[LISTED]]
            return dict(settings), seed
        if SHARES in tuned:
            ranges = self.config.sweep.dimensions
            found = {key: at_share(ranges[key], share) for key, share in tuned[SHARES].items()}
            return found, self.config.seed
        return dict(tuned[POINT]), tuned[SEED]


def trial_config(
    config: DistillConfig,
    settings: Mapping[str, Any],
    seed: int,
    name: str,
    first_iteration: int = 0,
) -> DistillConfig:
    """The run of a point: the recipe, what all trials change in it, and the point's settings.

    Args:
        config: The recipe.
        settings: Of the point, by dotted key.
        seed: Of the run.
        name: Of the run.
        first_iteration: Iteration of the state that it goes on from.
    """
    sweep = config.sweep
    every = sweep.validate_every or sweep.iterations
    is_population = sweep.search == "pb2"
    # A member of a population may wait long before it takes over a state of another one, so all
    # that are offered stay: those of the validations.
    saves = every if is_population else min(e for e in (config.checkpoint.every, every) if e)
    validations = math.ceil(sweep.iterations / every)
    defaults: dict[str, Any] = {
        "iterations": first_iteration + sweep.iterations,
        "validation.every": every,
        "checkpoint.every": saves,
        # And the one that it began with.
        "checkpoint.keep": validations + 1 if is_population else 1,
        "checkpoint.keep_best": 0,
        # Others go on from a state as soon as its figures are known.
        **({"checkpoint.background": False} if is_population else {}),
    }
    changed = {**defaults, **sweep.settings, **settings, "seed": seed, "name": name}
    return config.with_settings(changed)


def run_trial(tuned: Mapping[str, Any], sweep: CommonToTrials) -> None:
    """Runs one trial in the process that Tune gives it.

    Args:
        tuned: Tune's settings of the trial.
        sweep: What all trials have in common.
    """
    # W&B reads it: the trials of a sweep stand together there.
    os.environ["WANDB_RUN_GROUP"] = f"{sweep.config.name}-sweep"
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", _LAST_FILES_S)
    settings, seed = sweep.run_of(tuned)
    name = tune.get_context().get_trial_name()
    state = _given_state()
    if state is not None and (state["settings"] != settings or state["trial"] != name):
        # Named by where it comes from: started again, it finds its own folder.
        name_of_run = f"{name}-from-{state['trial']}-{state['iteration']}"
    else:
        name_of_run = name if state is None else Path(state["run_folder"]).name
    config = sweep.trial_config(settings, seed, name_of_run)
    with working_copy(config.run_folder, NOT_NEEDED):
        run_in_folder(sweep, config, state, settings, name)


def run_in_folder(
    sweep: CommonToTrials,
    config: DistillConfig,
    state: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    name: str,
) -> None:
    """Runs one trial whose folder is here.

    Args:
        sweep: What all trials share.
        config: The trial's recipe.
        state: The state that it starts from; None: none.
        settings: Its settings, for the record.
        name: Its name.
    """
    folder = RunFolder(config.run_folder)
    failed = folder.root / ERROR_FILE
    copy = copy_at(folder.root)

    def work() -> None:
        if failed.exists():
            raise TrialError(read_json(str(failed))["error"])
        _begin(sweep, config, state)
        _distill(sweep, config, folder, settings, name)

    def look_again() -> None:
        if copy:
            copy.fetch(NOT_NEEDED)

    try:
        once_free(work, look_again, _LEASE_S if copy else 0.0)
    except (ClusterError, StopRequestedError, TrialError):
        # The loss of a process or machine, or a stop from outside: worth another try. Or what
        # stands there already.
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}".partition("\n")[0]
        write_json(shared_place(failed), {"error": text})
        raise


def once_free(work: Callable[[], None], look_again: Callable[[], None], patience_s: float) -> None:
    """Does the work once nobody else holds the folder: a process that is lost may for a while.

    Args:
        work: Decides by what is in the folder, and takes its lease.
        look_again: Brings here what the holder has written meanwhile.
        patience_s: How long another holder is waited for.
    """
    deadline_s = time.monotonic() + patience_s
    while True:
        try:
            work()
            return
        except LeaseError:
            if time.monotonic() >= deadline_s:
                raise
        time.sleep(_AGAIN_S)
        look_again()


class TrialError(Exception):
    """Failure of a trial before, raised again."""


def _given_state() -> Mapping[str, Any] | None:
    """Returns where the state lies that Tune wants this trial to go on from."""
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as inside:
        return read_json(str(Path(inside) / _STATE_FILE))


def _begin(sweep: CommonToTrials, config: DistillConfig, state: Mapping[str, Any] | None) -> None:
    """Makes the folder of a run that goes on from the state of another."""
    of_sweep = sweep.config.sweep
    searched = {*of_sweep.dimensions, *of_sweep.settings, "seed"}
    if state is not None:
        # Its own folder, where the trial itself is started again.
        source, iteration = state["run_folder"], state["iteration"]
    elif of_sweep.start_from:
        source, iteration = of_sweep.start_from, sweep.first_iteration
    else:
        return
    if Path(source) != Path(config.run_folder):
        with working_copy(source, NOT_NEEDED):
            ensure_branch(RunFolder(source), config, searched, iteration=iteration)


def _distill(
    sweep: CommonToTrials,
    config: DistillConfig,
    folder: RunFolder,
    settings: Mapping[str, Any],
    name: str,
) -> None:
    reporter = _Reporter(sweep, config, folder, settings, name)
    if not folder.summary.exists():
        on_ray = config.topology.mode != "local"
        resumes = folder.config.exists()
        distill(
            config,
            resume=resumes,
            observer=reporter,
            in_trial=on_ray,
            service=sweep.service,
        )
    lines = read_jsonl(folder.validation)
    if not lines or lines[-1]["iteration"] < config.iterations:
        problem = read_json(str(folder.summary)).get("validation_problem")
        raise SgmdError(
            f"measuring the trial {name}",
            "its last validation is missing" + (f". {problem}" if problem else ""),
            "a validation after the last iteration",
            f"Its warnings are in {folder}/{folder.log.name}",
        )
    reporter.report(lines[-1])


@dataclass(frozen=True)
class _Reporter(RunObserver):
    """Reports every validation to Tune; the last one once the run has ended."""

    sweep: CommonToTrials
    config: DistillConfig
    folder: RunFolder
    settings: Mapping[str, Any]
    name: str

    def validation(self, record: ValidationRecord, samples: Path) -> None:
        """Reports its figures; the scheduler may end the trial here."""
        if record.iteration < self.config.iterations:
            self.report(record.to_json())

    def report(self, line: Mapping[str, Any]) -> None:
        """Reports a line of validation.jsonl, which is at the run's address by then."""
        publish_now(self.folder.root)
        first, searched = self.sweep.first_iteration, self.sweep.config.sweep.objectives
        if line["iteration"] <= first:
            return
        seconds = (
            each["seconds"]["total"]
            for each in read_jsonl(self.folder.metrics)
            if first <= each["iteration"] < line["iteration"]
        )
        found = {name: line["figures"].get(name, math.nan) for name in searched}
        # To schedulers an infinite figure may be the best of all, or end the search.
        values = {name: each if math.isfinite(each) else math.nan for name, each in found.items()}
        result = {
            **values,
            "searched": values,
            "figures": dict(line["figures"]),
            "intervals": dict(line["intervals"]),
            "influences": dict(line["influences"]),
            "iteration": line["iteration"] - first,
            CLOCK: line["iteration"] - first - (line["iteration"] >= self.config.iterations),
            "seconds": sum(seconds),
            "settings": dict(self.settings),
            "run_folder": str(self.folder),
        }
        if self.sweep.config.sweep.search != "pb2":
            tune.report(result)
            return
        with tempfile.TemporaryDirectory() as folder:
            state = {
                "trial": self.name,
                "settings": dict(self.settings),
                "iteration": line["iteration"],
                "run_folder": str(self.folder),
            }
            write_json(str(Path(folder) / _STATE_FILE), state)
            tune.report(result, checkpoint=tune.Checkpoint.from_directory(folder))
