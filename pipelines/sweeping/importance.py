"""Importance of each searched setting, by Optuna's PED-ANOVA.

    share of the spread of the best tenth of the trials that a setting explains

Trials are compared at the last iteration that all of them have reached, so that those ended early
count. A setting that applies in one branch only is judged among the trials of that branch.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from pipelines.config.sweep import Dimension, SweepSettings
from pipelines.sweeping.trials import Trial

_LEAST = 10


def comparable(settings: SweepSettings, trials: Sequence[Trial]) -> tuple[int, list[Trial]]:
    """Iteration that all trials have been measured at, and the trials.

    Trials that failed before they were measured are left out.
    """
    measured = [trial for trial in trials if trial.curve and trial.state != "failed"]
    if not measured:
        return 0, []
    return min(trial.curve[-1][0] for trial in measured), measured


def value_at(trial: Trial, iteration: int, figure: str) -> float:
    """A figure at an iteration; NaN where it was not measured."""
    return next((values[figure] for at, values in trial.curve if at == iteration), math.nan)


def importances(settings: SweepSettings, trials: Sequence[Trial]) -> dict[str, float]:
    """Share of each setting, the most important first; empty where there are too few trials."""
    iteration, measured = comparable(settings, trials)
    valued = [
        trial for trial in measured if math.isfinite(value_at(trial, iteration, settings.score))
    ]
    found: dict[str, float] = {}
    for keys in _branches(settings, valued):
        branch = [trial for trial in valued if keys <= trial.settings.keys()]
        if len(branch) < _LEAST:
            continue
        study = _study(settings, branch, keys, iteration)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            shares = optuna.importance.get_param_importances(
                study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
            )
        found |= {key: share for key, share in shares.items() if key not in found}
    return dict(sorted(found.items(), key=lambda each: -each[1]))


def _branches(settings: SweepSettings, trials: Sequence[Trial]) -> list[set[str]]:
    """Returns the sets of keys that trials have in common: those of all, then of each branch."""
    everywhere = {key for key, each in settings.dimensions.items() if not each.when}
    branches = [everywhere]
    for trial in trials:
        if (own := set(trial.settings)) not in branches:
            branches.append(own)
    return branches


def _study(
    settings: SweepSettings, trials: Sequence[Trial], keys: set[str], iteration: int
) -> optuna.Study:
    dimensions = {key: settings.dimensions[key] for key in sorted(keys)}
    kinds = {key: _distribution(each) for key, each in dimensions.items()}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    direction = "minimize" if settings.mode == "min" else "maximize"
    study = optuna.create_study(direction=direction)
    for trial in trials:
        params = {key: _param(each, trial.settings[key]) for key, each in dimensions.items()}
        value = value_at(trial, iteration, settings.score)
        study.add_trial(optuna.create_trial(params=params, distributions=kinds, value=value))
    return study


def _distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.choice is not None:
        return CategoricalDistribution(tuple(range(len(dimension.choice))))
    low, high = dimension.ends
    if dimension.is_whole:
        return IntDistribution(int(low), int(high), log=dimension.is_log)
    return FloatDistribution(low, high, log=dimension.is_log)


def _param(dimension: Dimension, value: Any) -> Any:  # noqa: ANN401 - any YAML
    return value if dimension.choice is None else dimension.choice.index(value)
