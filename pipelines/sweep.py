"""Searches settings with Ray Tune: every combination of the recipe's grid as one short run.

    grid over dotted keys -> one trial each -> validation figures -> table, best.yaml

A trial is a whole distillation. With pools it takes the bundles of its own placement group, the
first one for its controller; with the local topology it is one process. Trials are ranked by a
validation figure of their last iteration, measured on the same captions and seeds.
"""

import csv
import io
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.execution import class_cache

from cluster.lease import hold
from cluster.ray.pools import Pool, bundles_of, selectors_of
from cluster.runtime import start_ray
from cluster.storage import write_json, write_text
from pipelines.config.model_folders import model_on_this_machine
from pipelines.config.recipe import DistillConfig, check_sweep
from pipelines.distillation.groups import own_cluster_size, pools_of
from pipelines.distillation.preflight import require_readable, run_preflight
from pipelines.distillation.run import distill
from pipelines.run.folder import RunFolder, read_jsonl, require_output_folder
from pipelines.run.observer import RunObserver
from pipelines.run.ranking import Contender, not_told_apart
from sgmd_core.errors import ConfigError
from workers.models.families import modules_of

_CONTROLLER_CPUS = 1.0
_ERRORS = "errors_of_figures"
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")


@dataclass(frozen=True, slots=True)
class Trial:
    """One combination and what came of it.

    Attributes:
        settings: Values by dotted key.
        figures: Validation figures after the last iteration; empty when the trial failed.
        seconds: Training time of the trial.
        run_folder: Its run folder.
        error: What went wrong, or an empty string.
        intervals: 95 % intervals of the figures.
        influences: Influence of each clip on the figures that rank.
    """

    settings: Mapping[str, Any]
    figures: Mapping[str, float]
    seconds: float
    run_folder: str
    error: str
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    influences: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def contender(self, score: str) -> Contender:
        """Entry of the ranking."""
        name = ", ".join(f"{key}={each}" for key, each in self.settings.items())
        return Contender.of_validation(f"({name})", asdict(self), score)


@dataclass(frozen=True, slots=True)
class SweepResult:
    """All trials, the best one first.

    Attributes:
        score: The figure that ranks them.
        trials: Failed ones last.
        folder: Where table and best recipe are.
        best_recipe: A recipe with the best settings and the full number of iterations.
    """

    score: str
    trials: tuple[Trial, ...]
    folder: Path
    best_recipe: Path

    @property
    def note(self) -> str:
        """Names the trials that may be as good as the best one; empty where it is the best."""
        tried = [trial.contender(self.score) for trial in self.trials if not trial.error]
        return not_told_apart(tried, "trials", self.score)

    def to_json(self) -> dict[str, Any]:
        """As results.json holds it."""
        return {
            "score": self.score,
            "folder": str(self.folder),
            "best_recipe": str(self.best_recipe),
            "note": self.note,
            "trials": [
                {
                    "settings": dict(trial.settings),
                    "figures": dict(trial.figures),
                    "intervals": dict(trial.intervals),
                    "seconds": trial.seconds,
                    "run_folder": trial.run_folder,
                    "error": trial.error,
                }
                for trial in self.trials
            ],
        }


OnProgress = Callable[[str, int, int], None]
"""Hears what is counted, how many are done, and of how many."""


def sweep(
    config: DistillConfig,
    observer: RunObserver | None = None,
    on_progress: OnProgress | None = None,
) -> SweepResult:
    """Runs every trial of a recipe's `sweep` section.

    Args:
        config: The recipe; its sweep section says what to try and how to rank.
        observer: Receives a note when a trial ends.
        on_progress: Called when a trial ends with (what is counted, trials ended, trials in all).

    Raises:
        SgmdError: The grid is empty, a value does not fit, or every trial failed.
        ClusterError: Ray does not start.
        LeaseError: Another process sweeps in the folder.
    """
    observer, on_progress = observer or RunObserver(), on_progress or _hear_nothing
    # Tune's newer reporter prints to standard output even when told to be silent.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # Tune copies keys into the description of each trial's process, which Ray logs.
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(_KEYS)
    require_output_folder(config.output, "output")
    _require_grid(config)
    score, held_out = config.sweep.score, run_preflight(_trial_config(config, {}, "check")).held_out
    require_readable(score, held_out, f"ranking trials by {score}", "sweep.score")
    folder = Path(config.output).absolute() / f"{config.name}-sweep"
    with hold(str(folder), f"sgmd sweep {config.name}"):
        return _sweep(config, folder, _Announcer(observer, on_progress, _num_trials(config)))


