"""Search of a space: the source of Tune's trials, and what ends them early.

    grid, random   every run is listed beforehand
    tpe            Optuna proposes, and learns from each trial that ends
    pb2            a population; settings change at validations

A sweep that is taken up again has the search as Tune has kept it. Schedulers keep nothing there:
they hear once more what the trials have reported.
"""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import optuna
from ray import tune
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from pipelines.config.recipe import DistillConfig
from pipelines.config.sweep import Dimension, SweepSettings
from pipelines.sweeping.over_seeds import OverSeeds
from pipelines.sweeping.space import PointSettings, combinations, draw_point, num_combinations
from pipelines.sweeping.trial import CLOCK, LISTED, POINT, SHARES
from pipelines.sweeping.trials import Trial
from sgmd_core.errors import ConfigError

ITERATION = "iteration"
"""Field that schedulers count by, in the reports of a trial."""


def seeds_of(config: DistillConfig) -> tuple[int, ...]:
    """Seeds of each point's runs."""
    return tuple(config.sweep.seeds) or (config.seed,)


def num_runs(config: DistillConfig) -> int:
    """Number of runs: points (all of a grid, else `sweep.trials`) times seeds."""
    sweep = config.sweep
    points = num_combinations(sweep.dimensions) if sweep.search == "grid" else sweep.trials
    return points * len(seeds_of(config))


def listed_runs(config: DistillConfig) -> tuple[tuple[PointSettings, int], ...]:
    """Settings and seed of every run that is known beforehand; none where trials are proposed."""
    dimensions, search = config.sweep.dimensions, config.sweep.search
    if search == "grid":
        points = list(combinations(dimensions))
    elif search == "random":
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=config.seed))
        points = [draw_point(dimensions, study.ask()) for _ in range(config.sweep.trials)]
    else:
        return ()
    return tuple((point, seed) for point in points for seed in seeds_of(config))


def param_space(config: DistillConfig) -> dict[str, Any]:
    """Tune's space: places in a list, shares of ranges, or nothing where a searcher proposes."""
    if config.sweep.search == "pb2":
        return {SHARES: {key: tune.uniform(0.0, 1.0) for key in config.sweep.dimensions}}
    listed = listed_runs(config)
    return {LISTED: tune.grid_search(list(range(len(listed))))} if listed else {}


def searcher(config: DistillConfig) -> Searcher | None:
    """Proposes trials; None where they are listed, or drawn by Tune."""
    sweep = config.sweep
    if sweep.search != "tpe":
        return None
    figures = sweep.objectives
    is_single = len(figures) == 1
    sampler = optuna.samplers.TPESampler(
        seed=config.seed, constant_liar=sweep.concurrent_trials > 1
    )
    proposer = OptunaSearch(
        space=partial(_proposed, sweep.dimensions),
        metric=sweep.score if is_single else list(figures),
        mode=sweep.mode if is_single else list(figures.values()),
        sampler=sampler,
    )
    return OverSeeds(proposer, tuple(figures), seeds_of(config))


def _proposed(dimensions: Mapping[str, Dimension], draw: Any) -> dict[str, Any]:  # noqa: ANN401 - Ray's wrapper of an Optuna trial
    return {POINT: draw_point(dimensions, draw)}


def scheduler(config: DistillConfig, earlier: Sequence[Trial] = ()) -> TrialScheduler | None:
    """Ends trials early, or changes their settings; None where all run to their end.

    Args:
        config: The recipe.
        earlier: Trials of this sweep before it was taken up again.
    """
    sweep, method = config.sweep, config.sweep.scheduler
    if sweep.search == "pb2":
        return _pb2(sweep)
    if method.method == "none":
        return None
    if method.method == "asha":
        found: TrialScheduler = _Asha(
            time_attr=ITERATION,
            metric=sweep.score,
            mode=sweep.mode,
            # Past the last iteration: the last report of a trial must not end it.
            max_t=sweep.iterations + 1,
            grace_period=min(method.grace_iterations, sweep.iterations),
            reduction_factor=method.reduction_factor,
        )
    else:
        found = _Median(
            time_attr=ITERATION,
            metric=sweep.score,
            mode=sweep.mode,
            grace_period=method.grace_iterations,
            min_samples_required=3,
        )
    _replay(found, earlier)
    return found


