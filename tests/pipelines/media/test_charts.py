"""Curves as SVG: well-formed, to scale, and without a point that was not recorded."""

import json
import math
import xml.etree.ElementTree as ElementTree

import pytest

from pipelines.media.charts import (
    Mark,
    Series,
    line_chart,
    linear_axis,
    log_axis,
    number,
    running_median,
    thinned,
)


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


def test_ticks_have_the_decimals_that_tell_neighbours_apart():
    axis = linear_axis(1.057, 1.062)
    labels = [axis.label(tick) for tick in axis.ticks]
    assert len(set(labels)) == len(labels)
    assert linear_axis(0, 100).label(50.0) == "50"
    assert linear_axis(-0.4, 0.4).label(-0.0) == "0.0"


def test_a_thinned_curve_keeps_its_spikes_and_its_length():
    values = [math.sin(i / 50) for i in range(5000)]
    values[1234], values[4321] = 99.0, -99.0
    kept = thinned(values, 400)
    assert len(kept) <= 400
    assert {1234, 4321} <= set(kept)
    assert kept == sorted(kept)


def test_a_mark_stands_where_it_happened_and_says_what():
    svg = line_chart([Series("a", [0, 100], [0, 1])], marks=[Mark(50, "drift"), Mark(200, "late")])
    (mark,) = [e for e in ElementTree.fromstring(svg).iter("g") if e.get("class") == "mark"]
    # The plane reaches from 48 to 350.
    assert mark.find("line").get("x1") == "199"
    assert mark.find("title").text == "drift"


def test_hundreds_of_marks_at_one_place_are_one_line():
    svg = line_chart([Series("a", [0, 1e6], [0, 1])], marks=[Mark(i, "drift") for i in range(500)])
    assert svg.count('class="mark"') == 1


def test_the_recorded_values_lie_in_the_picture_with_gaps_as_null():
    svg = ElementTree.fromstring(line_chart([Series("a", [0, 1, 2], [0.123456, math.nan, 2])]))
    assert json.loads(svg.get("data-curves")) == [
        {"label": "a", "x": [0, 1, 2], "y": [0.1235, None, 2.0]}
    ]
