"""Intervals by leaving clips out: closed forms, coverage, and which of two sets is the closer."""

import math

import pytest
import torch

from sgmd_core.errors import ShapeError
from sgmd_core.metrics.bootstrap import ratio_interval, resampled_rows
from sgmd_core.metrics.frechet import fit_gaussian, frechet_distance
from sgmd_core.metrics.jackknife import influences, jackknife_interval, standard_error


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return frechet_distance(*fit_gaussian(first), *fit_gaussian(second))


def distance_influences(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return influences(lambda kept: distance(first[kept], second[kept]), len(first))


def distance_of_one_feature(first: torch.Tensor, second: torch.Tensor) -> float:
    """The same for one feature, in its closed form."""
    (deviation1, mean1), (deviation2, mean2) = (torch.std_mean(each) for each in (first, second))
    return float((mean1 - mean2).square() + (deviation1 - deviation2).square())


def normal(seed: int, num_clips: int, num_features: int = 1) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(num_clips, num_features, generator=random, dtype=torch.float64)


def mean_deviation_factor(num_clips: int) -> float:
    """Expected standard deviation of as many standard normals."""
    half = num_clips / 2
    return math.sqrt(2 / (num_clips - 1)) * math.exp(math.lgamma(half) - math.lgamma(half - 0.5))


def expected_distance(shift: float, scale: float, num_clips: int) -> float:
    """Expected distance between samples of N(shift, scale^2) and N(0, 1), one feature."""
    factor = mean_deviation_factor(num_clips)
    return shift**2 + (1 + scale**2) / num_clips + 1 + scale**2 - 2 * scale * factor**2


def test_influences_on_a_mean_are_deviations_and_its_error_is_the_usual_one():
    values = normal(0, 50)[:, 0]
    found = influences(lambda kept: float(values[kept].mean()), len(values))
    torch.testing.assert_close(found, values - values.mean())
    assert standard_error(found) == pytest.approx(float(values.std()) / math.sqrt(50))


def test_the_error_of_a_ratio_is_the_one_that_resampling_gives():
    below = 3 + normal(1, 200)[:, 0]
    values = 0.8 * below + 0.3 * normal(2, 200)[:, 0]
    found = influences(lambda kept: float(values[kept].mean() / below[kept].mean()), 200)
    drawn = ratio_interval(values, below, resampled_rows(200, seed=0))
    assert drawn is not None
    ours = jackknife_interval(drawn.value, found)
    assert ours.high - ours.low == pytest.approx(drawn.high - drawn.low, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "scale"), [(1.0, 1.0), (0.5, 1.5)])
def test_intervals_of_a_distance_cover_what_is_expected_in_about_95_of_100_draws(shift, scale):
    num_clips, num_draws = 64, 200
    expected = expected_distance(shift, scale, num_clips)
    covered = below = 0
    for draw in range(num_draws):
        own = shift + scale * normal(2 * draw, num_clips)
        reference = normal(2 * draw + 1, num_clips)
        value = distance_of_one_feature(own, reference)
        found = influences(
            lambda kept, own=own, reference=reference: distance_of_one_feature(
                own[kept], reference[kept]
            ),
            num_clips,
        )
        interval = jackknife_interval(value, found)
        covered += interval.low <= expected <= interval.high
        below += value < expected
    assert value == pytest.approx(distance(own, reference))
    # Three standard deviations of a share of 200 are 0.046. The distance is skewed, an interval of
    # a normal distribution is not.
    assert 0.9 <= covered / num_draws <= 0.985
    assert 0.4 < below / num_draws < 0.65


@pytest.mark.slow
def test_the_difference_of_two_distances_is_known_better_clip_by_clip_than_from_their_errors():
    """Both generators start from the same noise, and the second one is further off."""
    right = separated = together = 0
    for draw in range(10):
        noise, reference = normal(2 * draw, 64, 8), normal(2 * draw + 1, 64, 8)
        near, far = noise + 0.3, noise + 0.5
        gap = distance(far, reference) - distance(near, reference)
        first, second = (distance_influences(own, reference) for own in (near, far))
        right += gap > 0
        separated += gap > 1.96 * standard_error(first - second)
        together += gap > 1.96 * math.hypot(standard_error(first), standard_error(second))
    assert right == 10
    assert separated >= 9
    assert together <= separated - 2


def test_too_few_samples_are_refused():
    with pytest.raises(ShapeError, match="1 samples"):
        influences(lambda kept: 0.0, 1)
    with pytest.raises(ShapeError, match="at least 2"):
        standard_error([0.0])
