"""The best first, whatever is best; and a score that nobody measured is refused."""

import math

import pytest

from pipelines.run.ranking import Contender, Ranked, not_told_apart, ranked, scores_of

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


def contender(name: str, value: float, reach: float, influence: tuple[float, ...] = ()):
    return Contender(name, value, (value - reach, value + reach), influence)


def test_those_whose_intervals_overlap_with_the_best_one_are_named_with_their_figures():
    found = [
        contender("20", 0.031, 0.006),
        contender("30", 0.034, 0.007),
        contender("10", 0.5, 0.1),
    ]
    assert not_told_apart(found, "checkpoints", "frechet") == (
        "checkpoints 20 and 30 are not told apart by these clips: frechet 0.031 [0.025, 0.037] and "
        "0.034 [0.027, 0.041], 95 %; take more clips: validation.num_captions"
    )


def test_a_best_one_that_is_clearly_the_best_needs_no_words():
    found = [contender("20", 0.031, 0.006), contender("30", 0.05, 0.007)]
    assert not_told_apart(found, "checkpoints", "frechet") == ""
    assert not_told_apart(found[:1], "checkpoints", "frechet") == ""
    assert not_told_apart([], "checkpoints", "frechet") == ""


def test_differences_clip_by_clip_count_more_than_intervals():
    """Both figures vary with the captions by far more than with the generator."""
    captions = tuple(0.5 * (-1) ** clip for clip in range(64))
    first = contender("20", 0.30, 0.12, captions)
    clear = contender(
        "30", 0.35, 0.12, tuple(each + 0.01 * (-1) ** n for n, each in enumerate(captions))
    )
    unclear = contender("40", 0.35, 0.12, tuple(-each for each in captions))
    assert not_told_apart([first, clear], "checkpoints", "frechet") == ""
    assert "20 and 40 are not told apart" in not_told_apart(
        [first, unclear], "checkpoints", "frechet"
    )
    # Of other clips, only the intervals are left.
    other = Contender("30", 0.35, clear.interval, clear.influence[:-1])
    assert "20 and 30" in not_told_apart([first, other], "checkpoints", "frechet")


def test_many_are_counted_and_what_is_no_number_or_has_no_interval_is_left_out():
    found = [contender(str(at), 0.3, 0.1) for at in range(6)]
    found += [contender("nan", math.nan, 0.1), Contender("unmeasured", 0.3)]
    told = not_told_apart(found, "trials", "frechet")
    assert told.startswith("trials 0, 1, 2, 3 and 2 more are not told apart")
    assert "nan" not in told
    assert "unmeasured" not in told


def test_a_line_of_validation_without_intervals_is_read():
    line = LINES[0] | {"intervals": {"frechet": [0.2, 0.4]}, "influences": {"frechet": [0.1, -0.1]}}
    assert Contender.of_validation("20", line, "frechet") == Contender(
        "20", 0.3, (0.2, 0.4), (0.1, -0.1)
    )
    assert Contender.of_validation("20", LINES[0], "frechet") == Contender("20", 0.3)
