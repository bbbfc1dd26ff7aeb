"""The second embedded world, `open`: clips whose motion and detail captions leave open.

One to three striped objects rest, move or curve, and bounce off the borders, over a grey texture.
A caption names colour and shape of the first object and, in part, the way it moves; it may or may
not name the others. Speeds are broad and skewed, directions fill the circle, and nothing is said
of place, size, stripes and texture, so that the clips of a caption are a distribution.

Every clip reads its own row of uniform numbers, counted by (seed, split, index); all else is
arithmetic on whole columns, so clips are drawn and rendered many at a time.

Captions come from two disjoint sets: for each shape, verb, direction and pace, one colour of six
is held out from training.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.shapes import FRAME_PX, NUM_FRAMES, ClipSplit, EmbeddedWorld
from sgmd_core.worlds import WorldName
from sgmd_core.worlds.open_shapes import (
    HEADING_FRAMES,
    HUES,
    PACES,
    QUICK_PX_PER_FRAME,
    SLOW_PX_PER_FRAME,
    VERBS,
)
from sgmd_core.worlds.shapes import BAR_HEIGHT_PER_WIDTH, DIRECTIONS, SHAPES

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Pixels = NDArray[np.uint8]

MAX_OBJECTS = 3
_RENDER_CHUNK = 64
_RESTS, _MOVES, _CURVES = (VERBS.index(verb) for verb in ("rests", "moves", "curves"))
_SLOWLY, _QUICKLY = (PACES.index(pace) for pace in ("slowly", "quickly"))


@dataclass(frozen=True, slots=True)
class OpenWorld:
    """Parameters of the world.

    Attributes:
        count_shares: Share of clips with one, two and three objects.
        still_share: Share of objects that rest.
        curve_share: Share of the others that curve.
        median_speed: Median of the log-normal speeds, px a frame.
        speed_spread: Standard deviation of their logarithm.
        speed_range: Bounds of the speeds, px a frame.
        turn_range: Turn of a curve, radians a frame, to either side.
        area_range_px: Area of an object.
        margin_px: Distance from the border at which the centre of an object bounces.
        stripe_range_px: Wavelength of the stripes.
        stripe_depth: Most that stripes dim an object, as a share.
        shade_range: Mean brightness of the background.
        tint: Most that a channel of the background departs from grey.
        contrast_range: Standard deviation of the texture, log-uniform.
        texture_cells: Independent values of the texture along each side of the frame.
        says_motion: Probability that the caption says something of the first object's motion.
        says_path: Probability, then, that it says of a curve that it is one.
        says_direction: Probability, then, that it says the direction of a moving object.
        says_pace: Probability, then, that it says that a slow or quick object is so.
        says_others: Probability that it names the other objects.
    """

    count_shares: tuple[float, float, float] = (0.6, 0.3, 0.1)
    still_share: float = 0.12
    curve_share: float = 0.35
    median_speed: float = 0.8
    speed_spread: float = 0.6
    speed_range: tuple[float, float] = (0.3, 2.5)
    turn_range: tuple[float, float] = (0.12, 0.35)
    area_range_px: tuple[float, float] = (55.0, 95.0)
    margin_px: float = 7.5
    stripe_range_px: tuple[float, float] = (5.0, 9.0)
    stripe_depth: float = 0.35
    shade_range: tuple[float, float] = (0.3, 0.6)
    tint: float = 0.03
    contrast_range: tuple[float, float] = (0.04, 0.16)
    texture_cells: int = 6
    says_motion: float = 0.65
    says_path: float = 0.5
    says_direction: float = 0.5
    says_pace: float = 0.5
    says_others: float = 0.5


OPEN_WORLD = OpenWorld()


@dataclass(frozen=True, slots=True)
class OpenClips:
    """Everything that fixes clips, as columns: n clips of at most k = 3 objects.

    Attributes:
        count: Objects (n,); those after them are not drawn.
        colour: Indices into `HUES` (n, k), different within a clip; later objects lie above.
        shape: Indices into `SHAPES` (n, k).
        area_px: (n, k).
        speed_px_per_frame: (n, k); 0 for objects that rest.
        heading: Radians (n, k), from right towards down: mean over the first frames.
        turn: Radians a frame (n, k); 0 where the path is straight.
        path: Centres (n, k, frames, 2), right and down, in pixels.
        stripes: Wave vector (right, down) and phase (n, k, 3), radians a pixel and radians.
        stripe_depth: Share (n, k) by which the stripes dim.
        background: RGB (n, 3), mean of the texture.
        texture: Its departure from that, (n, cells, cells) weights of the bumps.
        verb: Indices into `VERBS` (n,), 0 where the caption leaves the motion open.
        direction: Indices into `DIRECTIONS` (n,), -1 where it leaves the direction open.
        pace: Indices into `PACES` (n,), 0 where it leaves the speed open.
        named: Objects that the caption names (n,).
    """

    count: Ints
    colour: Ints
    shape: Ints
    area_px: Floats
    speed_px_per_frame: Floats
    heading: Floats
    turn: Floats
    path: Floats
    stripes: Floats
    stripe_depth: Floats
    background: Floats
    texture: Floats
    verb: Ints
    direction: Ints
    pace: Ints
    named: Ints


class _Columns:
    """Hands out the columns of a table of uniform numbers, each once."""

    def __init__(
        self, seed: int, indices: Sequence[int], split: ClipSplit, num_columns: int
    ) -> None:
        # Counter-based: any clip can be drawn alone, on any machine, in any order.
        key = list(ClipSplit).index(split)
        self._table = np.stack(
            [
                np.random.Generator(
                    np.random.Philox(key=[seed, 2 * index + key], counter=[0, 0, 0, 1])
                ).random(num_columns)
                for index in indices
            ]
        )
        self._next = 0

    def uniform(self, *shape: int, bounds: tuple[float, float] = (0.0, 1.0)) -> Floats:
        """Uniform numbers (n, *shape)."""
        size = int(np.prod(shape, dtype=int))
        taken = self._table[:, self._next : self._next + size]
        self._next += size
        low, high = bounds
        return low + (high - low) * taken.reshape(len(taken), *shape)

    def normal(self, *shape: int) -> Floats:
        """Standard normal numbers (n, *shape), by Box and Muller's transform."""
        radius = np.sqrt(-2 * np.log1p(-self.uniform(*shape)))
        return radius * np.cos(2 * np.pi * self.uniform(*shape))


