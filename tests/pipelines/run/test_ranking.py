"""The best first, whatever is best; and a score that nobody measured is refused."""

import math

import pytest

from pipelines.run.ranking import Ranked, ranked, scores_of

LINES = [
    {"iteration": 20, "figures": {"frechet": 0.3, "colour": 0.9}},
    {"iteration": 40, "figures": {"frechet": 0.1, "colour": 0.8}},
    {"iteration": 60, "figures": {"frechet": 0.2, "colour": 0.9}},
]


@pytest.mark.parametrize(
    ("score", "mode", "order"),
    [("frechet", "min", [40, 60, 20]), ("frechet", "max", [20, 60, 40])],
)
def test_small_or_large_is_good_as_one_says(score, mode, order):
    assert [entry.iteration for entry in ranked(scores_of(LINES, score), mode)] == order


def test_of_equal_states_the_earlier_one_is_the_better():
    found = ranked(scores_of(LINES, "colour"), "max")
    assert found == [Ranked(20, 0.9), Ranked(60, 0.9), Ranked(40, 0.8)]


def test_only_what_is_there_is_ranked_and_what_is_no_number_comes_last():
    scores = {1: 0.5, 2: math.nan, 3: 0.1, 4: 0.0}
    assert [entry.iteration for entry in ranked(scores, "min", {1, 2, 3})] == [3, 1, 2]
    assert [entry.iteration for entry in ranked(scores, "max", {1, 2, 3})] == [1, 3, 2]


def test_a_state_without_the_figure_is_not_ranked():
    assert scores_of([*LINES, {"iteration": 80, "figures": {}}], "colour").keys() == {20, 40, 60}
