"""A study keeps the costs of passes that its budget was planned with."""

import json
from pathlib import Path

import pytest

from pipelines.config.recipe import load_recipe
from pipelines.planning.passes import expected_passes, total_units
from pipelines.study.plan import StudyPlan, plan_study
from pipelines.study.recorded_costs import _EARLIER, require_same_costs
from sgmd_core.errors import ConfigError


def plan_of(output: Path, *settings: str) -> StudyPlan:
    return plan_study(load_recipe("tiny", [f"output={output}", *settings]))


def start_first_run(plan: StudyPlan, iterations: int) -> None:
    run = plan.runs[0].config.with_settings({"iterations": iterations})
    run.run_folder.mkdir(parents=True)
    (run.run_folder / "config.yaml").write_text(run.to_yaml())


def test_costs_are_recorded_and_others_are_refused_with_both(tmp_path: Path):
    plan = plan_of(tmp_path)
    plan.folder.mkdir()
    require_same_costs(plan)
    require_same_costs(plan)
    path = plan.folder / "costs.json"
    costs = json.loads(path.read_text())
    assert set(costs) == set(plan.variants)
    assert all(1 < own["to_input"] < 2 for own in costs.values())
    costs["dmd2"]["to_input"] = 1.0
    path.write_text(json.dumps(costs))
    with pytest.raises(ConfigError, match=r"of dmd2 that cost 1 \(to the input\)") as refused:
        require_same_costs(plan)
    assert "1.03 (to the input)" in str(refused.value)
    require_same_costs(plan_of(tmp_path, "study.budget={unit: iterations, amount: 10}"))


def test_runs_of_a_version_that_recorded_none_are_known_by_their_iterations(tmp_path: Path):
    amount = "study.budget={unit: forwards, amount: 20000}"
    plan = plan_of(tmp_path, amount)
    earlier = int(20000 / total_units(expected_passes(plan.runs[0].config), _EARLIER))
    assert earlier > plan.runs[0].config.iterations
    start_first_run(plan, earlier)
    with pytest.raises(ConfigError, match="one count for all runs of a study"):
        require_same_costs(plan)


def test_runs_with_the_iterations_of_now_go_on(tmp_path: Path):
    plan = plan_of(tmp_path, "study.budget={unit: forwards, amount: 20000}")
    start_first_run(plan, plan.runs[0].config.iterations)
    require_same_costs(plan)
    assert (plan.folder / "costs.json").exists()
