"""Distances between sets: what chance makes of nothing is taken off, and the errors are honest."""

import math

import pytest
import torch

from pipelines.evaluation.set_distances import set_distances
from sgmd_core.errors import ShapeError

NUM_CLIPS, NUM_FEATURES = 128, 6


def normal(seed: int, shift: float = 0.0) -> torch.Tensor:
    """Features of a set whose true distance to the unshifted one is shift^2."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(NUM_CLIPS, NUM_FEATURES, generator=generator)
    features[:, 0] += shift
    return features


def measure(seed: int, shift: float, num_bootstraps: int = 100):
    sets = {
        "floor": normal(seed + 1),
        "baseline": normal(seed + 2, 2.0),
        "other": normal(seed + 3, shift),
    }
    return set_distances(
        normal(seed),
        sets,
        floor="floor",
        baseline="baseline",
        num_bootstraps=num_bootstraps,
        seed=7,
    )


def test_a_set_against_itself_is_at_distance_zero_and_on_the_floor():
    same = normal(0)
    found = set_distances(
        same, {"a": same, "b": same}, floor="a", baseline="b", num_bootstraps=5, seed=0
    )
    assert found["a"].distance.value == pytest.approx(0, abs=1e-9)
    assert found["a"].above_floor.value == 0
    assert found["a"].above_floor.error == 0
    assert math.isnan(found["a"].ratio.value)


def test_the_distance_above_the_floor_is_the_true_one_within_its_error():
    found = measure(0, shift=1.0)["other"].above_floor
    assert abs(found.value - 1.0) < 3 * found.error
    assert found.error < 0.4


def test_the_baseline_has_ratio_one_and_the_floor_ratio_zero():
    found = measure(0, shift=1.0)
    assert found["baseline"].ratio.value == 1
    assert found["floor"].ratio.value == 0
    assert found["other"].ratio.value == pytest.approx(0.25, abs=0.1)


@pytest.mark.slow
def test_the_error_is_the_spread_that_new_clips_would_give():
    estimates = [measure(10 * trial, shift=1.0, num_bootstraps=40) for trial in range(30)]
    values = torch.tensor([found["other"].above_floor.value for found in estimates])
    errors = torch.tensor([found["other"].above_floor.error for found in estimates])
    assert float(errors.mean() / values.std()) == pytest.approx(1, abs=0.35)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_errors():
    assert measure(0, shift=0.5) == measure(0, shift=0.5)


def test_sets_of_different_sizes_are_refused():
    with pytest.raises(ShapeError, match="127"):
        set_distances(
            normal(0), {"a": normal(1)[1:]}, floor="a", baseline="a", num_bootstraps=2, seed=0
        )
