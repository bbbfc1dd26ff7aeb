"""Distances between distributions, against closed forms."""

import math

import pytest
import torch

from sgmd_core.metrics.distributions import (
    ClipMotion,
    count_distance,
    direction_distance,
    direction_entropy,
    entropy_bits,
    speed_distance,
    still_share,
    texture_distance,
    total_variation,
    wasserstein,
)


def normal(size: int) -> torch.Tensor:
    """Quantiles of a standard normal distribution."""
    return torch.special.ndtri((torch.arange(size) + 0.5) / size)


def motion(speed: torch.Tensor, angle: torch.Tensor, texture: float = 0.1) -> ClipMotion:
    """Clips of one object each."""
    heading = torch.stack([angle.cos(), angle.sin()], dim=-1)
    return ClipMotion(
        present=torch.ones(len(speed), 1, dtype=torch.bool),
        speed_px_per_frame=speed[:, None],
        heading=heading[:, None],
        texture=torch.full((len(speed),), texture),
    )


def test_a_shift_is_as_far_as_it_shifts() -> None:
    values = normal(101)
    assert wasserstein(values, values + 0.7) == pytest.approx(0.7, rel=1e-6)
    assert wasserstein(values, values) == 0
    assert wasserstein(values + 0.7, values) == wasserstein(values, values + 0.7)


def test_a_scale_moves_normal_values_by_their_mean_distance_from_the_middle() -> None:
    values = normal(20_001)
    # E |x| of a standard normal distribution is sqrt(2 / pi).
    expected = 0.4 * math.sqrt(2 / math.pi)
    assert wasserstein(values, 0.6 * values) == pytest.approx(expected, rel=1e-3)


def test_sets_of_different_sizes_are_compared_by_their_distributions() -> None:
    assert wasserstein(torch.tensor([0.0]), torch.tensor([0.0, 1.0])) == pytest.approx(0.5)
    values = normal(50)
    assert wasserstein(values, values.repeat(3)) == pytest.approx(0, abs=1e-7)
    uniform = (torch.arange(1000) + 0.5) / 1000
    assert wasserstein(uniform, torch.tensor([0.5])) == pytest.approx(0.25, rel=1e-5)


def test_the_distance_to_an_empty_set_is_undefined() -> None:
    assert math.isnan(wasserstein(torch.zeros(0), torch.ones(3)))


def test_total_variation_and_entropy_of_known_shares() -> None:
    even, single = torch.full((8,), 1 / 8), torch.eye(8)[0]
    assert total_variation(even, even) == 0
    assert total_variation(even, single) == pytest.approx(7 / 8)
    assert total_variation(single, torch.eye(8)[1]) == 1
    assert total_variation(single, torch.zeros(8)) == 1
    assert total_variation(torch.zeros(8), torch.zeros(8)) == 0
    assert entropy_bits(even) == pytest.approx(3)
    assert entropy_bits(single) == 0
    assert entropy_bits(torch.tensor([0.5, 0.5, 0.0])) == pytest.approx(1)


def test_collapsed_directions_lose_entropy_and_are_far_from_open_ones() -> None:
    speed = torch.ones(800)
    open_ways = motion(speed, torch.arange(800) / 800 * 2 * math.pi)
    right = motion(speed, 0.2 * torch.sin(torch.arange(800.0)))
    assert direction_entropy(open_ways, open_ways) == pytest.approx(3, abs=1e-3)
    assert direction_entropy(right, open_ways) == 0
    assert direction_distance(right, open_ways) == pytest.approx(7 / 8, abs=0.01)
    assert direction_distance(open_ways, open_ways) == 0


def test_objects_at_rest_have_no_direction_and_are_counted_as_still() -> None:
    angle = torch.arange(100) / 100 * 2 * math.pi
    moving, resting = motion(torch.ones(100), angle), motion(torch.full((100,), 0.1), angle)
    assert still_share(moving, moving) == 0
    assert still_share(resting, moving) == 1
    assert direction_distance(resting, moving) == 1
    assert direction_entropy(resting, moving) == 0
    mixed = motion(torch.cat([torch.ones(75), torch.zeros(25)]), angle)
    assert still_share(mixed, moving) == 0.25
    assert speed_distance(mixed, moving) == pytest.approx(0.25)


def test_a_clip_is_still_only_when_all_its_objects_are() -> None:
    two = ClipMotion(
        present=torch.tensor([[True, True], [True, False]]),
        speed_px_per_frame=torch.tensor([[0.0, 1.0], [0.0, 5.0]]),
        heading=torch.ones(2, 2, 2),
        texture=torch.zeros(2),
    )
    assert still_share(two, two) == 0.5
    assert two.speeds.tolist() == [0.0, 1.0, 0.0]
    assert two.count_shares.tolist()[:3] == [0, 0.5, 0.5]
    alone = two.take(torch.tensor([1, 1]))
    assert count_distance(alone, two) == 0.5


def test_textures_are_compared_where_a_world_has_them() -> None:
    speed, angle = torch.ones(10), torch.zeros(10)
    faded, full = (motion(speed, angle, texture) for texture in (0.06, 0.1))
    plain = motion(speed, angle, math.nan)
    assert texture_distance(faded, full) == pytest.approx(0.04, rel=1e-5)
    assert math.isnan(texture_distance(plain, plain))