def draw_open_clips(
    seed: int,
    indices: Sequence[int],
    split: ClipSplit = ClipSplit.TRAIN,
    world: OpenWorld = OPEN_WORLD,
) -> OpenClips:
    """Draws clips; each depends on its own index alone, not on the others."""
    k = MAX_OBJECTS
    columns = _Columns(seed, indices, split, 64 + 16 * k + 2 * world.texture_cells**2)
    count = 1 + np.searchsorted(np.cumsum(world.count_shares)[:2], columns.uniform(), side="right")
    shape = _choice(columns.uniform(k), len(SHAPES))
    moves = columns.uniform(k) >= world.still_share
    curves = moves & (columns.uniform(k) < world.curve_share)
    speed = world.median_speed * np.exp(world.speed_spread * columns.normal(k))
    speed = np.where(moves, speed.clip(*world.speed_range), 0.0)
    heading = columns.uniform(k, bounds=(-np.pi, np.pi))
    turn = np.copysign(columns.uniform(k, bounds=world.turn_range), columns.uniform(k) - 0.5)
    turn = np.where(curves, turn, 0.0)
    verb, direction, pace = _said(world, columns, speed[:, 0], heading[:, 0], turn[:, 0])
    wave = 2 * np.pi / columns.uniform(k, bounds=world.stripe_range_px)
    tilt, phase = columns.uniform(k, bounds=(0, np.pi)), columns.uniform(k, bounds=(0, 2 * np.pi))
    shade = columns.uniform(1, bounds=world.shade_range)
    low, high = np.log(world.contrast_range)
    contrast = np.exp(columns.uniform(1, 1, bounds=(low, high)))
    return OpenClips(
        count=count,
        colour=_colours(columns, split, shape[:, 0], verb, direction, pace),
        shape=shape,
        area_px=columns.uniform(k, bounds=world.area_range_px),
        speed_px_per_frame=speed,
        heading=heading,
        turn=turn,
        path=_paths(world, columns, count, speed, heading, turn),
        stripes=np.stack([wave * np.cos(tilt), wave * np.sin(tilt), phase], axis=-1),
        stripe_depth=columns.uniform(k, bounds=(0, world.stripe_depth)),
        background=shade + columns.uniform(3, bounds=(-world.tint, world.tint)),
        texture=contrast * columns.normal(world.texture_cells, world.texture_cells),
        verb=verb,
        direction=direction,
        pace=pace,
        named=np.where(columns.uniform() < world.says_others, count, 1),
    )