def _replay(scheduler: TrialScheduler, earlier: Sequence[Trial]) -> None:
    controller: Any = None
    for trial in earlier:
        # Schedulers know a trial by its id.
        stand_in: Any = _StandIn(trial.name.removeprefix("trial-"))
        scheduler.on_trial_add(controller, stand_in)
        for iteration, figures in trial.curve:
            scheduler.on_trial_result(controller, stand_in, {ITERATION: iteration, **figures})


class _StandIn:
    """A trial of an earlier process."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


def _pb2(sweep: SweepSettings) -> TrialScheduler:
    require_pb2()
    from ray.tune.schedulers.pb2 import PB2

    return PB2(
        time_attr=CLOCK,
        metric=sweep.score,
        mode=sweep.mode,
        perturbation_interval=sweep.validate_every or sweep.iterations,
        hyperparam_bounds={SHARES: {key: [0.0, 1.0] for key in sweep.dimensions}},
        # In step, a population would wait without end for a member that has failed.
        synch=False,
    )


def require_pb2() -> None:
    """Checks that the libraries of PB2 can be imported.

    Raises:
        ConfigError: One cannot, or one that it needs itself.
    """
    try:
        for name in ("scipy", "sklearn"):
            importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            "searching with sweep.search=pb2",
            f"{error}",
            "the extra that PB2 of Ray Tune needs",
            "pip install 'sgmd[pb2]', or search with tpe or random",
        ) from error


def seed_global_draws(seed: int) -> None:
    """Seeds what Tune's schedulers draw from, which they share with the whole process."""
    np.random.seed(seed % 2**32)


_PRESENT: dict[type, TrialScheduler] = {}


def keep_present(scheduler: TrialScheduler | None) -> None:
    """Names the scheduler that a restored sweep goes on with, in place of Tune's copy of it."""
    if scheduler is not None:
        _PRESENT[type(scheduler)] = scheduler


def _present(kind: type[TrialScheduler]) -> TrialScheduler:
    return _PRESENT[kind]


class _Asha(ASHAScheduler):
    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ANN401
        # Cutoffs lie between neighbours, which may both be infinite.
        with np.errstate(invalid="ignore"):
            return super().on_trial_result(
                tune_controller, trial, _worst_for_nan(result, self._metric, self._mode)
            )

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:  # noqa: ANN401
        with np.errstate(invalid="ignore"):
            super().on_trial_complete(
                tune_controller, trial, _worst_for_nan(result, self._metric, self._mode)
            )

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _present, (type(self),)


class _Median(MedianStoppingRule):
    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:  # noqa: ANN401
        super().on_trial_add(tune_controller, trial)
        # Tune's own knows a trial by its object, and a resumed sweep makes new ones.
        for known in [each for each in self._results if each.trial_id == trial.trial_id]:
            self._results[trial] = self._results.pop(known)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ANN401
        # One that reports goes on, though an earlier result, reported again, might end it.
        self._stopped_trials.discard(trial)
        return super().on_trial_result(
            tune_controller, trial, _worst_for_nan(result, self._metric, self._mode)
        )

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:  # noqa: ANN401
        super().on_trial_complete(
            tune_controller, trial, _worst_for_nan(result, self._metric, self._mode)
        )

    def _on_insufficient_samples(self, tune_controller: Any, trial: Any, time: float) -> str:  # noqa: ANN401
        # Tune's own would pause the trial for others that wait, and start its process again.
        return TrialScheduler.CONTINUE

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _present, (type(self),)


def _worst_for_nan(result: dict[str, Any], metric: str | None, mode: str | None) -> dict[str, Any]:
    """Returns a result whose score is infinitely bad where it was none, which compares with all."""
    if metric in result and math.isnan(result[metric]):
        return {**result, metric: math.inf if mode == "min" else -math.inf}
    return result
