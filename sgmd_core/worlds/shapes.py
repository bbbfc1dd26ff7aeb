"""Reads a clip of the world `shapes` exactly from its pixels.

A clip shows one coloured shape that moves along a straight line over a plain background, so
colour, shape, direction and speed can be measured without any learned network:

    background  median colour of the clip (the shape covers a few percent of it)
    coverage    distance from the background, 1 inside the shape, soft at its edge
    colour      mean colour of the covered pixels, nearest entry of the palette
    shape       nearest of three drawn templates of the same area at the same centroid
    path        centroid of the coverage in each frame, straight line by least squares

The vocabulary lives here, because a measurement must know what it may find.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgmd_core.errors import ShapeError

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.15, 0.78, 0.20),
    "blue": (0.18, 0.30, 0.95),
    "yellow": (0.95, 0.85, 0.12),
    "purple": (0.75, 0.20, 0.85),
    "white": (0.96, 0.96, 0.96),
}
SHAPES: tuple[str, ...] = ("circle", "bar", "triangle")
BAR_HEIGHT_PER_WIDTH = 2.5
DIRECTIONS: dict[str, tuple[float, float]] = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
}
SPEEDS_PX_PER_FRAME: dict[str, float] = {"slowly": 0.55, "": 1.0, "quickly": 1.5}

# Coverage below this is background noise of the codec or of a decoder, above it is shape.
_COVERAGE_FLOOR = 0.25
_SOLID_COVERAGE = 0.75
# More covered pixels than this on the outermost ring: the shape is cut off by the frame.
_CUT_OFF_PX = 1.0
_MIN_PATH_FRAMES = 4


@dataclass(frozen=True, slots=True)
class ClipLabels:
    """Content of captions: indices into the vocabularies, one entry per clip."""

    colour: Int[Tensor, " b"]
    shape: Int[Tensor, " b"]
    direction: Int[Tensor, " b"]
    speed_px_per_frame: Float[Tensor, " b"]


@dataclass(frozen=True, slots=True)
class ClipReading:
    """Content of pixels; the first four fields compare with `ClipLabels`.

    `velocity_px_per_frame` is (right, down); `area_px` the covered area of an average frame;
    `contrast` the distance of the shape's colour from the background, near 0 when nothing shows.
    """

    colour: Int[Tensor, " b"]
    shape: Int[Tensor, " b"]
    direction: Int[Tensor, " b"]
    speed_px_per_frame: Float[Tensor, " b"]
    velocity_px_per_frame: Float[Tensor, "b 2"]
    area_px: Float[Tensor, " b"]
    contrast: Float[Tensor, " b"]


@dataclass(frozen=True, slots=True)
class ClipScores:
    """Share of clips that show what their captions say, and the rank correlation of speeds."""

    colour: float
    shape: float
    direction: float
    speed_spearman: float
    mean_speed_px_per_frame: float
    num_clips: int


def shape_coverage(shape: str, dx: Tensor, dy: Tensor, area_px: Tensor) -> Tensor:
    """Share of each pixel that a shape covers, antialiased over one pixel.

        coverage = clamp(1/2 - signed_distance, 0, 1)

    Args:
        shape: One of `SHAPES`; the bar stands upright, the triangle is
            equilateral and points up.
        dx: Horizontal pixel offsets from the shape's centroid, to the right.
        dy: Vertical pixel offsets from the shape's centroid, downwards; broadcasts with `dx`.
        area_px: Area of the shape; broadcasts with `dx`.

    Returns:
        Coverage in [0, 1], broadcast shape of the arguments.
    """
    if shape == "circle":
        distance = torch.hypot(dx, dy) - (area_px / math.pi).sqrt()
    elif shape == "bar":
        width = (area_px / BAR_HEIGHT_PER_WIDTH).sqrt()
        distance = torch.maximum(dx.abs() - width / 2, dy.abs() - BAR_HEIGHT_PER_WIDTH * width / 2)
    elif shape == "triangle":
        # Distance of each side from the centroid: a third of the height.
        inradius = (area_px / (3 * math.sqrt(3))).sqrt()
        slanted = dx.abs() * (math.sqrt(3) / 2) - dy / 2
        distance = torch.maximum(slanted, dy) - inradius
    else:
        raise ShapeError("drawing a shape", f"the name {shape!r}", f"one of {SHAPES}")
    return (0.5 - distance).clamp(0, 1)


def labels_from_captions(captions: Sequence[str]) -> ClipLabels:
    """Read "a red circle moves left quickly" back into labels.

    Raises:
        ShapeError: a caption is not of this world.
    """
    rows: list[tuple[int, int, int, float]] = []
    for caption in captions:
        words = caption.split()
        speed = words[5] if len(words) == 6 else ""
        known = (
            len(words) in (5, 6)
            and words[0] == "a"
            and words[1] in COLOURS
            and words[2] in SHAPES
            and words[3] == "moves"
            and words[4] in DIRECTIONS
            and speed in SPEEDS_PX_PER_FRAME
        )
        if not known:
            raise ShapeError(
                "reading the labels of a caption",
                f"{caption!r}",
                "'a COLOUR SHAPE moves DIRECTION [slowly|quickly]' of the world `shapes`",
            )
        rows.append(
            (
                list(COLOURS).index(words[1]),
                SHAPES.index(words[2]),
                list(DIRECTIONS).index(words[4]),
                SPEEDS_PX_PER_FRAME[speed],
            )
        )
    return ClipLabels(
        colour=torch.tensor([row[0] for row in rows], dtype=torch.long),
        shape=torch.tensor([row[1] for row in rows], dtype=torch.long),
        direction=torch.tensor([row[2] for row in rows], dtype=torch.long),
        speed_px_per_frame=torch.tensor([row[3] for row in rows], dtype=torch.float32),
    )


def measure_clips(video: Tensor) -> ClipReading:
    """Read colour, shape, direction and speed of every clip from its pixels.

    Args:
        video: Clips (b, 3, t, h, w) in [0, 1], at least four frames.

    Returns:
        One reading per clip; speeds in pixels per frame along the direction that was read.

    Raises:
        ShapeError: not a batch of RGB clips of at least four frames.
    """
    if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] < _MIN_PATH_FRAMES:
        raise ShapeError(
            "measuring clips",
            f"a video tensor of shape {tuple(video.shape)}",
            f"(batch, 3, frames >= {_MIN_PATH_FRAMES}, height, width)",
        )
    video = video.float()
    coverage, contrast = _coverage(video)
    colour = _nearest_colour(video, coverage)
    area = coverage.sum(dim=(2, 3))
    centroid = _centroids(coverage, area)
    whole = _frames_shown_whole(coverage, area)
    velocity = _line_slope(centroid, whole * area)
    axes = torch.tensor(list(DIRECTIONS.values()), dtype=velocity.dtype, device=velocity.device)
    along = velocity @ axes.T
    mean_area = (area * whole).sum(dim=1) / whole.sum(dim=1)
    return ClipReading(
        colour=colour,
        shape=_nearest_template(coverage, centroid, area, whole),
        direction=along.argmax(dim=1),
        speed_px_per_frame=along.amax(dim=1),
        velocity_px_per_frame=velocity,
        area_px=mean_area,
        contrast=contrast,
    )


def score_clips(reading: ClipReading, labels: ClipLabels) -> ClipScores:
    """Compare what clips show with what their captions say.

    Raises:
        ShapeError: another number of clips than of captions.
    """
    if reading.colour.shape != labels.colour.shape:
        raise ShapeError(
            "scoring clips against captions",
            f"{len(reading.colour)} clips and {len(labels.colour)} captions",
            "one caption per clip",
        )
    return ClipScores(
        colour=_share(reading.colour, labels.colour),
        shape=_share(reading.shape, labels.shape),
        direction=_share(reading.direction, labels.direction),
        speed_spearman=spearman(reading.speed_px_per_frame, labels.speed_px_per_frame),
        mean_speed_px_per_frame=float(reading.speed_px_per_frame.mean()),
        num_clips=len(labels.colour),
    )


def clip_answers(reading: ClipReading, labels: ClipLabels) -> dict[str, Float[Tensor, " b"]]:
    """Returns the values that `score_clips` averages, clip by clip.

    Returns:
        `colour`, `shape`, `direction`: 1 where the clip shows what its caption says, else 0;
        `mean_speed_px_per_frame`: the measured speed.
    """
    right = {
        "colour": reading.colour.cpu() == labels.colour.cpu(),
        "shape": reading.shape.cpu() == labels.shape.cpu(),
        "direction": reading.direction.cpu() == labels.direction.cpu(),
    }
    answers = {name: answer.float() for name, answer in right.items()}
    return answers | {"mean_speed_px_per_frame": reading.speed_px_per_frame.cpu()}


def spearman(first: Float[Tensor, " n"], second: Float[Tensor, " n"]) -> float:
    """Rank correlation of two series; tied values share their average rank.

    Returns:
        Correlation in [-1, 1]; 0 when either series is constant.
    """
    ranks = torch.stack([_average_ranks(first), _average_ranks(second)])
    centred = ranks - ranks.mean(dim=1, keepdim=True)
    norm = centred.square().sum(dim=1).sqrt().prod()
    return float(centred.prod(dim=0).sum() / norm) if norm > 0 else 0.0


def _share(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu() == expected.cpu()).double().mean())


def _average_ranks(values: Tensor) -> Tensor:
    values = values.detach().cpu()
    smaller = (values[None, :] < values[:, None]).double().sum(dim=1)
    equal = (values[None, :] == values[:, None]).double().sum(dim=1)
    return smaller + (equal - 1) / 2


def _coverage(video: Tensor) -> tuple[Tensor, Tensor]:
    """Soft foreground (B, T, H, W) in [0, 1], and each clip's contrast (B,)."""
    background = video.flatten(2).median(dim=2).values[:, :, None, None, None]
    distance = (video - background).square().sum(dim=1).sqrt()
    num_pixels = distance[0].numel()
    # The shape covers more than 1 % of the clip, so this mean is taken inside it.
    contrast = distance.flatten(1).topk(max(1, num_pixels // 100), dim=1).values.mean(dim=1)
    relative = distance / contrast.clamp_min(1e-6)[:, None, None, None]
    coverage = (relative - _COVERAGE_FLOOR) / (1 - 2 * _COVERAGE_FLOOR)
    return coverage.clamp(0, 1), contrast


def _nearest_colour(video: Tensor, coverage: Tensor) -> Tensor:
    solid = (coverage > _SOLID_COVERAGE).to(video.dtype)[:, None]
    mean = (video * solid).sum(dim=(2, 3, 4)) / solid.sum(dim=(2, 3, 4)).clamp_min(1)
    palette = torch.tensor(list(COLOURS.values()), dtype=video.dtype, device=video.device)
    return torch.cdist(mean, palette).argmin(dim=1)


def _pixel_centres(coverage: Tensor) -> tuple[Tensor, Tensor]:
    height, width = coverage.shape[-2:]
    x = torch.arange(width, dtype=coverage.dtype, device=coverage.device)
    y = torch.arange(height, dtype=coverage.dtype, device=coverage.device)
    return x + 0.5, y + 0.5


def _centroids(coverage: Tensor, area: Tensor) -> Tensor:
    x, y = _pixel_centres(coverage)
    mass = area.clamp_min(1e-6)
    return torch.stack([(coverage.sum(dim=2) @ x) / mass, (coverage.sum(dim=3) @ y) / mass], dim=-1)


def _frames_shown_whole(coverage: Tensor, area: Tensor) -> Tensor:
    """1 for frames whose shape lies inside the frame, 0 for cut-off ones (B, T).

    A cut-off shape has its centroid too far inside, which would make fast clips look slow.
    Where too few whole frames remain, all are used.
    """
    ring = coverage.sum(dim=(2, 3)) - coverage[:, :, 1:-1, 1:-1].sum(dim=(2, 3))
    whole = ((ring < _CUT_OFF_PX) & (area > 1)).to(coverage.dtype)
    enough = whole.sum(dim=1, keepdim=True) >= _MIN_PATH_FRAMES
    return torch.where(enough, whole, torch.ones_like(whole))


def _line_slope(centroid: Tensor, weight: Tensor) -> Tensor:
    """Weighted least-squares slope of (B, T, 2) over the frame index, in pixels per frame."""
    weight = weight / weight.sum(dim=1, keepdim=True).clamp_min(1e-6)
    frame = torch.arange(weight.shape[1], dtype=weight.dtype, device=weight.device)
    centred = frame - (weight * frame).sum(dim=1, keepdim=True)
    weighted = (weight * centred)[..., None]
    variance = (weight * centred.square()).sum(dim=1, keepdim=True).clamp_min(1e-6)
    return (weighted * centroid).sum(dim=1) / variance


def _nearest_template(coverage: Tensor, centroid: Tensor, area: Tensor, whole: Tensor) -> Tensor:
    x, y = _pixel_centres(coverage)
    dx = x[None, None, None, :] - centroid[..., 0, None, None]
    dy = y[None, None, :, None] - centroid[..., 1, None, None]
    errors: list[Tensor] = []
    for shape in SHAPES:
        template = shape_coverage(shape, dx, dy, area[..., None, None])
        errors.append(((template - coverage).square().sum(dim=(2, 3)) * whole).sum(dim=1))
    return torch.stack(errors, dim=1).argmin(dim=1)