def open_captions(clips: OpenClips) -> list[str]:
    """Captions of clips, for example "a red circle moves left and a blue bar"."""
    hues, ways = list(HUES), list(DIRECTIONS)
    texts: list[str] = []
    for row, named in enumerate(clips.named):
        objects = [
            f"a {hues[colour]} {SHAPES[shape]}"
            for colour, shape in zip(
                clips.colour[row, :named], clips.shape[row, :named], strict=True
            )
        ]
        way = ways[clips.direction[row]] if clips.direction[row] >= 0 else ""
        said = [objects[0], VERBS[clips.verb[row]], way, PACES[clips.pace[row]]]
        texts.append(" and ".join([" ".join(filter(None, said)), *objects[1:]]))
    return texts


def render_open_clips(clips: OpenClips) -> Pixels:
    """Draws clips, antialiased: pixels (clips, frames, height, width, 3)."""
    n = len(clips.count)
    starts = range(0, n, _RENDER_CHUNK)
    return np.concatenate([_render(clips, slice(s, min(s + _RENDER_CHUNK, n))) for s in starts])


def render_open_batch(
    seed: int, indices: Sequence[int], split: ClipSplit
) -> tuple[Pixels, list[str]]:
    """Draws several clips at once: pixels (clips, frames, height, width, 3) and captions."""
    clips = draw_open_clips(seed, indices, split)
    return render_open_clips(clips), open_captions(clips)


OPEN_SHAPES = EmbeddedWorld(
    name=WorldName.OPEN,
    draw=render_open_batch,
    captions=lambda seed, indices, split: open_captions(draw_open_clips(seed, indices, split)),
)


def _choice(uniform: Floats, count: int) -> Ints:
    return (uniform * count).astype(np.int64)


def _said(
    world: OpenWorld, columns: _Columns, speed: Floats, heading: Floats, turn: Floats
) -> tuple[Ints, Ints, Ints]:
    """Verb, direction and pace of the captions, from what the first objects do."""
    says_motion, says_path, says_direction, says_pace = (
        columns.uniform(4) < (world.says_motion, world.says_path, world.says_direction,
                              world.says_pace)
    ).T  # fmt: skip
    moves = speed > 0
    verb = np.where(moves, np.where((turn != 0) & says_path, _CURVES, _MOVES), _RESTS)
    axes = np.array(list(DIRECTIONS.values()))
    along = np.stack([np.cos(heading), np.sin(heading)], axis=1) @ axes.T
    pace = np.select([speed < SLOW_PX_PER_FRAME, speed > QUICK_PX_PER_FRAME], [_SLOWLY, _QUICKLY])
    tells = says_motion & moves
    return (
        np.where(says_motion, verb, 0),
        np.where(tells & says_direction, along.argmax(axis=1), -1),
        np.where(tells & says_pace, pace, 0),
    )


def _colours(
    columns: _Columns, split: ClipSplit, shape: Ints, verb: Ints, direction: Ints, pace: Ints
) -> Ints:
    """Colours of the objects, different within a clip; the first decides the split."""
    n = len(HUES)
    held_out = -(2 * shape + verb + direction + 1 + 2 * pace) % n
    first, second, third = (
        _choice(part, n - minus)
        for part, minus in zip(columns.uniform(3).T, (1, 1, 2), strict=True)
    )
    own = held_out if split is ClipSplit.HELD_OUT else (held_out + 1 + first) % n
    third = third + (third >= second)
    return np.stack([own, (own + 1 + second) % n, (own + 1 + third) % n], axis=1)


