"""Draws of sizes: shares by weight, a function of seed and iteration and of nothing else."""

import pytest

from sgmd_core.buckets import LatentBuckets, drawn_bucket

SHAPES = ((4, 3, 4, 4), (4, 2, 4, 6), (4, 1, 8, 8))


def test_every_size_has_its_share_of_the_iterations():
    weights = (3.0, 1.0, 0.5)
    num = 4000
    drawn = [drawn_bucket(5, iteration, weights) for iteration in range(num)]
    for number, weight in enumerate(weights):
        share = weight / sum(weights)
        # Five standard deviations of a share of so many draws.
        spread = (share * (1 - share) / num) ** 0.5
        assert drawn.count(number) / num == pytest.approx(share, abs=5 * spread)


def test_a_draw_depends_on_seed_and_iteration_alone():
    buckets = LatentBuckets(SHAPES, (1.0, 1.0, 1.0))
    forwards = [buckets.shape_at(3, iteration) for iteration in range(60)]
    backwards = [buckets.shape_at(3, iteration) for iteration in reversed(range(60))]
    assert forwards == backwards[::-1]
    assert set(forwards) == set(SHAPES)
    assert forwards != [buckets.shape_at(4, iteration) for iteration in range(60)]


def test_weights_count_by_their_shares():
    doubled = [drawn_bucket(1, iteration, (2.0, 6.0)) for iteration in range(200)]
    assert doubled == [drawn_bucket(1, iteration, (1.0, 3.0)) for iteration in range(200)]
    assert LatentBuckets(SHAPES[:2], (2.0, 6.0)).shares == (0.25, 0.75)


def test_one_size_is_that_of_every_iteration():
    assert {drawn_bucket(0, iteration, (0.1,)) for iteration in range(100)} == {0}
