"""Curves as SVG: well-formed, to scale, and without a point that was not recorded."""

import math
import xml.etree.ElementTree as ElementTree

import pytest

from pipelines.charts import Series, line_chart, linear_axis, log_axis, number, running_median


def paths(svg: str) -> list[str]:
    return [element.get("d", "") for element in ElementTree.fromstring(svg).iter("path")]


def test_a_chart_is_well_formed_and_names_its_curves():
    svg = line_chart([Series("a < b", [0, 1], [1, 2]), Series("c", [0, 1], [2, 1])])
    assert ElementTree.fromstring(svg).get("aria-label") == "a < b, c"


def test_a_long_noisy_curve_is_drawn_raw_and_smooth():
    noisy = Series("loss", range(500), [(-1) ** i for i in range(500)])
    assert len(paths(line_chart([noisy]))) == 2


def test_a_short_curve_shows_its_points():
    svg = line_chart([Series("figure", [50, 100], [0.5, 0.7])])
    assert svg.count("<circle") == 2
    assert "figure at 100: 0.7" in svg


def test_values_that_are_not_finite_leave_a_gap():
    (path,) = paths(line_chart([Series("a", [0, 1, 2, 3], [1.0, math.nan, 2.0, math.inf])]))
    assert path.count("M") == 2
    assert "nan" not in path


def test_nothing_finite_is_said_in_words():
    assert "No finite values" in line_chart([Series("a", [0], [math.nan])])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 17), (0.0012, 0.0013), (5, 5), (0, 0)])
def test_a_linear_axis_holds_the_values_at_round_ticks(low, high):
    axis = linear_axis(low, high)
    assert axis.low <= low + 1e-12
    assert axis.high >= high - 1e-12
    assert 2 <= len(axis.ticks) <= 8
    assert axis.place(axis.low) == 0
    assert axis.place(axis.high) == 1


def test_a_log_axis_goes_by_powers_of_ten():
    axis = log_axis(0.03, 40)
    assert axis.ticks == (0.01, 0.1, 1.0, 10.0, 100.0)
    assert axis.place(1.0) == pytest.approx(0.5)


def test_a_log_chart_of_values_that_reach_zero_is_linear_instead():
    assert paths(line_chart([Series("a", [0, 1], [0.0, 1.0])], log=True))


def test_one_spike_does_not_bend_the_running_median():
    values = [1.0] * 20
    values[10] = 1e6
    assert running_median(values, 5) == [1.0] * 20


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.25, "0.25"), (12345, "12,345"), (2e-5, "2e-05"), (3.0, "3")]
)
def test_numbers_are_short(value, text):
    assert number(value) == text