def _paths(
    world: OpenWorld, columns: _Columns, count: Ints, speed: Floats, heading: Floats, turn: Floats
) -> Floats:
    """Centres (n, k, frames, 2): arcs that start apart, mirrored at the borders."""
    step = np.arange(NUM_FRAMES - 1)
    # So the first frames move along the heading on the whole.
    angle = heading[..., None] + turn[..., None] * (step - (HEADING_FRAMES - 2) / 2)
    steps = speed[..., None, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    moved = np.concatenate([np.zeros_like(steps[:, :, :1]), steps.cumsum(axis=2)], axis=2)
    room = FRAME_PX / 2 - world.margin_px
    alone = columns.uniform(1, 2, bounds=(-room, room))
    # Several objects start at the corners of a regular polygon.
    corner = 2 * np.pi * (columns.uniform(1) + np.arange(MAX_OBJECTS) / count[:, None])
    radius = columns.uniform(MAX_OBJECTS, bounds=(0.75 * room, room))[..., None]
    apart = radius * np.stack([np.cos(corner), np.sin(corner)], axis=-1)
    start = np.where(count[:, None, None] == 1, alone, apart)
    early = moved[:, :, :HEADING_FRAMES]
    start = np.clip(start, -room - early.min(axis=2), room - early.max(axis=2))
    along = (start[:, :, None] + moved + room) % (4 * room)
    return FRAME_PX / 2 + room - np.abs(along - 2 * room)


def _render(clips: OpenClips, rows: slice) -> Pixels:
    pixel = np.arange(FRAME_PX) + 0.5
    bumps = _bumps(clips.texture.shape[-1])
    field = np.einsum("ya,nab,xb->nyx", bumps, clips.texture[rows], bumps)
    ground = clips.background[rows][:, None, None] + field[..., None]
    image = np.repeat(ground[:, None], NUM_FRAMES, axis=1)
    for k in range(MAX_OBJECTS):
        path = clips.path[rows, k]
        dx = pixel - path[..., 0, None, None]
        dy = pixel[:, None] - path[..., 1, None, None]
        area = clips.area_px[rows, k][:, None, None, None]
        covers = np.stack([_coverage(shape, dx, dy, area) for shape in SHAPES])
        cover = covers[clips.shape[rows, k], np.arange(len(path))]
        cover *= (clips.count[rows] > k)[:, None, None, None]
        right, down, phase = clips.stripes[rows, k].T[..., None, None, None]
        depth = clips.stripe_depth[rows, k][:, None, None, None]
        shade = 1 - depth * (0.5 + 0.5 * np.sin(right * dx + down * dy + phase))
        colour = np.array(list(HUES.values()))[clips.colour[rows, k]][:, None, None, None]
        image += cover[..., None] * (shade[..., None] * colour - image)
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def _bumps(cells: int) -> Floats:
    """Weights (pixels, cells) of smooth bumps whose sum of independent values has variance 1."""
    centre = (np.arange(cells) + 0.5) * FRAME_PX / cells
    distance = (np.arange(FRAME_PX)[:, None] + 0.5 - centre) * cells / FRAME_PX
    weight = np.exp(-2 * distance**2)
    return weight / np.sqrt((weight**2).sum(axis=1, keepdims=True))


def _coverage(shape: str, dx: Floats, dy: Floats, area: Floats) -> Floats:
    """As `sgmd_core.worlds.shapes.shape_coverage`, on arrays."""
    if shape == "circle":
        distance = np.hypot(dx, dy) - np.sqrt(area / np.pi)
    elif shape == "bar":
        width = np.sqrt(area / BAR_HEIGHT_PER_WIDTH)
        distance = np.maximum(np.abs(dx) - width / 2, np.abs(dy) - BAR_HEIGHT_PER_WIDTH * width / 2)
    else:
        inradius = np.sqrt(area / (3 * np.sqrt(3)))
        distance = np.maximum(np.abs(dx) * np.sqrt(3) / 2 - dy / 2, dy) - inradius
    return (0.5 - distance).clip(0, 1)
