"""The measured lag: it changes no bit of a run, and its governor is the same after a resume."""

import math
import os
import signal
from collections.abc import Callable
from typing import Any, cast

import pytest

from pipelines.config.lag import LagSettings
from pipelines.config.recipe import DistillConfig
from pipelines.distillation.lag import LagGovernor, LagWatch, no_lag
from pipelines.distillation.run import distill
from pipelines.run.folder import RunFolder, read_jsonl
from sgmd_core.errors import CheckpointError, StopRequestedError
from tests.e2e.conftest import MakeRecipe
from tests.e2e.test_equivalence import history, moments, slow_but, state
from tests.e2e.test_guards import Killed, _Killer
from tests.helpers.moves import assert_moves
from workers.optimizer import RoleOptimizer

MEASURED = ("lag.every=2", "lag.updates=3", "lag.batches=2")
GOVERNED = (*MEASURED, "lag.slow_above=1e-9", "lag.slowest=0.25", "alarms.lag_above=1e-9")


def lags(lines: list[dict[str, object]]) -> dict[int, dict[str, float]]:
    return {line["iteration"]: line["lag"] for line in lines if "lag" in line}


def without_lag(lines: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{key: value for key, value in line.items() if key != "lag"} for line in lines]


@pytest.fixture(scope="module")
def measured(module_recipe: MakeRecipe) -> Callable[[str], DistillConfig]:
    """A finished run whose lag was measured, made once for each setting beside."""
    made: dict[str, DistillConfig] = {}

    def run_of(mode: str) -> DistillConfig:
        if mode not in made:
            made[mode] = module_recipe(f"name=measured-{len(made)}", mode, *MEASURED)
            distill(made[mode])
        return made[mode]

    return run_of


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    slow_but(
        "fake_score.tracking=shared",
        "fake_score.tracking=fresh",
        "objective.method=adm",
    ),
)
def test_a_run_that_is_measured_has_the_bits_of_one_that_is_not(
    make_recipe: MakeRecipe, measured: Callable[[str], DistillConfig], mode: str
) -> None:
    calm = make_recipe("name=calm", mode)
    distill(calm)
    beside = measured(mode)
    found = lags(history(beside))
    assert list(found) == [2, 4]
    for figures in found.values():
        assert set(figures) == {"tracking_lag", "held_tracking", "copy_rate"}
        assert 0 < figures["tracking_lag"] < 1
        assert figures["copy_rate"] in (1.0, 10.0)
    # Nothing but the figures was added, and every weight and moment is the same.
    assert without_lag(history(beside)) == history(calm)
    assert state(beside, 5) == state(calm, 5)


@pytest.mark.slow
def test_the_number_of_micro_batches_in_flight_changes_no_lag(
    make_recipe: MakeRecipe, measured: Callable[[str], DistillConfig]
) -> None:
    mode = "fake_score.tracking=shared"
    split = make_recipe("name=split", mode, *MEASURED, "topology.depth=1")
    distill(split)
    assert lags(history(split)) == lags(history(measured(mode)))


@pytest.mark.slow
def test_a_governed_run_that_was_killed_goes_on_with_the_same_bits(
    make_recipe: MakeRecipe, measured: Callable[[str], DistillConfig]
) -> None:
    calm, whole = measured("fake_score.tracking=shared"), make_recipe("name=whole", *GOVERNED)
    assert whole.fake_score.tracking == calm.fake_score.tracking
    distill(whole)
    rates = [figures["generator_rate"] for figures in lags(history(whole)).values()]
    assert rates == [0.5, 0.25]
    # The generator was slowed, and by that alone the run is another one.
    assert history(whole)[:2] == history(calm)[:2]
    assert lags(history(whole))[2]["tracking_lag"] == lags(history(calm))[2]["tracking_lag"]
    assert_moves(moments(whole, 5), moments(calm, 5))
    for name, every in (("on-it", 2), ("after-it", 3)):
        again = make_recipe(f"name={name}", *GOVERNED, f"checkpoint.every={every}")
        with pytest.raises(Killed):
            distill(again, observer=_Killer(3))
        distill(again, resume=True)
        assert history(again) == history(whole)
        assert state(again, 5) == state(whole, 5)
        # Above its limit all the time, it sounds once, also across a resume.
        (alarm,) = read_jsonl(RunFolder(again.run_folder).alarms)
        assert (alarm["name"], alarm["iteration"]) == ("tracking_lag", 3)
        assert alarm["value"] == lags(history(whole))[2]["tracking_lag"]


@pytest.mark.slow
def test_a_stop_ends_a_measurement_and_saves_the_state_before_it(
    make_recipe: MakeRecipe,
    measured: Callable[[str], DistillConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = measured("fake_score.tracking=fresh")
    settings = (*MEASURED, "fake_score.tracking=fresh", "checkpoint.every=0")
    made: list[float] = []
    extra_step = RoleOptimizer.extra_step

    def stopping(self: RoleOptimizer, rate: float) -> None:
        extra_step(self, rate)
        made.append(rate)
        if len(made) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RoleOptimizer, "extra_step", stopping)
    stopped = make_recipe("name=stopped", *settings)
    with pytest.raises(StopRequestedError, match="step-000002"):
        distill(stopped)
    assert len(made) == 1
    assert len(history(stopped)) == 2
    distill(stopped, resume=True)
    assert history(stopped) == history(whole)
    assert state(stopped, 5) == state(whole, 5)


def test_weights_that_are_thrown_away_have_no_lag() -> None:
    watch = LagWatch(LagSettings(every=2), cast("Any", None), (), restarts=(4,))
    assert [at for at in range(9) if watch.is_due(at)] == [2, 6, 8]


def test_why_there_is_no_lag_is_told_by_its_cause() -> None:
    settings = LagSettings(every=2, rates=(1.0, 100.0))
    assert "is nan, expected a number above 0. Lower fake_score" in no_lag(4, math.nan, settings)
    diverged = no_lag(4, 0.5, settings)
    assert "1, 100 times its rate have a loss that is not finite. Lower lag.rates" in diverged


@pytest.mark.slow
def test_a_measurement_may_be_added_on_resume_and_a_governor_may_not(
    make_recipe: MakeRecipe,
) -> None:
    distill(make_recipe("name=run", "iterations=2"))
    with pytest.raises(CheckpointError, match=r"lag\.slow_above"):
        distill(make_recipe("name=run", "iterations=5", *GOVERNED), resume=True)
    distill(config := make_recipe("name=run", "iterations=5", *MEASURED), resume=True)
    assert list(lags(history(config))) == [2, 4]


def test_the_governor_is_a_function_of_the_recorded_lags() -> None:
    settings = LagSettings(every=1, slow_above=0.1, slowest=0.125)
    found = [0.2, 0.3, 0.4, 0.5, 0.05, 0.1, 0.2, 0.01, 0.01]
    lines = [{"iteration": at, "lag": {"tracking_lag": lag}} for at, lag in enumerate(found)]
    expected = [0.5, 0.25, 0.125, 0.125, 0.25, 0.5, 0.25, 0.5, 1.0]
    governor = LagGovernor(settings)
    for line, rate in zip(lines, expected, strict=True):
        governor.take(line["lag"])
        assert governor.rate == rate
    for count, rate in enumerate(expected, start=1):
        lines_without = [{"iteration": -1}, *lines[:count]]
        assert LagGovernor(settings, lines_without).rate == rate
    off = LagGovernor(replace_limit(settings), lines)
    assert off.rate == 1.0


def replace_limit(settings: LagSettings) -> LagSettings:
    return settings.model_copy(update={"slow_above": None})
