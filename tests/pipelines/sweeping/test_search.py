"""Searches and schedulers, without the trials."""

import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.sweeping.search import keep_present, scheduler, searcher
from pipelines.sweeping.trial import trial_config
from pipelines.sweeping.trials import Trial

NR = "objective.lambda_nr"


def recipe(*settings: str) -> DistillConfig:
    space = f"sweep.space={{{NR}: {{log_uniform: [0.01, 1.0]}}}}"
    return load_recipe("tiny", ["sweep.grid={}", space, "sweep.search=tpe", *settings])


def run_points(
    search: Any, values: dict[str, list[float]], figures: tuple[str, ...]
) -> list[float]:
    """Runs trials with known figures; returns the proposed weights."""
    proposed = []
    for name, measured in values.items():
        proposed.append(search.suggest(name)["point"][NR])
        result = dict(zip(figures, measured, strict=True))
        search.on_trial_result(name, {**result, "training_iteration": 1})
        search.on_trial_complete(name, result)
    return proposed


class TestOverSeeds:
    def test_each_point_is_run_once_a_seed_and_the_proposer_hears_the_mean(self):
        search = searcher(recipe("sweep.seeds=[5, 7]"))
        assert search is not None
        first, second, third = (search.suggest(name) for name in "abc")
        assert first is not None
        assert second is not None
        assert third is not None
        assert [each["seed"] for each in (first, second, third)] == [5, 7, 5]
        assert first["point"] == second["point"] != third["point"]
        search.on_trial_complete("a", {"frechet": 1.0})
        (study,) = (search._proposer._ot_study,)  # pyright: ignore
        assert [trial.value for trial in study.trials] == [None, None]
        search.on_trial_complete("b", {"frechet": 2.0})
        assert [trial.value for trial in study.trials] == [1.5, None]

    @pytest.mark.parametrize("is_error", [True, False])
    def test_a_point_of_which_a_seed_fails_is_no_mean_of_the_others(self, is_error: bool):
        search = searcher(recipe("sweep.seeds=[5, 7]"))
        assert search is not None
        search.suggest("a")
        search.suggest("b")
        search.on_trial_complete("a", None if is_error else {"frechet": math.nan}, error=is_error)
        search.on_trial_complete("b", {"frechet": 0.1})
        (found,) = search._proposer._ot_study.trials  # pyright: ignore
        assert (found.state.name, found.value) == ("FAIL", None)

    def test_a_search_that_is_taken_up_goes_on_as_if_nothing_had_happened(self, tmp_path: Path):
        known = {f"t{index}": [1.0 / (1 + index)] for index in range(14)}
        calm, broken, fresh = (searcher(recipe()) for _ in range(3))
        first = run_points(calm, known, ("frechet",))
        assert run_points(broken, known, ("frechet",)) == first
        broken.save(str(tmp_path / "state"))  # pyright: ignore
        fresh.restore(str(tmp_path / "state"))  # pyright: ignore
        later = {f"u{index}": [1.0] for index in range(3)}
        expected = run_points(calm, later, ("frechet",))
        assert run_points(fresh, later, ("frechet",)) == expected
        # What was heard before decides: a search that heard nothing proposes others.
        assert run_points(searcher(recipe()), later, ("frechet",)) != expected

    def test_several_figures_are_searched_at_once(self):
        search = searcher(recipe("sweep.tradeoffs={flow_top_ratio: max}"))
        run_points(search, {f"t{index}": [1.0, index] for index in range(3)}, FIGURES)
        study = search._proposer._ot_study  # pyright: ignore
        assert [each.name for each in study.directions] == ["MINIMIZE", "MAXIMIZE"]
        assert [trial.values for trial in study.trials] == [[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]


FIGURES = ("frechet", "flow_top_ratio")


def ended(name: str, *values: float) -> Trial:
    curve = tuple((2 * place + 2, {"frechet": value}) for place, value in enumerate(values))
    return Trial({}, {}, 0, "", "", name=f"trial-{name}", curve=curve)


OWN, BAD = ended("d", 0.5, 9.0), ended("d", 9.0, 9.0, 9.0)


@pytest.mark.parametrize("method", ["asha", "median"])
def test_a_scheduler_knows_after_an_interruption_what_was_reported_before(method: str) -> None:
    config = recipe(
        f"sweep.scheduler={{method: {method}, grace_iterations: 2}}", "sweep.validate_every=2"
    )
    earlier = [ended("a", 1.0, 0.9), ended("b", 1.1, 1.0), ended("c", 1.2, 1.1)]
    stops = {}
    for known in (earlier, []):
        found = scheduler(config, known)
        assert found is not None
        trial: Any = SimpleTrial("d")
        controller: Any = None
        found.on_trial_add(controller, trial)
        result = {"iteration": 2, "frechet": 9.0}
        stops[len(known)] = found.on_trial_result(controller, trial, result)
    assert stops == {3: TrialScheduler.STOP, 0: TrialScheduler.CONTINUE}
    good = scheduler(config, earlier)
    assert good is not None
    good.on_trial_add(controller, trial)
    result = {"iteration": 2, "frechet": 0.1}
    assert good.on_trial_result(controller, trial, result) == TrialScheduler.CONTINUE


def test_the_median_rule_knows_the_past_of_a_trial_that_is_taken_up() -> None:
    """Its best result counts, and it is no other trial to itself."""
    config = recipe(
        "sweep.scheduler={method: median, grace_iterations: 2}", "sweep.validate_every=2"
    )
    controller: Any = None
    result = {"iteration": 6, "frechet": 5.0}
    calm = scheduler(config, [ended(name, 1.0, 1.0, 1.0) for name in "abc"])
    taken_up = scheduler(config, [*(ended(name, 1.0, 1.0, 1.0) for name in "abc"), OWN])
    for found, expected in ((calm, TrialScheduler.STOP), (taken_up, TrialScheduler.CONTINUE)):
        assert found is not None
        trial: Any = SimpleTrial("d")
        found.on_trial_add(controller, trial)
        assert found.on_trial_result(controller, trial, result) == expected
    # Alone with two others it is one too few.
    few = scheduler(config, [ended("a", 1.0, 1.0, 1.0), ended("b", 1.0, 1.0, 1.0), BAD])
    assert few is not None
    few.on_trial_add(controller, trial)
    assert few.on_trial_result(controller, trial, result) == TrialScheduler.CONTINUE


def test_the_median_rule_hears_trials_again_that_it_would_now_have_ended() -> None:
    """In their own time there were too few others."""
    config = recipe(
        "sweep.scheduler={method: median, grace_iterations: 2}", "sweep.validate_every=2"
    )
    assert scheduler(config, [*(ended(name, 1.0, 1.0) for name in "abc"), BAD]) is not None


@pytest.mark.parametrize("method", ["asha", "median"])
def test_a_scheduler_ends_a_trial_whose_score_is_no_number(method: str) -> None:
    config = recipe(
        f"sweep.scheduler={{method: {method}, grace_iterations: 2}}", "sweep.validate_every=2"
    )
    earlier = [ended(name, 1.0, 0.9) for name in "abcd"]
    found = scheduler(config, earlier)
    assert found is not None
    controller: Any = None
    for name in "ef":
        trial: Any = SimpleTrial(name)
        found.on_trial_add(controller, trial)
        result = {"iteration": 2, "frechet": math.nan}
        assert found.on_trial_result(controller, trial, result) == TrialScheduler.STOP
        found.on_trial_complete(controller, trial, result)
    good: Any = SimpleTrial("g")
    found.on_trial_add(controller, good)
    result = {"iteration": 2, "frechet": 0.5}
    assert found.on_trial_result(controller, good, result) == TrialScheduler.CONTINUE


def test_tunes_copy_of_a_scheduler_is_the_one_of_this_process() -> None:
    config = recipe("sweep.scheduler.method=asha", "sweep.validate_every=2")
    kept = pickle.dumps(scheduler(config))
    now = scheduler(config)
    keep_present(now)
    assert pickle.loads(kept) is now


def test_a_population_keeps_every_state_that_another_member_may_go_on_from() -> None:
    config = recipe(
        f"sweep.space={{{NR}: {{uniform: [0.01, 1.0]}}}}",
        "sweep.search=pb2",
        "sweep.trials=4",
        "sweep.concurrent_trials=4",
        "sweep.iterations=10",
        "sweep.validate_every=4",
        "checkpoint.every=1",
    )
    kept = trial_config(config, {}, 0, "member", first_iteration=8).checkpoint
    # At 8, where it began; at 12 and 16, which are validated; and at its end.
    assert (kept.every, kept.keep) == (4, 4)
    alone = trial_config(recipe("checkpoint.every=1"), {}, 0, "trial").checkpoint
    assert (alone.every, alone.keep) == (1, 1)


class SimpleTrial(SimpleNamespace):
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, trial_id: str) -> None:
        super().__init__(trial_id=trial_id)
