"""A study keeps the costs of passes that its budget was planned with."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.config.recipe import load_recipe
from pipelines.planning.passes import expected_passes, total_units
from pipelines.study.plan import StudyPlan, plan_study
from pipelines.study.recorded_costs import EARLIER_COSTS, require_same_costs
from pipelines.transition import make_transition
from sgmd_core.errors import ConfigError


def plan_of(output: Path, *settings: str) -> StudyPlan:
    return plan_study(load_recipe("tiny", [f"output={output}", *settings]))


def start_first_run(plan: StudyPlan, iterations: int) -> None:
    run = plan.runs[0].config.with_settings({"iterations": iterations})
    run.run_folder.mkdir(parents=True)
    (run.run_folder / "config.yaml").write_text(run.to_yaml())


@pytest.mark.slow
def test_costs_are_recorded_and_others_are_refused_with_both(tmp_path: Path):
    plan = plan_of(tmp_path)
    plan.folder.mkdir()
    require_same_costs(plan)
    require_same_costs(plan)
    path = plan.folder / "costs.json"
    costs = json.loads(path.read_text())
    assert set(costs) == set(plan.variants)
    own = [role for roles in costs.values() for role in roles.values()]
    assert all(each["forward"] == 1 < each["to_input"] < 2 for each in own)
    costs["dmd2"]["generator"]["to_input"] = 1.0
    path.write_text(json.dumps(costs))
    with pytest.raises(ConfigError, match=r"of dmd2's generator that cost 1, 1 \(back") as refused:
        require_same_costs(plan)
    assert "1, 1.03 (back to the input)" in str(refused.value)
    require_same_costs(plan_of(tmp_path, "study.budget={unit: iterations, amount: 10}"))


@pytest.mark.slow
def test_runs_of_a_version_that_recorded_none_are_known_by_their_iterations(tmp_path: Path):
    amount = "study.budget={unit: forwards, amount: 20000}"
    plan = plan_of(tmp_path, amount)
    costs = dict.fromkeys(("generator", "teacher", "fake_score"), EARLIER_COSTS)
    earlier = int(20000 / total_units(expected_passes(plan.runs[0].config), costs))
    assert earlier > plan.runs[0].config.iterations
    start_first_run(plan, earlier)
    with pytest.raises(ConfigError, match="one count for all runs of a study"):
        require_same_costs(plan)


@pytest.mark.slow
def test_runs_with_the_iterations_of_now_go_on(tmp_path: Path):
    plan = plan_of(tmp_path, "study.budget={unit: forwards, amount: 20000}")
    start_first_run(plan, plan.runs[0].config.iterations)
    require_same_costs(plan)
    assert (plan.folder / "costs.json").exists()


@pytest.mark.slow
def test_costs_of_one_network_for_all_roles_as_they_once_were_recorded_go_on(tmp_path: Path):
    plan = plan_of(tmp_path)
    plan.folder.mkdir()
    require_same_costs(plan)
    path = plan.folder / "costs.json"
    costs = json.loads(path.read_text())
    old = {variant: dict(roles["teacher"]) for variant, roles in costs.items()}
    for own in old.values():
        del own["forward"]
    path.write_text(json.dumps(old))
    require_same_costs(plan)
    assert json.loads(path.read_text()) == costs


@pytest.mark.slow
def test_costs_of_variants_that_a_plan_leaves_out_stay_as_they_are(tmp_path: Path):
    plan = plan_of(tmp_path)
    plan.folder.mkdir()
    require_same_costs(plan)
    path = plan.folder / "costs.json"
    costs = json.loads(path.read_text())
    old = {
        variant: {name: roles["teacher"][name] for name in ("to_input", "to_weights")}
        for variant, roles in costs.items()
    }
    path.write_text(json.dumps(old))
    one = replace(plan, runs=tuple(run for run in plan.runs if run.variant == "dmd2"))
    require_same_costs(one)
    assert json.loads(path.read_text()) == old | {"dmd2": costs["dmd2"]} != old
    require_same_costs(plan)
    assert json.loads(path.read_text()) == costs


@pytest.mark.slow
def test_a_budget_of_forwards_has_teachers_of_one_size(tmp_path: Path):
    big = make_transition("assets/tiny-wan", tmp_path / "flow", 1, 2)
    other = f"study.variants.dmd2={{teacher.model: {big}, objective: {{method: dmd2}}}}"
    with pytest.raises(ConfigError, match="teachers of different networks"):
        plan_of(tmp_path, other, "fake_score.tracking=fresh")
    plan_of(
        tmp_path, other, "fake_score.tracking=fresh", "study.budget={unit: iterations, amount: 10}"
    )
