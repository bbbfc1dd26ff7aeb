"""Costs of network passes that a study was planned with, kept in its folder.

With a budget of forwards the iterations of each run follow from the costs of passes. A study that
goes on with other costs would compare runs of unequal budgets.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cluster.storage import read_json, write_json
from pipelines.config.recipe import load_recipe
from pipelines.planning.passes import (
    RoleCosts,
    expected_passes,
    pass_costs,
    role_of,
    total_units,
)
from pipelines.run.folder import RunFolder
from pipelines.run.places import local_of, shared_place
from pipelines.stages.costs import PassCosts
from pipelines.study.plan import PlannedRun, StudyPlan
from sgmd_core.errors import ConfigError

_COSTS_FILE = "costs.json"
EARLIER_COSTS = PassCosts(to_input=1.0, to_weights=2.0)
"""Costs of versions that recorded none."""

_Record = Mapping[str, Mapping[str, float]]
"""By role, the costs of its passes by kind."""


def require_same_costs(plan: StudyPlan) -> None:
    """Records the costs of passes, or refuses to go on with a budget planned with others.

    Raises:
        ConfigError: The study's budget of forwards was planned with other costs.
    """
    if plan.config.study.budget.unit != "forwards":
        return
    path = local_of(plan.folder) / _COSTS_FILE
    now = {run.variant: _record(pass_costs(run.config)) for run in plan.runs}
    made = [run for run in plan.runs if RunFolder(run.folder).config.exists()]
    if not path.exists() and made:
        # Before costs were recorded, every backward pass to the input cost one forward pass.
        earlier = {
            variant: _record(dict.fromkeys(roles, EARLIER_COSTS)) for variant, roles in now.items()
        }
        changed = [run for run in made if now[run.variant] != earlier[run.variant]]
        old = [run for run in changed if _iterations_of(run) == _iterations_of_earlier(run, plan)]
        found = earlier if old else now
    else:
        stored = read_json(str(path)) if path.exists() else now
        # Variants that this plan leaves out stay as they are: their roles are not known here.
        found = stored | {
            variant: _of_roles(own, now[variant])
            for variant, own in stored.items()
            if variant in now
        }
    different = [
        (variant, role)
        for variant, roles in now.items()
        for role in roles
        if variant in found and found[variant].get(role) != roles[role]
    ]
    if different:
        variant, role = different[0]
        raise ConfigError(
            f"going on with the study in {shared_place(plan.folder)}",
            f"its budget of forwards was planned with passes of {variant}'s {role} that cost "
            f"{_in_words(found[variant].get(role))} forward passes of the teacher, and they are "
            f"counted as {_in_words(now[variant][role])} now",
            "one count for all runs of a study",
            "Choose another name=..., or set study.budget.unit=iterations",
        )
    write_json(str(path), found | now)


def _iterations_of(run: PlannedRun) -> int:
    return load_recipe(str(RunFolder(run.folder).config)).iterations


def _record(costs: RoleCosts) -> dict[str, dict[str, float]]:
    return {role: asdict(own) for role, own in costs.items()}


def _of_roles(stored: Mapping[str, Any], roles: _Record) -> _Record:
    """Costs as an earlier version recorded them: those of one network, which all roles have."""
    if "to_input" not in stored:
        return stored
    return {role: {**stored, "forward": 1.0} for role in roles}


def _in_words(costs: Mapping[str, float] | None) -> str:
    if costs is None:
        return "nothing, as there was no such role,"
    return (
        f"{costs['forward']:.3g}, {costs['to_input']:.3g} (back to the input) and "
        f"{costs['to_weights']:.3g} (back to the weights)"
    )


def _iterations_of_earlier(run: PlannedRun, plan: StudyPlan) -> int:
    table = expected_passes(run.config)
    units = total_units(table, dict.fromkeys((role_of(stage) for stage in table), EARLIER_COSTS))
    return int(plan.config.study.budget.amount / units)
