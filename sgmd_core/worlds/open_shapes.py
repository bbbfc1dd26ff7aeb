"""Reads a clip of the world `open` exactly from its pixels.

A clip shows one to three coloured, striped objects that rest, move or curve, and bounce off the
borders, over a grey texture. No two objects of a clip share a colour, and only objects are
coloured, so hue alone tells them apart and the textures do not disturb the reading:

    chroma      colour less its own mean, in the plane of hues
    coverage    chroma along the nearest hue of the palette, 1 inside an object
    area, path  sum and centroid of a hue's coverage in each frame
    speed       median length of the steps of the path: a bounce shortens few of them
    direction   slope of the path over its first frames, before the first bounce
    texture     spread of brightness over what no object covers

The vocabulary lives here, because a measurement must know what it may find.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sgmd_core.errors import ShapeError
from sgmd_core.metrics.distributions import STILL_PX_PER_FRAME
from sgmd_core.worlds.records import join_records
from sgmd_core.worlds.shapes import DIRECTIONS, SHAPES, shape_coverage

HUES: dict[str, tuple[float, float, float]] = {
    "red": (0.92, 0.14, 0.14),
    "yellow": (0.86, 0.84, 0.12),
    "green": (0.14, 0.80, 0.16),
    "cyan": (0.12, 0.80, 0.84),
    "blue": (0.20, 0.24, 0.95),
    "purple": (0.84, 0.18, 0.84),
}
"""Colours of objects, about a sixth of a turn of hue apart."""
VERBS: tuple[str, ...] = ("", "rests", "moves", "curves")
"""Motion that a caption may state; "" leaves it open, and "moves" leaves the path open."""
PACES: tuple[str, ...] = ("", "slowly", "quickly")
SLOW_PX_PER_FRAME = 0.6
QUICK_PX_PER_FRAME = 1.2
HEADING_FRAMES = 5
"""Frames at the start in which no object bounces; `direction` is read over them."""

# Stripes dim an object to two thirds, so the reference lies between.
_REFERENCE_SHADE = 0.8
_COVERAGE_FLOOR, _COVERAGE_RANGE = 0.2, 0.6
_PRESENT_AREA_PX = 22.0
# A frame in which less of an object shows, because another one covers it, does not place it.
_WHOLE_SHARE = 0.8
_MIN_STEPS = 3
_MAX_LAG = 3
_CHUNK_CLIPS = 32


@dataclass(frozen=True, slots=True)
class OpenLabels:
    """Contents of captions about the first object: vocabulary indices, -1 where unsaid.

    Attributes:
        colour: Index into `HUES`; always said, so that the first object can be found.
        shape: Index into `SHAPES`; always said.
        verb: Index into `VERBS`, 0 where the motion is open.
        direction: Index into `DIRECTIONS`.
        pace: Index into `PACES`, 0 where the speed is open.
        least_count: Objects that the caption names; there may be more.
    """

    colour: Int[Tensor, " b"]
    shape: Int[Tensor, " b"]
    verb: Int[Tensor, " b"]
    direction: Int[Tensor, " b"]
    pace: Int[Tensor, " b"]
    least_count: Int[Tensor, " b"]


@dataclass(frozen=True, slots=True)
class OpenReading:
    """Contents of clips by hue; an entry of a hue that is absent means nothing.

    Attributes:
        area_px: Median covered area over the frames.
        shape: Nearest template, an index into `SHAPES`.
        path: Centroid (right, down) in each frame.
        heading: (right, down), px a frame over the first frames.
        speed_px_per_frame: Median length of a step, over one to three frames.
        texture: Standard deviation of the brightness of the background, one entry a clip.
    """

    area_px: Float[Tensor, "b 6"]
    shape: Int[Tensor, "b 6"]
    path: Float[Tensor, "b 6 t 2"]
    heading: Float[Tensor, "b 6 2"]
    speed_px_per_frame: Float[Tensor, "b 6"]
    texture: Float[Tensor, " b"]

    @property
    def present(self) -> Bool[Tensor, "b 6"]:
        """Hues of which an object shows."""
        return self.area_px > _PRESENT_AREA_PX

    @property
    def count(self) -> Int[Tensor, " b"]:
        """Objects of each clip."""
        return self.present.sum(dim=1)


@dataclass(frozen=True, slots=True)
class OpenScores:
    """Share of clips that show what their captions say, among those whose captions say it.

    Attributes:
        colour: The first object's colour shows.
        shape: It has the shape.
        direction: It moves within 45 degrees of the direction.
        pace: It is as slow or as quick as said.
        verb: It rests or moves as said; a curve counts as a motion.
        count: At least as many objects as the caption names show, and at most three.
        mean_speed_px_per_frame: Over all objects.
        num_clips: Clips in all.
    """

    colour: float
    shape: float
    direction: float
    pace: float
    verb: float
    count: float
    mean_speed_px_per_frame: float
    num_clips: int


def open_labels(captions: Sequence[str]) -> OpenLabels:
    """Reads "a red circle moves left quickly and a blue bar" back into labels.

    Raises:
        ShapeError: A caption is not of this world.
    """
    rows = [_label_row(caption) for caption in captions]
    columns = torch.tensor(rows, dtype=torch.long).reshape(len(rows), 6).T
    return OpenLabels(*columns)


def read_open_clips(video: Tensor) -> OpenReading:
    """Reads the objects and the texture of every clip from its pixels.

    Args:
        video: Clips (b, 3, t, h, w) in [0, 1], at least `HEADING_FRAMES` frames.

    Raises:
        ShapeError: Not a batch of RGB clips of so many frames.
    """
    if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] < HEADING_FRAMES:
        raise ShapeError(
            "reading clips of the world `open`",
            f"a video tensor of shape {tuple(video.shape)}",
            f"(batch, 3, frames >= {HEADING_FRAMES}, height, width)",
        )
    return join_records([_read(part.float()) for part in torch.split(video, _CHUNK_CLIPS)])


def open_answers(reading: OpenReading, labels: OpenLabels) -> dict[str, Float[Tensor, " b"]]:
    """1 where a clip shows what its caption says, 0 where not, NaN where the caption is silent."""
    clip = torch.arange(len(labels.colour))
    own = {
        name: getattr(reading, name)[clip, labels.colour]
        for name in ("shape", "heading", "speed_px_per_frame")
    }
    shows = reading.present[clip, labels.colour]
    speed = own["speed_px_per_frame"]
    axes = torch.tensor(list(DIRECTIONS.values()))
    moves = speed > STILL_PX_PER_FRAME
    verbs = torch.stack([moves, ~moves, moves, moves])
    paces = torch.stack([moves, speed < _BETWEEN_PACES, speed > _BETWEEN_PACES])
    objects = reading.count
    right = {
        "shape": own["shape"] == labels.shape,
        "direction": (own["heading"] @ axes.T).argmax(dim=1) == labels.direction,
        "pace": paces[labels.pace, clip],
        "verb": verbs[labels.verb, clip],
    }
    said = {
        "shape": labels.shape >= 0,
        "direction": labels.direction >= 0,
        "pace": labels.pace > 0,
        "verb": labels.verb > 0,
    }
    answers = {
        name: torch.where(said[name], (right[name] & shows).float(), math.nan) for name in right
    }
    counted = ((objects >= labels.least_count) & (objects <= 3)).float()
    return {"colour": shows.float(), **answers, "count": counted}


def score_open_clips(reading: OpenReading, labels: OpenLabels) -> OpenScores:
    """Compares what clips show with what their captions say.

    Raises:
        ShapeError: Another number of clips than of captions.
    """
    if len(reading.texture) != len(labels.colour):
        raise ShapeError(
            "scoring clips against captions",
            f"{len(reading.texture)} clips and {len(labels.colour)} captions",
            "one caption per clip",
        )
    shares = {
        name: float(values.nanmean()) for name, values in open_answers(reading, labels).items()
    }
    speeds = reading.speed_px_per_frame[reading.present]
    mean = float(speeds.mean()) if len(speeds) else 0.0
    return OpenScores(**shares, mean_speed_px_per_frame=mean, num_clips=len(labels.colour))


_BETWEEN_PACES = (SLOW_PX_PER_FRAME + QUICK_PX_PER_FRAME) / 2


def _label_row(caption: str) -> tuple[int, ...]:
    first, *others = caption.split(" and ")
    words = first.split()
    rest = words[3:]
    verb = rest.pop(0) if rest else ""
    direction = rest.pop(0) if rest and rest[0] in DIRECTIONS else ""
    pace = rest.pop(0) if rest and rest[0] in PACES else ""
    known = (
        not rest
        and verb in VERBS
        and (verb in VERBS[2:] or not (direction or pace))
        and all(_names_object(part.split()) for part in (" ".join(words[:3]), *others))
    )
    if not known:
        raise ShapeError(
            "reading the labels of a caption",
            f"{caption!r}",
            "'a COLOUR SHAPE [rests | moves | curves [DIRECTION] [slowly | quickly]] [and a COLOUR"
            " SHAPE ...]' of the world `open`",
        )
    return (
        list(HUES).index(words[1]),
        SHAPES.index(words[2]),
        VERBS.index(verb),
        list(DIRECTIONS).index(direction) if direction else -1,
        PACES.index(pace),
        1 + len(others),
    )


def _names_object(words: Sequence[str]) -> bool:
    return len(words) == 3 and words[0] == "a" and words[1] in HUES and words[2] in SHAPES


def _read(video: Tensor) -> OpenReading:
    coverage = _hue_coverage(video)
    area = coverage.sum(dim=(3, 4))
    pixel = torch.arange(video.shape[-1], dtype=video.dtype, device=video.device) + 0.5
    line = torch.arange(video.shape[-2], dtype=video.dtype, device=video.device) + 0.5
    mass = area.clamp_min(1e-6)
    path = torch.stack(
        [coverage.sum(dim=3) @ pixel / mass, coverage.sum(dim=4) @ line / mass], dim=-1
    )
    whole = area >= _WHOLE_SHARE * area.amax(dim=2, keepdim=True)
    return OpenReading(
        area_px=area.median(dim=2).values,
        shape=_nearest_shape(coverage, path, area, whole),
        path=path,
        heading=_first_slope(path, whole),
        speed_px_per_frame=_speed(path, whole),
        texture=_background_spread(video, coverage),
    )


def _hue_coverage(video: Tensor) -> Tensor:
    """Coverage (b, 6, t, h, w) of each hue, soft at the edges."""
    chroma = video - video.mean(dim=1, keepdim=True)
    palette = torch.tensor(list(HUES.values()), dtype=video.dtype, device=video.device)
    palette = palette - palette.mean(dim=1, keepdim=True)
    strength = palette.square().sum(dim=1).sqrt()
    along = torch.einsum("bcthw,kc->bkthw", chroma, palette / strength[:, None])
    nearest = torch.zeros_like(along).scatter_(1, along.argmax(dim=1, keepdim=True), 1.0)
    relative = along / (_REFERENCE_SHADE * strength)[:, None, None, None]
    return ((relative - _COVERAGE_FLOOR) / _COVERAGE_RANGE).clamp(0, 1) * nearest


def _first_slope(path: Tensor, whole: Tensor) -> Tensor:
    """Least-squares slope (b, 6, 2) over the first frames, over those that show it whole."""
    points, kept = path[:, :, :HEADING_FRAMES], whole[:, :, :HEADING_FRAMES]
    kept = torch.where(kept.sum(dim=2, keepdim=True) >= _MIN_STEPS, kept, torch.ones_like(kept))
    weight = kept.to(path.dtype) / kept.sum(dim=2, keepdim=True)
    frame = torch.arange(HEADING_FRAMES, dtype=path.dtype, device=path.device)
    centred = frame - (weight * frame).sum(dim=2, keepdim=True)
    weighted = (weight * centred)[..., None]
    return (weighted * points).sum(dim=2) / (weight * centred.square()).sum(dim=2)[..., None]


def _speed(path: Tensor, whole: Tensor) -> Tensor:
    """Largest of the medians of steps over one to three frames.

    Longer steps are the more exact for slow objects, and the shorter for those that bounce; a
    bounce or a curve only makes steps shorter.
    """
    medians: list[Tensor] = []
    for lag in range(1, _MAX_LAG + 1):
        steps = (path[:, :, lag:] - path[:, :, :-lag]).square().sum(dim=-1).sqrt() / lag
        both = whole[:, :, lag:] & whole[:, :, :-lag]
        enough = both.sum(dim=2, keepdim=True) >= _MIN_STEPS
        medians.append(_masked_median(steps, torch.where(enough, both, torch.ones_like(both))))
    return torch.stack(medians).amax(dim=0)


def _masked_median(values: Tensor, kept: Tensor) -> Tensor:
    """Median over the last axis of the kept values; 0 where there are none."""
    return values.masked_fill(~kept, math.nan).nanmedian(dim=-1).values.nan_to_num(0.0)


def _background_spread(video: Tensor, coverage: Tensor) -> Tensor:
    bare = (coverage.sum(dim=1) == 0).to(video.dtype)
    brightness = video.mean(dim=1)
    share = bare.sum(dim=(1, 2, 3)).clamp_min(1)
    mean = (brightness * bare).sum(dim=(1, 2, 3)) / share
    deviation = (brightness - mean[:, None, None, None]).square() * bare
    return (deviation.sum(dim=(1, 2, 3)) / share).sqrt()


def _nearest_shape(coverage: Tensor, path: Tensor, area: Tensor, whole: Tensor) -> Tensor:
    height, width = coverage.shape[-2:]
    x = torch.arange(width, dtype=coverage.dtype, device=coverage.device) + 0.5
    y = torch.arange(height, dtype=coverage.dtype, device=coverage.device) + 0.5
    dx = x - path[..., 0, None, None]
    dy = y[:, None] - path[..., 1, None, None]
    errors = [
        (shape_coverage(shape, dx, dy, area[..., None, None]) - coverage).square().sum(dim=(3, 4))
        for shape in SHAPES
    ]
    return torch.stack([(error * whole).sum(dim=2) for error in errors], dim=-1).argmin(dim=-1)
