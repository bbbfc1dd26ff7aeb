"""Refuses a sweep that could not be run, before Ray is started."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from pipelines.config.recipe import DistillConfig, check_sweep
from pipelines.config.unreached import warn_of_unreached
from pipelines.distillation.branching import newest_state, require_branch
from pipelines.distillation.preflight import Preflight, require_readable, run_preflight
from pipelines.distillation.run import NOT_NEEDED
from pipelines.run.folder import RunFolder
from pipelines.run.opened_copy import working_copy
from pipelines.sweeping.search import require_pb2, seeds_of
from pipelines.sweeping.space import PointSettings, combinations, corners, num_combinations
from pipelines.sweeping.trial import trial_config
from pipelines.sweeping.trials import settings_in_words
from sgmd_core.errors import ConfigError, SgmdError

_CHECKED_ALONE = ("objective.", "guards.", "alarms.", "generator.optimizer.", "generator.ema_")
"""Settings that no file has to fit: pydantic has checked all about them."""
_OF_TEACHER = ("teacher.", "model.", "topology.", "video.")
_MOST_POINTS = 10_000
_log = logging.getLogger(__name__)


def points_to_check(config: DistillConfig) -> list[PointSettings]:
    """Every point of a grid, or the corners of a space."""
    dimensions = config.sweep.dimensions
    if config.sweep.search == "grid":
        return list(combinations(dimensions))
    return corners(dimensions)


def checked_sweep(config: DistillConfig, *, is_new: bool = True) -> int:
    """Checks every point of a grid, or the corners of a space, against model and data.

    Args:
        config: The recipe.
        is_new: It has not begun; one that has goes on though some of its trials compare nothing.

    Returns:
        Iteration of the state that all trials go on from; 0 without one.

    Raises:
        SgmdError: A point does not fit; says which one and why.
    """
    sweep = config.sweep
    attempted = f"checking the sweep of {config.name}"
    if not sweep.dimensions or not all(sweep.grid.values()):
        raise ConfigError(
            f"sweeping the recipe {config.name}",
            f"sweep.grid is {dict(sweep.grid)}, and sweep.space has {len(sweep.space)} keys",
            "at least one key, each with values to try",
            "For example sweep.grid: {objective.lambda_nr: [0.05, 0.1]}",
        )
    if is_new and (found := list(sweep.unsearchable())):
        raise ConfigError(
            attempted,
            "; ".join(found),
            "different points, of settings that all trials leave to the recipe",
            "Take these keys and values out of sweep.grid, sweep.space and sweep.settings",
        )
    check_sweep(config, sweep.dimensions, attempted)
    if sweep.search == "pb2":
        require_pb2()
    if (
        sweep.search == "grid"
        and num_combinations(sweep.dimensions, _MOST_POINTS + 1) > _MOST_POINTS
    ):
        raise ConfigError(
            attempted,
            f"a grid of more than {_MOST_POINTS} points",
            "fewer points",
            "Set sweep.search=random or tpe, which try sweep.trials of them",
        )
    points = points_to_check(config)
    preflights: dict[str, Preflight] = {}
    for point in points:
        _check_point(config, point, preflights)
    held_out = next(iter(preflights.values())).held_out
    for figure in sweep.objectives:
        name = "sweep.score" if figure == sweep.score else "sweep.tradeoffs"
        require_readable(figure, held_out, f"ranking trials by {figure}", name)
    if sweep.share_teacher:
        _require_lendable(config, points[0])
    first = _first_iteration(config, points[0])
    trial = trial_config(config, points[0], seeds_of(config)[0], "check", first)
    warn_of_unreached(trial, "trials of the sweep", _log)
    return first


def _require_lendable(config: DistillConfig, point: Mapping[str, Any]) -> None:
    """Checks that one teacher can serve all trials.

    Raises:
        ConfigError: It has several ranks, which run collectives, or trials want different ones.
    """
    topology = trial_config(config, point, seeds_of(config)[0], "check").topology
    found = [key for key in config.sweep.dimensions if key.startswith(_OF_TEACHER)]
    if topology.mode != "pools":
        found.append(f"topology.mode {topology.mode}, where the teacher shares its processes")
    if topology.teacher.ranks > 1:
        found.append(f"topology.teacher.ranks {topology.teacher.ranks}, which run collectives")
    if topology.transport != "object_store":
        found.append(f"topology.transport {topology.transport}, which is between two processes")
    if found:
        raise ConfigError(
            "sharing one teacher among all trials (sweep.share_teacher)",
            "; ".join(found),
            "trials that want the same teacher, with topology.mode pools and one rank a copy",
            "Set sweep.share_teacher=false, or change these in sweep.settings and sweep.space",
        )


def _check_point(
    config: DistillConfig, point: Mapping[str, Any], preflights: dict[str, Preflight]
) -> None:
    try:
        trial = trial_config(config, point, seeds_of(config)[0], "check")
        on_files = {key: value for key, value in point.items() if not _is_alone(key)}
        known = json.dumps(on_files, sort_keys=True)
        if known not in preflights:
            preflights[known] = run_preflight(trial)
    except SgmdError as error:
        error.add_note(f"of the trial with {settings_in_words(point)}")
        raise


def _is_alone(key: str) -> bool:
    return key.startswith(_CHECKED_ALONE) and not key.endswith(".method")


def _first_iteration(config: DistillConfig, point: Mapping[str, Any]) -> int:
    start = config.sweep.start_from
    if start is None:
        return 0
    with working_copy(start, NOT_NEEDED):
        source = RunFolder(start)
        iteration = newest_state(source)
        searched = {*config.sweep.dimensions, *config.sweep.settings, "seed"}
        trial = trial_config(config, point, seeds_of(config)[0], "check", iteration)
        require_branch(source, trial, searched)
    return iteration
