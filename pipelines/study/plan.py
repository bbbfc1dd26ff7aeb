"""Runs of a study, and the budget of each.

    recipe + study.settings + a variant + a seed + the budget  ->  one run of `sgmd distill`

Seeds come one after another, each with all variants in turn: a study that is cut short has compared
everybody, and a machine whose speed drifts slows all of them.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from pipelines.config.recipe import DistillConfig
from pipelines.config.unreached import warn_of_unreached
from pipelines.planning.passes import (
    expected_passes,
    pass_costs,
    run_passes,
    teacher_shape,
    total_units,
    units_by_role,
)
from pipelines.run.places import shared_place
from sgmd_core.errors import ConfigError

RUNS = "runs"
"""Folder of a study with the folders of its runs."""

_log = logging.getLogger(__name__)
# More than any run makes before its seconds are over.
_NO_END = 1_000_000


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One variant with one seed.

    Attributes:
        variant: Its name.
        config: The whole run.
        max_seconds: Training time after which it ends, where that is the budget.
    """

    variant: str
    config: DistillConfig
    max_seconds: float | None

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.config.seed

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.config.run_folder

    @property
    def num_iterations(self) -> int | None:
        """Updates of the generator; None where the clock decides."""
        return None if self.max_seconds is not None else self.config.iterations


@dataclass(frozen=True, slots=True)
class StudyPlan:
    """All runs of a study, in the order in which they are made.

    Attributes:
        config: The recipe.
        folder: Where everything is written; `places.shared_place` names an address.
        runs: The runs.
    """

    config: DistillConfig
    folder: Path
    runs: tuple[PlannedRun, ...]

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants, in the recipe's order."""
        return tuple(self.config.study.variants)


def plan_study(config: DistillConfig) -> StudyPlan:
    """Returns the plan of `sgmd study`.

    Args:
        config: The recipe; its study section says what is compared.

    Raises:
        ConfigError: There is nothing to compare or to measure with, a variant does not fit the
            recipe, or a budget is less than one iteration.
    """
    study = config.study
    attempted = f"planning the study of {config.name}"
    if not study.variants or not study.seeds:
        raise ConfigError(
            attempted,
            f"{len(study.variants)} variants and {len(study.seeds)} seeds",
            "at least one of each in the section study",
            "`sgmd recipes show tiny` has an example",
        )
    if len(set(study.seeds)) != len(study.seeds):
        raise ConfigError(attempted, f"study.seeds {study.seeds}", "different seeds")
    if not config.data.validation:
        raise ConfigError(
            attempted, "data.validation is empty", "held-out captions to measure the runs with"
        )
    folder = study_place(config.output, config.name)
    runs = [
        _planned_run(config, folder, variant, seed)
        for seed in study.seeds
        for variant in study.variants
    ]
    if study.budget.unit == "forwards":
        _require_one_unit(runs[: len(study.variants)], attempted)
    for run in runs[: len(study.variants)]:
        warn_of_unreached(run.config, f"runs of {run.variant}", _log)
    return StudyPlan(config, folder, tuple(runs))


def study_place(output: str, name: str) -> Path:
    """Folder of a study; of an address, what `cluster.stores.store_address` reads."""
    return Path(output) / f"{name}-study"


def plan_rows(plan: StudyPlan, seconds_per_unit: float | None) -> list[dict[str, Any]]:
    """One row a variant: what a run of it does, costs and takes; what `--dry-run` prints.

    Args:
        plan: The study.
        seconds_per_unit: Of a forward pass over one batch; None if unknown.
    """
    rows: list[dict[str, Any]] = []
    for run in plan.runs[: len(plan.variants)]:
        per_iteration, costs = expected_passes(run.config), pass_costs(run.config)
        units = total_units(per_iteration, costs)
        row: dict[str, Any] = {
            "variant": run.variant,
            "method": run.config.objective.method,
            "tracking": run.config.fake_score.tracking,
            "units_per_iteration": units,
            "units_by_role": units_by_role(per_iteration, costs),
            "pass_costs": {role: asdict(own) for role, own in costs.items()},
        }
        if run.max_seconds is not None:
            made = seconds_per_unit and max(1, int(run.max_seconds / (units * seconds_per_unit)))
            row |= {"iterations": made, "units": None, "seconds": run.max_seconds}
        else:
            spent = total_units(run_passes(run.config, run.config.iterations), costs)
            seconds = seconds_per_unit and spent * seconds_per_unit
            row |= {"iterations": run.config.iterations, "units": spent, "seconds": seconds}
        rows.append(row)
    return rows


