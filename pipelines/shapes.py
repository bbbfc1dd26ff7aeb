"""The embedded world: short captioned clips of one moving shape, as Parquet shards of mp4 files.

A caption fixes colour, shape, direction and speed. Left open are size, background, path offset
and speed jitter, so that one caption has many right answers. Paths are centred on the frame up to
a small offset: a network with relative positions cannot learn absolute places.

Captions come from two disjoint sets: one sixth of the combinations is held out from training,
chosen so that every single word and every pair of words still occurs in training.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from torch import Tensor

from cluster.lease import hold
from cluster.paths import require_writable
from pipelines.data.shards.filesystem import open_folder
from pipelines.data.shards.index import Shard
from pipelines.data.shards.indexing import index_folder
from pipelines.data.shards.shard_writing import write_file
from pipelines.media.video import Pixels, encode_mp4
from sgmd_core.errors import ConfigError
from sgmd_core.worlds import WorldName
from sgmd_core.worlds.readings import WorldScores, read_clips, score_reading
from sgmd_core.worlds.shapes import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SPEEDS_PX_PER_FRAME,
    shape_coverage,
)

FRAME_PX = 32
NUM_FRAMES = 13
FPS = 8
MAX_OFFSET_PX = 8.0
MAX_REACH_PX = 12.0
SPEED_JITTER = 0.08
AREA_RANGE_PX = (65.0, 120.0)
BACKGROUND_RANGE = (0.10, 0.40)
BACKGROUND_TINT = 0.08
_HELD_OUT_PERIOD = 6
_GROUP_CLIPS = 128
_MAX_CLIPS = 10**7

SHARD_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("caption", pa.string()),
        ("video", pa.binary()),
        ("fps", pa.int32()),
    ]
)


class ClipSplit(StrEnum):
    """Set of captions that a clip is drawn from; the two sets share no caption."""

    TRAIN = "train"
    HELD_OUT = "held_out"


@dataclass(frozen=True, slots=True)
class EmbeddedWorld:
    """A world whose clips are rendered here.

    Attributes:
        name: Name on the command line; shards and clips are named after it.
        draw: Renders the clips of a seed, of indices and of a split, as `render_batch` does.
        captions: Draws their captions alone.
    """

    name: WorldName
    draw: Callable[[int, Sequence[int], ClipSplit], tuple[NDArray[np.uint8], list[str]]]
    captions: Callable[[int, Sequence[int], ClipSplit], list[str]]

    def score(self, video: Tensor, texts: Sequence[str]) -> WorldScores:
        """Compares videos (b, 3, t, h, w) in [0, 1] with captions of this world."""
        return score_reading(read_clips(self.name, video), texts)


@dataclass(frozen=True, slots=True)
class ClipSpec:
    """Everything that fixes one clip; the first four fields are what its caption says.

    Attributes:
        colour: Key of `COLOURS`.
        shape: Entry of `SHAPES`.
        direction: Key of `DIRECTIONS`.
        speed_word: Key of `SPEEDS_PX_PER_FRAME`; empty for the medium speed.
        speed_px_per_frame: True speed, jitter included.
        area_px: Area of the shape in square pixels.
        centre_px: Place (right, down) of the shape in the middle frame.
        background: RGB in [0, 1].
    """

    colour: str
    shape: str
    direction: str
    speed_word: str
    speed_px_per_frame: float
    area_px: float
    centre_px: tuple[float, float]
    background: tuple[float, float, float]


def captions(split: ClipSplit) -> list[str]:
    """All captions of a split, in a fixed order."""
    return [_caption_text(*words) for words in _combinations(split)]


def caption(spec: ClipSpec) -> str:
    """The caption of a clip, for example "a red circle moves left quickly"."""
    return _caption_text(spec.colour, spec.shape, spec.direction, spec.speed_word)


def sample_spec(seed: int, index: int, split: ClipSplit = ClipSplit.TRAIN) -> ClipSpec:
    """Draw clip number `index`; depends on the arguments alone, not on earlier draws."""
    words = _combinations(split)
    # Counter-based: any clip can be drawn alone, on any machine, in any order.
    split_key = list(ClipSplit).index(split)
    draw = np.random.Generator(np.random.Philox(key=[seed, 2 * index + split_key]))
    colour, shape, direction, speed_word = words[int(draw.integers(len(words)))]
    jitter = 1 + draw.uniform(-SPEED_JITTER, SPEED_JITTER)
    speed = SPEEDS_PX_PER_FRAME[speed_word] * jitter
    # Centres stay within the reach at both ends of the path, so that most of a shape is seen.
    half_path = np.abs(DIRECTIONS[direction]) * speed * (NUM_FRAMES - 1) / 2
    bound = np.minimum(MAX_OFFSET_PX, MAX_REACH_PX - half_path)
    offset = draw.uniform(-bound, bound)
    shade = draw.uniform(*BACKGROUND_RANGE)
    tint = draw.uniform(-BACKGROUND_TINT, BACKGROUND_TINT, size=3)
    return ClipSpec(
        colour=colour,
        shape=shape,
        direction=direction,
        speed_word=speed_word,
        speed_px_per_frame=float(speed),
        area_px=float(draw.uniform(*AREA_RANGE_PX)),
        centre_px=(float(FRAME_PX / 2 + offset[0]), float(FRAME_PX / 2 + offset[1])),
        background=(float(shade + tint[0]), float(shade + tint[1]), float(shade + tint[2])),
    )


def render(spec: ClipSpec) -> Pixels:
    """Draw a clip, antialiased.

    Returns:
        Pixels (frames, height, width, 3).
    """
    step = torch.tensor(DIRECTIONS[spec.direction]) * spec.speed_px_per_frame
    frame = torch.arange(NUM_FRAMES) - (NUM_FRAMES - 1) / 2
    path = torch.tensor(spec.centre_px) + frame[:, None] * step
    pixel = torch.arange(FRAME_PX) + 0.5
    dx = pixel[None, None, :] - path[:, 0, None, None]
    dy = pixel[None, :, None] - path[:, 1, None, None]
    cover = shape_coverage(spec.shape, dx, dy, torch.tensor(spec.area_px))[..., None]
    image = cover * torch.tensor(COLOURS[spec.colour])
    image = image + (1 - cover) * torch.tensor(spec.background)
    return (image * 255).round().to(torch.uint8).numpy()


def write_shards(
    dst: str,
    *,
    num_clips: int,
    shard_size: int,
    seed: int,
    split: ClipSplit = ClipSplit.TRAIN,
    first_index: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    world: EmbeddedWorld | None = None,
) -> list[str]:
    """Render clips and write them as Parquet shards of mp4 files.

    Args:
        dst: Folder, local or `s3://bucket/prefix`.
        num_clips: How many clips.
        shard_size: Clips in one shard file.
        seed: Seed of the specs.
        split: Which captions are used.
        first_index: Index of the first clip; other ranges hold other clips.
        on_progress: Called after every shard with (clips done, clips in all).
        world: The world that the clips are of; None takes this one.

    Returns:
        Addresses of the shards.

    Raises:
        ConfigError: a count is not positive.
        LeaseError: Another process writes shards there.
    """
    require_counts(num_clips=num_clips, shard_size=shard_size)
    world = world or SHAPES_WORLD
    filesystem, root = open_folder(dst)
    # On an object store this might create a bucket, which is not ours to decide.
    if isinstance(filesystem, LocalFileSystem):
        require_writable(root, "DST")
        filesystem.makedirs(root, exist_ok=True)
    with hold(dst, f"sgmd shapes ({split})", filesystem) as lease:
        addresses: list[str] = []
        written: list[Shard] = []
        for start in range(0, num_clips, shard_size):
            stop = min(start + shard_size, num_clips)
            indices = range(first_index + start, first_index + stop)
            name = f"{world.name}-{seed:04d}-{split}-{indices.start:07d}.parquet"
            buffer = io.BytesIO()
            table = _shard_table(world, seed, indices, split)
            pq.write_table(table, buffer, row_group_size=_GROUP_CLIPS)
            lease.check()
            write_file(filesystem, f"{root}/{name}", buffer.getvalue())
            addresses.append(filesystem.unstrip_protocol(f"{root}/{name}"))
            starts = range(0, len(indices), _GROUP_CLIPS)
            rows = tuple(min(_GROUP_CLIPS, len(indices) - first) for first in starts)
            written.append(Shard(name, buffer.getbuffer().nbytes, rows))
            on_progress(stop, num_clips)
        index_folder(filesystem, root, written)
    return addresses


def require_counts(**counts: int) -> None:
    """Checks numbers of clips.

    Raises:
        ConfigError: One is not positive, or larger than the index of a clip may be.
    """
    wrong = [f"{name}={count}" for name, count in counts.items() if not 1 <= count <= _MAX_CLIPS]
    if wrong:
        raise ConfigError(
            "writing shards of the world `shapes`",
            ", ".join(wrong),
            f"from 1 to {_MAX_CLIPS}, as the names of the shards count clips with seven digits",
            "Correct the number",
        )


def render_batch(
    seed: int, indices: Sequence[int], split: ClipSplit
) -> tuple[NDArray[np.uint8], list[str]]:
    """Draw several clips at once: pixels (clips, frames, height, width, 3) and their captions."""
    specs = [sample_spec(seed, index, split) for index in indices]
    return np.stack([render(spec) for spec in specs]), [caption(spec) for spec in specs]


SHAPES_WORLD = EmbeddedWorld(
    name=WorldName.SHAPES,
    draw=render_batch,
    captions=lambda seed, indices, split: [
        caption(sample_spec(seed, index, split)) for index in indices
    ],
)


def _shard_table(world: EmbeddedWorld, seed: int, indices: range, split: ClipSplit) -> pa.Table:
    pixels, texts = world.draw(seed, indices, split)
    return pa.table(
        {
            "sample_id": [f"{world.name}-{seed}-{split}-{index:07d}" for index in indices],
            "caption": texts,
            "video": [encode_mp4(clip, FPS) for clip in pixels],
            "fps": [FPS] * len(texts),
        },
        schema=SHARD_SCHEMA,
    )


def _caption_text(colour: str, shape: str, direction: str, speed_word: str) -> str:
    return f"a {colour} {shape} moves {direction} {speed_word}".rstrip()


@cache
def _combinations(split: ClipSplit) -> tuple[tuple[str, str, str, str], ...]:
    held_out = split is ClipSplit.HELD_OUT
    return tuple(
        (colour, shape, direction, speed_word)
        for i, colour in enumerate(COLOURS)
        for j, shape in enumerate(SHAPES)
        for k, direction in enumerate(DIRECTIONS)
        for m, speed_word in enumerate(SPEEDS_PX_PER_FRAME)
        if ((i + 2 * j + k + 2 * m) % _HELD_OUT_PERIOD == 0) is held_out
    )