def _sweep(config: DistillConfig, folder: Path, announcer: "_Announcer") -> SweepResult:
    """Runs a checked sweep in a folder that this process holds."""
    if (folder / "results.json").exists():
        raise ConfigError(
            f"starting a sweep in {folder}",
            "the results of another one are there",
            "a name that is free",
            "Choose another one with name=..., or delete the folder",
        )
    num_cpus = own_cluster_size(config, _bundles(_pools(config)))
    preload = modules_of(model_on_this_machine(config.model.folder))
    with start_ray(config.topology.address, num_cpus=num_cpus, preload=preload):
        announcer.begin(folder)
        results = _tuner(config, folder, announcer).fit()
    trials = _ranked(config, [_trial_of(result, announcer.settings) for result in results])
    if trials[0].error:
        raise ConfigError(
            f"sweeping {', '.join(config.sweep.grid)}",
            f"all {len(trials)} trials failed; the first one with: {trials[0].error}",
            "at least one trial that comes to its end",
            "Try one of them alone with `sgmd distill`",
        )
    return _write(config, folder, trials)


def trial_settings(config: DistillConfig, settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns what a trial changes in the recipe, by dotted key; the tried values win."""
    iterations = config.sweep.iterations
    return {
        "name": name,
        "iterations": iterations,
        "validation.every": iterations,
        "checkpoint.every": 0,
        **config.sweep.settings,
        **settings,
    }


def _trial_config(config: DistillConfig, settings: Mapping[str, Any], name: str) -> DistillConfig:
    return config.with_settings(trial_settings(config, settings, name))


def _require_grid(config: DistillConfig) -> None:
    if not all(config.sweep.grid.values()) or not config.sweep.grid:
        raise ConfigError(
            f"sweeping the recipe {config.name}",
            f"sweep.grid is {dict(config.sweep.grid)}",
            "at least one key, each with values to try",
            "For example sweep.grid: {objective.lambda_nr: [0.05, 0.1]}",
        )
    check_sweep(config, config.sweep.grid, f"checking the sweep of {config.name}")


def _num_trials(config: DistillConfig) -> int:
    number = 1
    for values in config.sweep.grid.values():
        number *= len(values)
    return number


def _pools(config: DistillConfig) -> list[Pool]:
    """Returns the resources of one trial besides its controller."""
    trial = _trial_config(config, {}, "bundles")
    return [] if trial.topology.mode == "local" else pools_of(trial)


def _bundles(pools: Sequence[Pool]) -> list[dict[str, float]]:
    """Returns the bundles of one trial: its controller first, then its pools."""
    return [{"CPU": _CONTROLLER_CPUS}, *bundles_of(pools)]


def _resources(pools: Sequence[Pool]) -> tune.PlacementGroupFactory:
    selectors = [{}, *selectors_of(pools)]
    if not any(selectors):
        return tune.PlacementGroupFactory(_bundles(pools))
    return tune.PlacementGroupFactory(_bundles(pools), "PACK", bundle_label_selector=selectors)


def _tuner(config: DistillConfig, folder: Path, announcer: "_Announcer") -> tune.Tuner:
    output = str(folder / "trials")
    # A trial works in a folder of Tune's.
    base = config.with_absolute_paths().model_copy(update={"output": output})

    def run_trial(settings: dict[str, Any]) -> None:
        trial = _trial_config(base, settings, tune.get_context().get_trial_name())
        on_ray = trial.topology.mode != "local"
        summary = distill(trial, in_trial=on_ray)
        measured = read_jsonl(RunFolder(summary["run_folder"]).validation)[-1:]
        tune.report(
            {
                **summary["validation"],
                _ERRORS: {
                    name: dict(line[name])
                    for line in measured
                    for name in ("intervals", "influences")
                },
                "run_seconds": summary["seconds"],
                "run_folder": summary["run_folder"],
            }
        )

    return tune.Tuner(
        tune.with_resources(run_trial, _resources(_pools(config))),
        param_space={key: tune.grid_search(values) for key, values in config.sweep.grid.items()},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=config.sweep.concurrent_trials,
            trial_name_creator=lambda trial: f"trial-{trial.trial_id}",
            trial_dirname_creator=lambda trial: f"trial-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            verbose=0,
            callbacks=[announcer],
        ),
    )


def _hear_nothing(what: str, done: int, total: int) -> None:
    """Stands for a display that is not there any more."""


class _Announcer(tune.Callback):
    """Tells when a trial ends, and how many have."""

    def __init__(self, observer: RunObserver, on_progress: OnProgress, total: int) -> None:
        self._observer = observer
        self._on_progress = on_progress
        self._done, self._total = 0, total
        self.settings: dict[str, dict[str, Any]] = {}
        """Settings of the trials that have ended, by path."""

    def __getstate__(self) -> dict[str, Any]:
        # Tune writes its callbacks down for a later restore, and a console cannot be written down.
        return {
            "_observer": RunObserver(),
            "_on_progress": _hear_nothing,
            "_done": self._done,
            "_total": self._total,
            "settings": self.settings,
        }

    def begin(self, folder: Path) -> None:
        """Tells what is to be done."""
        self._observer.note(f"sweeping {self._total} trials in {folder}")
        self._on_progress("trials", 0, self._total)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ANN401 - Tune's interface
        self._end(trial, "done")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ANN401 - Tune's interface
        self._end(trial, "failed")

    def _end(self, trial: Any, how: str) -> None:  # noqa: ANN401 - Tune's own
        self._done += 1
        self.settings[str(trial.path)] = dict(trial.config)
        settings = ", ".join(f"{key}={value}" for key, value in trial.config.items())
        self._observer.note(f"{trial}: {how} with {settings}")
        self._on_progress("trials", self._done, self._total)


def _trial_of(result: tune.Result, tried: Mapping[str, dict[str, Any]]) -> Trial:
    # The result of a trial whose process died before it answered does not say what was tried.
    settings = result.config or tried[str(result.path)]
    if result.error is not None:
        return Trial(settings, {}, 0.0, str(result.path), trial_error(result.error))
    metrics = dict(result.metrics or {})
    if "run_seconds" not in metrics:
        return Trial(settings, {}, 0.0, str(result.path), "ended before its last iteration")
    figures = {
        name: value
        for name, value in metrics.items()
        if isinstance(value, float) and name not in _TUNE_FIGURES and name != "run_seconds"
    }
    return Trial(
        settings,
        figures,
        metrics["run_seconds"],
        metrics["run_folder"],
        "",
        **metrics.get(_ERRORS, {}),
    )


def trial_error(error: Exception) -> str:
    """The error of a trial in a line, without the traceback that Ray puts around it.

    Ray's text is a traceback whose last unindented line of the form `Type: words` is the error;
    notes, which an error takes along, follow it and do not say what it was.
    """
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return f"{type(cause).__name__}: {cause}".partition("\n")[0]
    lines = str(error).strip().splitlines()
    raised = [line for line in lines if _RAISED.match(line)]
    kind, colon, words = (raised or lines or ["unknown error"])[-1].strip().partition(": ")
    return (kind.rpartition(".")[2] if raised else kind) + colon + words


_RAISED = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)(\(.*\))?(: |$)")

# What Ray Tune adds to every report.
_TUNE_FIGURES = ("time_this_iter_s", "time_total_s", "time_since_restore", "timestamp")


def _ranked(config: DistillConfig, trials: Sequence[Trial]) -> tuple[Trial, ...]:
    score, sign = config.sweep.score, 1 if config.sweep.mode == "min" else -1
    judged = [
        trial
        if trial.error or score in trial.figures
        else replace(trial, error=f"its validation has no {score}")
        for trial in trials
    ]
    return tuple(sorted(judged, key=lambda t: (bool(t.error), sign * t.figures.get(score, 0.0))))


def _write(config: DistillConfig, folder: Path, trials: tuple[Trial, ...]) -> SweepResult:
    best = config.with_settings(dict(trials[0].settings))
    result = SweepResult(config.sweep.score, trials, folder, folder / "best.yaml")
    note = "".join(f"# {line}\n" for line in textwrap.wrap(result.note, 97))
    write_text(str(result.best_recipe), note + best.to_yaml())
    write_text(str(folder / "results.csv"), _csv(config, trials))
    write_json(str(folder / "results.json"), result.to_json())
    return result


def _csv(config: DistillConfig, trials: Sequence[Trial]) -> str:
    figures = list(trials[0].figures)
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow([*config.sweep.grid, *figures, "seconds", "run_folder", "error"])
    for trial in trials:
        values = [trial.settings[key] for key in config.sweep.grid]
        measured = [trial.figures.get(name, "") for name in figures]
        writer.writerow([*values, *measured, trial.seconds, trial.run_folder, trial.error])
    return table.getvalue()