def pass_cost_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """A sentence about the costs of passes in forwards, over all variants and roles.

    Args:
        rows: From `plan_rows`.
    """
    costs = [own for row in rows for own in row["pass_costs"].values()]
    forward, to_input, to_weights = (
        " to ".join(dict.fromkeys(f"{pick(own[kind] for own in costs):.3g}" for pick in (min, max)))
        for kind in ("forward", "to_input", "to_weights")
    )
    others = "" if forward == "1" else f"a forward pass of a role counts {forward}, "
    return (
        f"a forward is the teacher's forward pass over one batch; {others}"
        f"a pass back to the input counts {to_input}, to the weights {to_weights}"
    )


def measured_iterations(available: Sequence[int], wanted: int) -> list[int]:
    """Returns the checkpoints of a run that are measured: evenly spread, the last one always.

    Args:
        available: Iterations that there is a checkpoint of, rising.
        wanted: How many to measure, at least 1.
    """
    if len(available) <= wanted:
        return list(available)
    places = [round(part * len(available) / wanted) for part in range(1, wanted + 1)]
    return [available[place - 1] for place in places]


def _planned_run(config: DistillConfig, folder: Path, variant: str, seed: int) -> PlannedRun:
    attempted = f"planning the variant {variant} of the study of {config.name}"
    study = config.study
    own: dict[str, JsonValue] = {
        **study.settings,
        **study.variants[variant],
        "seed": seed,
        "name": f"{variant}-seed{seed}",
        "output": f"{shared_place(folder)}/{RUNS}",
        # A run knows nothing of the others.
        "study": {},
        # The study measures by itself, all runs against one set of the teacher's clips.
        "validation.every": 0,
    }
    try:
        base = config.with_settings(own)
        amount = study.budget.amount
        match study.budget.unit:
            case "seconds":
                # States are saved by the clock alone, one for each point that is measured.
                clock = {
                    "iterations": _NO_END,
                    "checkpoint.every": 0,
                    "checkpoint.keep": study.measurements,
                }
                return PlannedRun(variant, base.with_settings(clock), amount)
            case "iterations":
                iterations = int(amount)
            case "forwards":
                iterations = int(amount / _units_per_iteration(base))
        return PlannedRun(variant, _with_iterations(base, iterations, study.measurements), None)
    except ConfigError as error:
        error.add_note(f"met while {attempted}")
        raise


def _require_one_unit(runs: Sequence[PlannedRun], attempted: str) -> None:
    """Refuses budgets of forwards that are passes of teachers of different sizes."""
    first = runs[0]
    unit = teacher_shape(first.config)
    for run in runs[1:]:
        if teacher_shape(run.config) != unit:
            raise ConfigError(
                attempted,
                f"a budget of forwards, and teachers of different networks: {first.variant} has "
                f"{first.config.teacher_folder}, {run.variant} {run.config.teacher_folder}",
                "teachers of one size, whose forward pass is the unit",
                "Set study.budget.unit=seconds, or compare variants of one teacher",
            )


def _units_per_iteration(config: DistillConfig) -> float:
    return total_units(expected_passes(config), pass_costs(config))


def _with_iterations(config: DistillConfig, iterations: int, measurements: int) -> DistillConfig:
    if iterations < 1:
        needed = _units_per_iteration(config)
        raise ConfigError(
            f"giving {config.name} its budget",
            f"less than one iteration, which takes {needed:.3g} forwards",
            "at least one",
            "Raise study.budget.amount",
        )
    return config.with_settings(
        {
            "iterations": iterations,
            "checkpoint.every": math.ceil(iterations / measurements),
            "checkpoint.keep": measurements,
        }
    )
