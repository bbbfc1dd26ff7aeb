"""The measurement of clips against rendered truth, and its arithmetic against hand-made numbers."""

import pytest
import torch

from sgmd_core.errors import ShapeError
from sgmd_core.worlds.shapes import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SPEEDS_PX_PER_FRAME,
    labels_from_captions,
    measure_clips,
    score_clips,
    shape_coverage,
    spearman,
)


def draw_clip(
    shape: str = "circle",
    colour: str = "red",
    velocity: tuple[float, float] = (1.0, 0.0),
    centre: tuple[float, float] = (16.0, 16.0),
    area_px: float = 60.0,
    background: float = 0.2,
    num_frames: int = 13,
) -> torch.Tensor:
    """One clip (1, 3, T, 32, 32), drawn without the renderer of `pipelines`."""
    frame = torch.arange(num_frames) - (num_frames - 1) / 2
    path = torch.tensor(centre) + frame[:, None] * torch.tensor(velocity)
    pixel = torch.arange(32) + 0.5
    cover = shape_coverage(
        shape,
        pixel[None, None, :] - path[:, 0, None, None],
        pixel[None, :, None] - path[:, 1, None, None],
        torch.tensor(area_px),
    )
    rgb = torch.tensor(COLOURS[colour])[:, None, None, None]
    return (cover * rgb + (1 - cover) * background)[None]


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("shape", SHAPES)
def test_colour_and_shape_are_read_from_the_pixels(colour: str, shape: str) -> None:
    reading = measure_clips(draw_clip(shape=shape, colour=colour))
    assert list(COLOURS)[reading.colour] == colour
    assert SHAPES[reading.shape] == shape


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("speed", SPEEDS_PX_PER_FRAME.values())
def test_direction_and_speed_are_exact_for_whole_clips(direction: str, speed: float) -> None:
    velocity = tuple(speed * axis for axis in DIRECTIONS[direction])
    reading = measure_clips(draw_clip(velocity=velocity, area_px=60.0))
    assert list(DIRECTIONS)[reading.direction] == direction
    assert float(reading.speed_px_per_frame) == pytest.approx(speed, abs=0.02)


def test_a_shape_that_leaves_the_frame_does_not_look_slower() -> None:
    clip = draw_clip(velocity=(1.6, 0.0), centre=(19.0, 16.0), area_px=110.0)
    assert float(measure_clips(clip).speed_px_per_frame) == pytest.approx(1.6, abs=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_area_is_that_of_the_drawn_shape(shape: str) -> None:
    reading = measure_clips(draw_clip(shape=shape, velocity=(0.0, 0.5), area_px=70.0))
    assert float(reading.area_px) == pytest.approx(70.0, rel=0.08)


def test_readings_survive_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    clips = torch.cat([draw_clip(shape=shape, colour="blue") for shape in SHAPES])
    noisy = (clips + 0.05 * torch.randn(clips.shape, generator=generator)).clamp(0, 1)
    reading = measure_clips(noisy)
    assert reading.shape.tolist() == [0, 1, 2]
    assert reading.speed_px_per_frame.tolist() == pytest.approx([1.0] * 3, abs=0.05)


def test_an_empty_clip_has_no_contrast_and_no_speed() -> None:
    reading = measure_clips(torch.full((1, 3, 13, 32, 32), 0.3))
    assert float(reading.contrast) < 1e-3
    assert float(reading.speed_px_per_frame) == pytest.approx(0.0, abs=1e-3)
    assert torch.isfinite(reading.area_px).all()


def test_captions_are_read_back_into_labels() -> None:
    labels = labels_from_captions(["a red circle moves left quickly", "a white bar moves up"])
    assert [list(COLOURS)[index] for index in labels.colour] == ["red", "white"]
    assert [SHAPES[index] for index in labels.shape] == ["circle", "bar"]
    assert [list(DIRECTIONS)[index] for index in labels.direction] == ["left", "up"]
    assert labels.speed_px_per_frame.tolist() == pytest.approx([1.5, 1.0])


@pytest.mark.parametrize("caption", ["", "a pink circle moves left", "a red circle moves left now"])
def test_a_caption_of_another_world_is_refused(caption: str) -> None:
    with pytest.raises(ShapeError, match="COLOUR SHAPE moves DIRECTION"):
        labels_from_captions([caption])


def test_scores_count_what_is_right() -> None:
    clips = torch.cat([draw_clip(colour="red"), draw_clip(colour="blue", velocity=(0.0, -1.5))])
    labels = labels_from_captions(["a red circle moves right", "a red circle moves up quickly"])
    scores = score_clips(measure_clips(clips), labels)
    assert (scores.colour, scores.shape, scores.direction) == (0.5, 1.0, 1.0)
    assert scores.speed_spearman == pytest.approx(1.0)


def test_spearman_gives_ties_their_average_rank() -> None:
    # Ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: covariance 4.5, variances 4.5 and 5.
    ties = spearman(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert ties == pytest.approx(4.5 / (4.5 * 5.0) ** 0.5)
    assert spearman(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 3.0])) == pytest.approx(-1.0)
    assert spearman(torch.ones(3), torch.tensor([1.0, 2.0, 3.0])) == 0.0


@pytest.mark.parametrize("shape", [(1, 3, 2, 32, 32), (1, 1, 13, 32, 32), (3, 13, 32, 32)])
def test_what_is_no_clip_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="video tensor of shape"):
        measure_clips(torch.zeros(shape))
