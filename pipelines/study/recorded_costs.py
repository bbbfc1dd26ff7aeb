"""Costs of network passes that a study was planned with, kept in its folder.

With a budget of forwards the iterations of each run follow from the costs of backward passes. A
study that goes on with other costs would compare runs of unequal budgets.
"""

from collections.abc import Mapping
from dataclasses import asdict

from cluster.storage import read_json, write_json
from pipelines.config.recipe import load_recipe
from pipelines.planning.passes import expected_passes, pass_costs, total_units
from pipelines.run.folder import RunFolder
from pipelines.run.places import local_of, shared_place
from pipelines.stages.costs import PassCosts
from pipelines.study.plan import PlannedRun, StudyPlan
from sgmd_core.errors import ConfigError

_COSTS_FILE = "costs.json"
_EARLIER = PassCosts(to_input=1.0, to_weights=2.0)
"""Costs of versions that recorded none."""


def require_same_costs(plan: StudyPlan) -> None:
    """Records the costs of passes, or refuses to go on with a budget planned with others.

    Raises:
        ConfigError: The study's budget of forwards was planned with other costs.
    """
    if plan.config.study.budget.unit != "forwards":
        return
    path = local_of(plan.folder) / _COSTS_FILE
    now = {run.variant: asdict(pass_costs(run.config)) for run in plan.runs}
    made = [run for run in plan.runs if RunFolder(run.folder).config.exists()]
    if not path.exists() and made:
        # Before costs were recorded, every backward pass to the input cost one forward pass.
        earlier = {variant: asdict(_EARLIER) for variant in now}
        changed = [run for run in made if now[run.variant] != earlier[run.variant]]
        old = [run for run in changed if _iterations_of(run) == _iterations_of_earlier(run, plan)]
        found = earlier if old else now
    else:
        found = read_json(str(path)) if path.exists() else now
    different = [variant for variant in now if variant in found and found[variant] != now[variant]]
    if different:
        variant = different[0]
        raise ConfigError(
            f"going on with the study in {shared_place(plan.folder)}",
            f"its budget of forwards was planned with backward passes of {variant} that cost "
            f"{_in_words(found[variant])} forward passes, and they are counted as "
            f"{_in_words(now[variant])} now",
            "one count for all runs of a study",
            "Choose another name=..., or set study.budget.unit=iterations",
        )
    write_json(str(path), found | now)


def _iterations_of(run: PlannedRun) -> int:
    return load_recipe(str(RunFolder(run.folder).config)).iterations


def _in_words(costs: Mapping[str, float]) -> str:
    return f"{costs['to_input']:.3g} (to the input) and {costs['to_weights']:.3g} (to the weights)"


def _iterations_of_earlier(run: PlannedRun, plan: StudyPlan) -> int:
    units = total_units(expected_passes(run.config), _EARLIER)
    return int(plan.config.study.budget.amount / units)
