"""Paired comparisons, against counts by hand."""

import itertools
import math

import pytest

from sgmd_core.errors import ShapeError
from sgmd_core.metrics.paired import (
    MAX_EXACT,
    holm,
    mean_difference,
    paired_differences,
    sign_flip_p,
    two_sided_p,
)


def test_pairs_that_are_not_finite_are_left_out():
    assert paired_differences([1.0, math.nan, 3.0, math.inf], [0.5, 1.0, 1.0, 1.0]) == [0.5, 2.0]


@pytest.mark.parametrize("num_pairs", [1, 5, 8])
def test_differences_of_one_sign_have_the_smallest_p_there_is(num_pairs):
    differences = [0.1 * (n + 1) for n in range(num_pairs)]
    assert sign_flip_p(differences) == 2.0**-num_pairs
    # The other side: every pattern is as large.
    assert sign_flip_p([-each for each in differences]) == 1.0


def test_p_is_the_share_of_sign_patterns_as_large():
    differences = [0.3, -0.1, 0.2, 0.4, -0.25]
    sums = [
        sum(sign * abs(each) for sign, each in zip(signs, differences, strict=True))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    as_large = sum(each >= sum(differences) - 1e-9 for each in sums)
    assert 1 < as_large < len(sums)
    assert sign_flip_p(differences) == as_large / len(sums)


def test_equal_values_are_no_evidence():
    assert sign_flip_p([0.0, 0.0, 0.0]) == 1.0


@pytest.mark.slow
def test_many_pairs_are_sampled_and_agree_with_the_normal_law():
    # n differences, of which (n + k) / 2 are +1: the mean is k / sqrt(n) standard deviations up.
    ones, others = 24, 12
    found = sign_flip_p([1.0] * ones + [-1.0] * others)
    exact = sum(math.comb(36, up) for up in range(ones, 37)) / 2**36
    assert ones + others > MAX_EXACT
    assert found == pytest.approx(exact, rel=0.02)
    # Never 0, however strong: the differences themselves are one of the patterns.
    assert sign_flip_p([1.0] * 60) == 1 / (2**MAX_EXACT + 1)


def test_no_pair_and_no_number_are_refused():
    with pytest.raises(ShapeError, match="no pair"):
        sign_flip_p([])
    with pytest.raises(ShapeError, match="NaN"):
        sign_flip_p([0.1, math.nan])


def test_an_infinite_difference_outweighs_all_others():
    gains = [0.1, 5.0, 0.3, 0.2]
    assert sign_flip_p([*gains, math.inf]) == 1 / 32
    # It has the other sign in half of the patterns, whatever the others do.
    assert sign_flip_p([*gains, -math.inf]) > 0.5
    assert sign_flip_p([math.inf, -math.inf]) == 0.75


def test_two_sides_are_twice_the_smaller_one():
    assert two_sided_p([0.1] * 6) == two_sided_p([-0.1] * 6) == 2 / 64
    assert two_sided_p([1.0, -1.0]) == 1.0


def test_holm_counts_the_smallest_most_often_and_keeps_the_order():
    # Holm's own steps: 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04 not below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.9]) == [0.8, 0.9]
    assert holm([0.7, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_mean_difference_has_an_interval_around_it():
    found = mean_difference([0.1, 0.2, 0.3, 0.2])
    assert found is not None
    assert found.value == pytest.approx(0.2)
    assert 0.1 <= found.low < found.value < found.high <= 0.3
    assert mean_difference([0.1]) is None
