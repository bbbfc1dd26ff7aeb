"""Alarms: each sounds when its limit is crossed, once, and not for a run that goes well."""

from dataclasses import replace

import pytest

from pipelines.config.alarms import AlarmSettings
from pipelines.config.recipe import load_recipe
from pipelines.run.alarms import AlarmWatch
from pipelines.run.records import IterationRecord, ValidationRecord
from sgmd_core.errors import ConfigError
from tests.helpers.records import iteration_record

WINDOW = 4
SETTINGS = AlarmSettings(window=WINDOW)


def an_iteration(number: int, **losses: float) -> IterationRecord:
    return iteration_record(
        number, losses={"tracking": 1.0, "fisher_norm": 1.0, "nr_norm": 0.1} | losses
    )


def a_validation(number: int, **figures: float) -> ValidationRecord:
    good = {"saturation_ratio": 1.0, "flow_top_ratio": 1.0, "diversity_ratio": 1.0, "frechet": 0.1}
    return ValidationRecord(number, good | figures, 1.0, "sheet.png")


def heard(watch: AlarmWatch, *losses: dict[str, float]) -> list[tuple[int, str]]:
    return [
        (alarm.iteration, alarm.name)
        for number, entry in enumerate(losses)
        for alarm in watch.iteration(an_iteration(number, **entry))
    ]


def test_a_run_that_goes_well_is_silent():
    watch = AlarmWatch(SETTINGS)
    assert heard(watch, *[{}] * 20) == []
    assert watch.validation(a_validation(20)) == []


@pytest.mark.parametrize(
    ("figures", "name"),
    [
        ({"saturation_ratio": 1.4}, "over_saturation"),
        ({"flow_top_ratio": 0.5}, "motion_collapse"),
        ({"diversity_ratio": 0.4}, "diversity_collapse"),
    ],
)
def test_each_figure_of_a_validation_has_its_alarm(figures: dict[str, float], name: str):
    (alarm,) = AlarmWatch(SETTINGS).validation(a_validation(50, **figures))
    assert (alarm.iteration, alarm.name, alarm.value) == (50, name, *figures.values())
    assert alarm.to_json()["limit"] == alarm.limit


def test_figures_that_are_not_measured_give_no_alarm():
    record = ValidationRecord(50, {"frechet": 9.0}, 1.0, "sheet.png")
    assert AlarmWatch(SETTINGS).validation(record) == []


def test_a_tracking_loss_that_grows_is_heard_when_its_mean_has_doubled():
    # Means of four: 1, then 1.5 after one value of 3, 2 after two, 2.5 after three.
    quiet, loud = [{}] * WINDOW, [{"tracking": 3.0}] * 4
    assert heard(AlarmWatch(SETTINGS), *quiet, *loud) == [(WINDOW + 3, "tracking_growth")]


def test_one_hard_batch_is_no_alarm():
    watch = AlarmWatch(SETTINGS)
    assert heard(watch, *[{}] * WINDOW, {"tracking": 4.9}, *[{}] * WINDOW) == []


def test_a_residual_above_the_fisher_term_is_heard_once_and_again_after_it_has_come_back():
    watch = AlarmWatch(SETTINGS)
    loud, quiet = [{"nr_norm": 1.5}] * WINDOW, [{}] * WINDOW
    assert heard(watch, *loud, *loud, *quiet, *loud) == [
        (WINDOW, "residual_dominance"),
        # Of the last four losses three are loud: (3 * 1.5 + 0.1) / 4 > 1.
        (3 * WINDOW + 3, "residual_dominance"),
    ]


def test_a_lag_is_heard_when_it_is_measured_also_before_a_skipped_update():
    watch, resumed = AlarmWatch(SETTINGS), AlarmWatch(SETTINGS)
    lags = [{}, {"tracking_lag": 0.09}, {}, {"tracking_lag": 0.11}, {"tracking_lag": 0.25}]
    earlier = [replace(an_iteration(number), lag=lag) for number, lag in enumerate(lags)]
    earlier[3] = replace(earlier[3], skipped=({"kind": "spike"},))
    found = [alarm for record in earlier for alarm in watch.iteration(record)]
    assert [(alarm.iteration, alarm.name, alarm.value) for alarm in found] == [
        (4, "tracking_lag", 0.11)
    ]
    resumed.replay(record.to_json() for record in earlier)
    for one in (watch, resumed):
        assert one.iteration(replace(an_iteration(5), lag={"tracking_lag": 0.3})) == []
        assert one.iteration(replace(an_iteration(6), lag={"tracking_lag": 0.01})) == []
        (again,) = one.iteration(replace(an_iteration(7), lag={"tracking_lag": 0.3}))
        assert (again.iteration, again.limit) == (8, 0.1)


def test_a_resumed_watch_goes_on_as_if_it_had_never_stopped():
    whole, resumed, forgetful = (AlarmWatch(SETTINGS) for _ in range(3))
    earlier = [an_iteration(number, tracking=0.2) for number in range(WINDOW + 3)]
    for record in earlier:
        whole.iteration(record)
    resumed.replay(record.to_json() for record in earlier)
    last = an_iteration(len(earlier), tracking=9.0)
    assert [alarm.name for alarm in whole.iteration(last)] == ["tracking_growth"]
    assert [alarm.name for alarm in resumed.iteration(last)] == ["tracking_growth"]
    assert forgetful.iteration(last) == []


def test_a_discriminator_that_stays_silent_is_heard_from_its_second_window_on():
    silent, awake = [{"logit_gap": 0.004}] * WINDOW, [{"logit_gap": 0.8}] * WINDOW
    losses = [*silent, *silent, *awake, *silent]
    assert heard(AlarmWatch(SETTINGS), *losses) == [
        (2 * WINDOW, "silent_discriminator"),
        (4 * WINDOW, "silent_discriminator"),
    ]
    # Heads start at 0 and need some updates.
    assert heard(AlarmWatch(SETTINGS), *silent, *awake, *awake) == []
    resumed = AlarmWatch(SETTINGS)
    resumed.replay(
        an_iteration(number, **entry).to_json() for number, entry in enumerate(losses[:7])
    )
    (alarm,) = resumed.iteration(an_iteration(7, **losses[7]))
    assert (alarm.name, alarm.limit) == ("silent_discriminator", 0.05)


def test_a_run_without_a_discriminator_is_not_to_be_stopped_by_one():
    stop = ["alarms.stop=[silent_discriminator]"]
    assert load_recipe("tiny-adm", stop).alarms.stop == ("silent_discriminator",)
    with pytest.raises(ConfigError, match="this sgmd has no discriminator"):
        load_recipe("tiny", stop)
