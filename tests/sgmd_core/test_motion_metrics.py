"""Motion from a flow that is given: every figure where its answer is known."""

import pytest
import torch

from sgmd_core.errors import ShapeError
from sgmd_core.metrics.motion import (
    dynamic_clips,
    dynamic_interval,
    flicker,
    mean_magnitude,
    smoothness,
    top_magnitude,
)


def uniform_flow(right: float, down: float, steps: int = 12, side: int = 32) -> torch.Tensor:
    vector = torch.tensor([right, down])
    return vector.reshape(1, 1, 2, 1, 1).expand(1, steps, 2, side, side).clone()


def texture(frames: int = 13, side: int = 32, seed: int = 0) -> torch.Tensor:
    """One picture repeated: a still clip (1, 3, frames, side, side) in [0, 1]."""
    picture = torch.rand(1, 3, 1, side, side, generator=torch.Generator().manual_seed(seed))
    return picture.expand(1, 3, frames, side, side).clone()


def shifted(step_px: int, frames: int = 13) -> torch.Tensor:
    still = texture(frames)
    rolled = [still[:, :, i].roll(step_px * i, dims=-1) for i in range(frames)]
    return torch.stack(rolled, dim=2)


def test_a_uniform_flow_of_three_and_four_is_of_length_five_everywhere():
    flow = uniform_flow(3.0, 4.0)
    assert mean_magnitude(flow).item() == pytest.approx(5.0)
    assert top_magnitude(flow).item() == pytest.approx(5.0)


def test_the_top_share_sees_a_small_thing_that_the_mean_hides():
    flow = torch.zeros(1, 4, 2, 20, 20)
    flow[:, :, 0, :4, :5] = 2.0  # 20 of 400 pixels: exactly 5 %
    assert mean_magnitude(flow).item() == pytest.approx(0.1)
    assert top_magnitude(flow).item() == pytest.approx(2.0)


def test_still_clips_have_no_motion_and_are_smooth():
    flow = uniform_flow(0.0, 0.0)
    assert mean_magnitude(flow).item() == 0
    assert top_magnitude(flow).item() == 0
    assert smoothness(flow).item() == 1
    assert not dynamic_clips(flow).item()


@pytest.mark.parametrize(
    ("speed", "fast_steps", "moves"),
    [
        (0.76, 12, True),  # threshold: 6 / 256 of 32 pixels is 0.75
        (0.74, 12, False),
        (2.0, 3, True),  # a quarter of 13 frames is 3
        (2.0, 2, False),
    ],
)
def test_a_clip_is_dynamic_from_a_known_speed_on_in_a_known_number_of_steps(
    speed, fast_steps, moves
):
    flow = uniform_flow(speed, 0.0)
    flow[:, fast_steps:] = 0
    assert dynamic_clips(flow).item() is moves


def test_the_dynamic_threshold_grows_with_the_shorter_side():
    assert dynamic_clips(uniform_flow(1.4, 0.0, side=32)).item()
    assert not dynamic_clips(uniform_flow(1.4, 0.0, side=64)).item()


@pytest.mark.parametrize(("fps", "interval"), [(8, 1), (16, 2), (24, 3), (4, 1), (30, 4)])
def test_the_dynamic_rule_looks_at_eight_frames_a_second(fps, interval):
    assert dynamic_interval(fps) == interval


def test_even_motion_is_smooth_and_reversing_motion_is_not():
    assert smoothness(uniform_flow(1.0, -2.0)).item() == pytest.approx(1.0)
    back_and_forth = uniform_flow(1.0, 0.0)
    back_and_forth[:, 1::2] *= -1
    assert smoothness(back_and_forth).item() == pytest.approx(0.0, abs=1e-6)


def test_smoothness_falls_as_speed_jitters_more():
    random = torch.randn(12, generator=torch.Generator().manual_seed(0)).reshape(1, 12, 1, 1, 1)
    found = [
        smoothness(uniform_flow(1.0, 0.0) * (1 + jitter * random)).item()
        for jitter in (0.0, 0.1, 0.3, 0.6)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(1.0)
    assert found[-1] < 0.8


def test_smoothness_follows_things_on_their_way():
    # A block moves by 2 pixels a frame; its flow moves along, so nothing changes on the way.
    flow = torch.zeros(1, 8, 2, 16, 32)
    for step in range(8):
        flow[:, step, 0, 4:12, 4 + 2 * step : 12 + 2 * step] = 2.0
    assert smoothness(flow).item() == pytest.approx(1.0)


def test_a_still_clip_does_not_flicker_and_neither_does_one_that_moves_as_its_flow_says():
    # The lookup interpolates in float32 coordinates, which leaves a rounding of 1e-6.
    still = uniform_flow(0.0, 0.0)
    assert flicker(texture(), still).item() == pytest.approx(0, abs=1e-5)
    assert flicker(shifted(2), uniform_flow(2.0, 0.0)).item() == pytest.approx(0, abs=1e-5)
    assert flicker(shifted(2), still).item() > 0.2


def test_flashing_between_black_and_white_is_a_flicker_of_one():
    clip = torch.zeros(1, 3, 13, 16, 16)
    clip[:, :, 1::2] = 1.0
    assert flicker(clip, uniform_flow(0.0, 0.0, side=16)).item() == pytest.approx(1.0)


def test_flicker_grows_with_noise_and_is_that_of_two_independent_normals():
    noise = torch.randn(1, 3, 13, 32, 32, generator=torch.Generator().manual_seed(1))
    found = [
        flicker(texture() + level * noise, uniform_flow(0.0, 0.0)).item()
        for level in (0.0, 0.01, 0.05, 0.2)
    ]
    assert found == sorted(found)
    # The mean absolute difference of two normals is 2 / sqrt(pi) standard deviations.
    assert found[2] == pytest.approx(0.05 * 2 / torch.pi**0.5, rel=0.02)


def test_clips_of_a_batch_do_not_touch_each_other():
    flows = torch.cat([uniform_flow(1.0, 0.0), uniform_flow(3.0, 0.0)])
    flows[1, 1::2] *= -1
    clips = torch.cat([shifted(1), texture()])
    for measure in (mean_magnitude, top_magnitude, smoothness, dynamic_clips):
        alone = torch.cat([measure(flow[None]) for flow in flows])
        assert torch.equal(measure(flows), alone)
    alone = torch.cat([flicker(c[None], f[None]) for c, f in zip(clips, flows, strict=True)])
    torch.testing.assert_close(flicker(clips, flows), alone)


def test_smoothness_of_two_frames_is_refused():
    with pytest.raises(ShapeError, match="2 frames"):
        smoothness(uniform_flow(1.0, 0.0, steps=1))
