"""One door to the embedded worlds: finds the world of captions and reads its clips."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sgmd_core.errors import ShapeError
from sgmd_core.metrics.distributions import ClipMotion
from sgmd_core.worlds import WorldName
from sgmd_core.worlds.open_shapes import (
    OpenReading,
    OpenScores,
    open_answers,
    open_labels,
    read_open_clips,
    score_open_clips,
)
from sgmd_core.worlds.shapes import (
    ClipReading,
    ClipScores,
    clip_answers,
    labels_from_captions,
    measure_clips,
    score_clips,
)

WorldReading = ClipReading | OpenReading
WorldScores = ClipScores | OpenScores

_READERS = {WorldName.SHAPES: measure_clips, WorldName.OPEN: read_open_clips}
_LABELS = {WorldName.SHAPES: labels_from_captions, WorldName.OPEN: open_labels}
READINGS: dict[WorldName, type[WorldReading]] = {
    WorldName.SHAPES: ClipReading,
    WorldName.OPEN: OpenReading,
}
"""Record of what is read in each world."""


def world_of(captions: Sequence[str]) -> WorldName | None:
    """Returns the world that all captions are of, whose pixels can be read exactly, if any.

    Captions that both worlds know are of the first.
    """
    for name, labels in _LABELS.items():
        try:
            labels(captions)
        except ShapeError:
            continue
        return name
    return None


def read_clips(world: WorldName, video: Tensor) -> WorldReading:
    """Reads clips (b, 3, t, h, w) in [0, 1].

    Raises:
        ShapeError: Not a batch of RGB clips of enough frames.
    """
    return _READERS[world](video)


def score_reading(reading: WorldReading, captions: Sequence[str]) -> WorldScores:
    """Compares what clips show with what their captions say.

    Raises:
        ShapeError: A caption is of another world, or there are fewer or more of them than clips.
    """
    if isinstance(reading, ClipReading):
        return score_clips(reading, labels_from_captions(captions))
    return score_open_clips(reading, open_labels(captions))


def reading_answers(
    reading: WorldReading, captions: Sequence[str]
) -> dict[str, Float[Tensor, " b"]]:
    """Figures that have a value for every clip: right or not, and the mean speed."""
    if isinstance(reading, ClipReading):
        return clip_answers(reading, labels_from_captions(captions))
    answers = open_answers(reading, open_labels(captions))
    speeds = torch.where(reading.present, reading.speed_px_per_frame, 0.0).sum(dim=1)
    # Directions are left out: many captions say none.
    return {
        "colour": answers["colour"],
        "shape": answers["shape"],
        "mean_speed_px_per_frame": speeds / reading.count.clamp_min(1),
    }


def motion_of(reading: WorldReading) -> ClipMotion:
    """Motion of all objects, whatever the captions say."""
    if isinstance(reading, ClipReading):
        velocity = reading.velocity_px_per_frame[:, None]
        speed = velocity.square().sum(dim=-1).sqrt()
        return ClipMotion(
            present=torch.ones_like(speed, dtype=torch.bool),
            speed_px_per_frame=speed,
            heading=velocity,
            texture=torch.full_like(speed[:, 0], torch.nan),
        )
    return ClipMotion(reading.present, reading.speed_px_per_frame, reading.heading, reading.texture)
