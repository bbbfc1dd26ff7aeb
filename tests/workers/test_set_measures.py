"""Measures of sets of clips: floors, ratios and intervals on drawn distributions."""

import math

import pytest
import torch

from sgmd_core.metrics.distributions import ClipMotion
from sgmd_core.worlds import WorldName
from sgmd_core.worlds.readings import motion_of, read_clips, world_of
from workers.measures import MOTION_MEASURES
from workers.set_measures import compare_motions, motion_figures

NUM_CLIPS = 128


def drawn(seed: int, scale: float = 1.0, sectors: float = 1.0, texture: float = 0.1) -> ClipMotion:
    generator = torch.Generator().manual_seed(seed)
    speed = scale * torch.randn(NUM_CLIPS, 1, generator=generator).exp()
    angle = 2 * math.pi * sectors * torch.rand(NUM_CLIPS, 1, generator=generator)
    noise = 0.01 * torch.randn(NUM_CLIPS, generator=generator)
    return ClipMotion(
        present=torch.ones(NUM_CLIPS, 1, dtype=torch.bool),
        speed_px_per_frame=speed,
        heading=torch.stack([angle.cos(), angle.sin()], dim=-1),
        texture=texture + noise,
    )


@pytest.mark.slow
def test_what_differs_is_floors_away_and_what_does_not_is_about_one() -> None:
    reference, floor = drawn(0), drawn(1)
    found = compare_motions(drawn(2, scale=0.4, texture=0.07), reference, floor)
    for name in ("speed_distance", "texture_distance"):
        ratio = found[name].ratio
        assert ratio is not None
        assert ratio.value > 3
        assert ratio.low < ratio.value < ratio.high
        own = motion_figures(floor, reference)[name]
        assert found[name].value.value == pytest.approx(ratio.value * own)
    ratio = found["direction_distance"].ratio
    assert ratio is not None
    assert ratio.value < 3
    collapsed = compare_motions(drawn(2, sectors=0.1), reference, floor)
    assert collapsed["direction_entropy"].value.value < 1.5
    ratio = collapsed["direction_distance"].ratio
    assert ratio is not None
    assert ratio.value > 3


@pytest.mark.slow
def test_the_floor_is_compared_with_nothing_and_no_ratio_is_taken_to_zero() -> None:
    reference, floor = drawn(0), drawn(1)
    found = compare_motions(floor, reference)
    assert found.keys() == MOTION_MEASURES.keys()
    assert all(figure.ratio is None for figure in found.values())
    # Every clip has one object, in both sets.
    assert compare_motions(drawn(2), reference, floor)["count_distance"].ratio is None


def test_clips_are_read_by_the_rules_of_their_world() -> None:
    assert world_of(["a red circle moves left", "a blue bar moves up slowly"]) is WorldName.SHAPES
    assert world_of(["a red circle moves left", "a blue bar"]) is WorldName.OPEN
    assert world_of(["a red circle", "a dog"]) is None
    video = torch.rand(3, 3, 13, 32, 32, generator=torch.Generator().manual_seed(0))
    for world in WorldName:
        motion = motion_of(read_clips(world, video))
        names = motion_figures(motion, motion).keys()
        assert ("texture_distance" in names) == (world is WorldName.OPEN)
