"""Plans of studies: which runs, how long, measured where; and what is refused."""

import pytest

from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.planning.passes import expected_passes, pass_costs, run_passes, total_units
from pipelines.study.plan import measured_iterations, pass_cost_words, plan_rows, plan_study
from sgmd_core.errors import ConfigError

VARIANTS = "study.variants={ours: {}, theirs: {objective.method: dmd2, fake_score.tracking: fresh}}"


def study_of(*overrides: str) -> DistillConfig:
    return load_recipe("tiny", [VARIANTS, "study.seeds=[4, 5]", *overrides])


def budget(unit: str, amount: float) -> str:
    return f"study.budget={{unit: {unit}, amount: {amount}}}"


def test_every_variant_is_run_with_every_seed_and_seeds_come_one_after_another():
    plan = plan_study(study_of("output=there"))
    assert [(run.variant, run.seed) for run in plan.runs] == [
        ("ours", 4),
        ("theirs", 4),
        ("ours", 5),
        ("theirs", 5),
    ]
    assert [str(run.folder) for run in plan.runs[:2]] == [
        "there/tiny-study/runs/ours-seed4",
        "there/tiny-study/runs/theirs-seed4",
    ]
    assert plan.runs[1].config.objective.method == "dmd2"


def test_a_budget_of_iterations_is_the_same_number_for_all():
    plan = plan_study(study_of(budget("iterations", 7), "study.measurements=3"))
    assert {run.num_iterations for run in plan.runs} == {7}
    assert {run.config.checkpoint.every for run in plan.runs} == {3}


def test_a_budget_of_forwards_buys_fewer_iterations_of_a_dearer_method():
    plan = plan_study(study_of(budget("forwards", 350)))
    assert [run.num_iterations for run in plan.runs[:2]] == [33, 10]
    for run in plan.runs:
        an_iteration = total_units(expected_passes(run.config), pass_costs(run.config))
        assert an_iteration * (run.config.iterations + 1) > 350


def test_a_budget_of_seconds_leaves_the_number_of_iterations_open():
    (first, *_) = plan_study(study_of(budget("seconds", 12.5), "study.measurements=3")).runs
    assert first.num_iterations is None
    assert first.max_seconds == 12.5
    # States are saved by the clock, and as many as are measured are kept.
    assert (first.config.checkpoint.every, first.config.checkpoint.keep) == (0, 3)


def test_what_all_runs_have_in_common_gives_way_to_what_a_variant_has():
    config = study_of("study.settings={batch.size: 8, objective.lambda_nr: 0.3}")
    variants = "study.variants={a: {}, b: {objective.lambda_nr: 0.4}}"
    config = load_recipe("tiny", [variants, "study.settings={batch.size: 8}"])
    assert [run.config.batch.size for run in plan_study(config).runs[:2]] == [8, 8]
    assert plan_study(config).runs[1].config.objective.lambda_nr == 0.4


def test_the_plan_tells_units_and_time():
    plan = plan_study(study_of(budget("iterations", 10)))
    ours, theirs = plan_rows(plan, 0.5)
    # 10.5 by the usual estimate.
    assert ours["units_per_iteration"] == pytest.approx(10.5178, abs=1e-4)
    assert ours["units"] == total_units(
        run_passes(plan.runs[0].config, 10), pass_costs(plan.runs[0].config)
    )
    assert theirs["seconds"] == theirs["units"] / 2
    assert plan_rows(plan, None)[0]["seconds"] is None


def test_a_reader_is_told_the_costs_that_the_plan_counts_with():
    plan = plan_study(study_of(budget("iterations", 10)))
    costs = pass_costs(plan.runs[0].config)["generator"]
    assert costs.to_input > 1.01
    assert pass_cost_words(plan_rows(plan, None)) == (
        "a forward is the teacher's forward pass over one batch; a pass back to the input counts "
        f"{costs.to_input:.3g}, to the weights {costs.to_weights:.3g}"
    )


def test_a_plan_by_the_clock_predicts_iterations_instead():
    ours, theirs = plan_rows(plan_study(study_of(budget("seconds", 70))), 0.1)
    assert (ours["iterations"], theirs["iterations"]) == (66, 20)
    assert ours["seconds"] == 70


@pytest.mark.parametrize(
    ("available", "wanted", "measured"),
    [
        ([19, 38, 57], 3, [19, 38, 57]),
        ([2, 4, 6, 8, 9], 3, [4, 6, 9]),
        (list(range(1, 11)), 2, [5, 10]),
        ([5], 3, [5]),
        ([1, 2, 3], 1, [3]),
        ([], 3, []),
    ],
)
def test_measured_points_are_spread_evenly_and_end_at_the_end(available, wanted, measured):
    assert measured_iterations(available, wanted) == measured


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["study.variants={}"], "0 variants and 2 seeds"),
        (["study.seeds=[]"], "2 variants and 0 seeds"),
        (["study.seeds=[1, 1]"], "different seeds"),
        (["study.variants={a: {objective.lambda_n: 1}}"], r"nearest one is objective\.lambda_nr"),
        (["study.variants={a: {objective.method: dmd2}}"], r"fake_score\.tracking=fresh"),
        ([budget("forwards", 20)], "less than one iteration, which takes 35 forwards"),
        (["validation.every=0", "data.validation=''"], "held-out captions"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_starts(overrides, words):
    with pytest.raises(ConfigError, match=words):
        plan_study(study_of(*overrides))


def test_an_error_in_a_variant_names_the_variant():
    with pytest.raises(ConfigError) as caught:
        plan_study(study_of("study.variants={odd: {batch.size: 1}}"))
    assert "variant odd" in caught.value.__notes__[0]


@pytest.mark.slow
def test_the_shipped_study_compares_seven_methods_with_three_seeds():
    plan = plan_study(load_recipe("tiny"))
    assert len(plan.variants) == 7
    assert len(plan.runs) == 21
    budgets = [
        total_units(run_passes(run.config, run.config.iterations), pass_costs(run.config))
        for run in plan.runs
    ]
    assert max(budgets) / min(budgets) < 1.15
