"""The world `open`: its captions, its clips, and the reading that gives back what was drawn."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.data.clips.clip_decoding import decode_video
from pipelines.open_shapes import (
    OPEN_SHAPES,
    OPEN_WORLD,
    OpenClips,
    draw_open_clips,
    open_captions,
    render_open_batch,
    render_open_clips,
)
from pipelines.shapes import ClipSplit, write_shards
from sgmd_core.errors import ShapeError
from sgmd_core.metrics.distributions import STILL_PX_PER_FRAME
from sgmd_core.worlds.open_shapes import (
    HUES,
    PACES,
    VERBS,
    OpenReading,
    open_labels,
    read_open_clips,
    score_open_clips,
)
from sgmd_core.worlds.shapes import DIRECTIONS, SHAPES

NUM_CLIPS = 192
NUM_DRAWN = 4096


def to_video(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 4, 1, 2, 3).float() / 255


@pytest.fixture(scope="module")
def drawn() -> OpenClips:
    return draw_open_clips(5, range(NUM_CLIPS))


@pytest.fixture(scope="module")
def reading(drawn: OpenClips) -> OpenReading:
    return read_open_clips(to_video(render_open_clips(drawn)))


@pytest.fixture(scope="module")
def many() -> OpenClips:
    return draw_open_clips(0, range(NUM_DRAWN))


def angle_between(reading: np.ndarray, heading: np.ndarray) -> np.ndarray:
    found = np.arctan2(reading[:, 1], reading[:, 0])
    return np.abs((found - heading + np.pi) % (2 * np.pi) - np.pi)


@pytest.mark.slow
def test_the_reader_counts_and_names_every_object_as_it_was_drawn(
    drawn: OpenClips, reading: OpenReading
) -> None:
    assert reading.count.tolist() == drawn.count.tolist()
    for k in range(3):
        rows = np.flatnonzero(drawn.count > k)
        hue = drawn.colour[rows, k]
        assert bool(reading.present[rows, hue].all())
        assert reading.shape[rows, hue].tolist() == drawn.shape[rows, k].tolist()


@pytest.mark.slow
def test_the_reader_gives_back_path_speed_and_direction_of_an_object_alone(
    drawn: OpenClips, reading: OpenReading
) -> None:
    rows = np.flatnonzero(drawn.count == 1)
    hue = drawn.colour[rows, 0]
    assert len(rows) > NUM_CLIPS / 2
    path = reading.path[rows, hue].numpy()
    assert np.abs(path - drawn.path[rows, 0]).max() < 0.35
    speed = drawn.speed_px_per_frame[rows, 0]
    error = reading.speed_px_per_frame[rows, hue].numpy() - speed
    assert np.quantile(np.abs(error), 0.9) < 0.06
    assert np.abs(error).max() < 0.15
    assert abs(error.mean()) < 0.01
    angles = angle_between(reading.heading[rows, hue].numpy(), drawn.heading[rows, 0])[speed > 0]
    assert np.quantile(angles, 0.9) < 0.1
    assert angles.max() < 0.5


@pytest.mark.slow
def test_objects_that_hide_each_other_are_read_nearly_as_well(
    drawn: OpenClips, reading: OpenReading
) -> None:
    errors: list[float] = []
    angles: list[float] = []
    for k in range(3):
        rows = np.flatnonzero(drawn.count > max(k, 1))
        hue, speed = drawn.colour[rows, k], drawn.speed_px_per_frame[rows, k]
        errors += (reading.speed_px_per_frame[rows, hue].numpy() - speed).tolist()
        angle = angle_between(reading.heading[rows, hue].numpy(), drawn.heading[rows, k])
        angles += angle[speed > 0].tolist()
    assert np.quantile(np.abs(errors), 0.9) < 0.15
    assert np.quantile(angles, 0.9) < 0.25


@pytest.mark.slow
def test_objects_that_rest_are_told_from_all_that_move(
    drawn: OpenClips, reading: OpenReading
) -> None:
    rows = np.flatnonzero(drawn.count == 1)
    found = reading.speed_px_per_frame[rows, drawn.colour[rows, 0]] < STILL_PX_PER_FRAME
    assert found.tolist() == (drawn.speed_px_per_frame[rows, 0] == 0).tolist()
    assert bool(found.any())


@pytest.mark.slow
def test_the_spread_of_the_texture_is_read_past_the_objects() -> None:
    clips = draw_open_clips(5, range(64))
    bare = replace(clips, count=np.zeros_like(clips.count))
    spreads = [read_open_clips(to_video(render_open_clips(each))).texture for each in (clips, bare)]
    assert float(spreads[1].max() / spreads[1].min()) > 3
    assert torch.corrcoef(torch.stack(spreads))[0, 1] > 0.98


@pytest.mark.slow
def test_the_reading_survives_an_mp4_file(tmp_path: Path) -> None:
    write_shards(str(tmp_path), num_clips=24, shard_size=24, seed=3, world=OPEN_SHAPES)
    (shard,) = tmp_path.glob("open-0003-train-*.parquet")
    table = pq.read_table(shard)
    pixels = np.stack([decode_video(video.as_py()) for video in table["video"]])
    clips = draw_open_clips(3, range(24))
    assert table["caption"].to_pylist() == open_captions(clips)
    assert read_open_clips(to_video(pixels)).count.tolist() == clips.count.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("split", ClipSplit)
def test_rendered_clips_show_what_their_captions_say(split: ClipSplit) -> None:
    pixels, texts = render_open_batch(7, range(NUM_CLIPS), split)
    scores = score_open_clips(read_open_clips(to_video(pixels)), open_labels(texts))
    assert min(scores.colour, scores.shape, scores.count) == 1
    assert min(scores.verb, scores.pace) >= 0.98
    # A heading between two directions may be read as the other one.
    assert scores.direction >= 0.95


def test_a_clip_depends_on_seed_split_and_index_alone() -> None:
    pixels, texts = render_open_batch(3, [17, 4], ClipSplit.TRAIN)
    alone, text = render_open_batch(3, [4], ClipSplit.TRAIN)
    assert np.array_equal(pixels[1], alone[0])
    assert texts[1] == text[0]
    for seed, index, split in ((4, 4, "train"), (3, 5, "train"), (3, 4, "held_out")):
        other, _ = render_open_batch(seed, [index], ClipSplit(split))
        assert not np.array_equal(other[0], alone[0])


@pytest.mark.slow
def test_held_out_captions_never_occur_in_training_but_all_their_words_do() -> None:
    said: dict[ClipSplit, set[tuple[int, ...]]] = {}
    words: dict[ClipSplit, set[str]] = {}
    for split in ClipSplit:
        clips = draw_open_clips(0, range(NUM_DRAWN), split)
        columns = (clips.colour[:, 0], clips.shape[:, 0], clips.verb, clips.direction, clips.pace)
        said[split] = set(zip(*(column.tolist() for column in columns), strict=True))
        words[split] = {word for text in open_captions(clips) for word in text.split()}
    assert not said[ClipSplit.TRAIN] & said[ClipSplit.HELD_OUT]
    assert words[ClipSplit.HELD_OUT] == words[ClipSplit.TRAIN]
    pairs = {(colour, shape) for colour, shape, *_ in said[ClipSplit.TRAIN]}
    assert len(pairs) == len(HUES) * len(SHAPES)


def test_labels_read_a_caption_back() -> None:
    texts = [
        "a red circle",
        "a blue bar rests and a red circle",
        "a cyan triangle curves up quickly and a red bar and a blue bar",
        "a green bar moves slowly",
    ]
    labels = open_labels(texts)
    assert labels.colour.tolist() == [list(HUES).index(n) for n in ("red", "blue", "cyan", "green")]
    assert labels.verb.tolist() == [0, 1, 3, 2]
    assert labels.direction.tolist() == [-1, -1, list(DIRECTIONS).index("up"), -1]
    assert labels.pace.tolist() == [0, 0, PACES.index("quickly"), PACES.index("slowly")]
    assert labels.least_count.tolist() == [1, 2, 3, 1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle moves left quickly now",
        "a white circle",
        "a red circle rests left",
        "a red circle quickly",
        "a red circle and",
        "a red circle moves and a blue bar moves",
    ],
)
def test_a_caption_of_no_such_world_is_refused(text: str) -> None:
    with pytest.raises(ShapeError):
        open_labels([text])


def test_captions_leave_things_open_as_often_as_stated(many: OpenClips) -> None:
    moves = many.speed_px_per_frame[:, 0] > 0
    told = moves & (many.verb > 0)
    bent = told & (many.turn[:, 0] != 0)
    paced = told & ((many.speed_px_per_frame[:, 0] < 0.6) | (many.speed_px_per_frame[:, 0] > 1.2))
    several = many.count > 1
    world = OPEN_WORLD
    shares = {
        world.says_motion: many.verb > 0,
        world.still_share: ~moves,
    }
    for share, found in shares.items():
        assert found.mean() == pytest.approx(share, abs=0.03)
    conditional = [
        (world.says_path, (many.verb == VERBS.index("curves"))[bent]),
        (world.says_direction, (many.direction >= 0)[told]),
        (world.says_pace, (many.pace > 0)[paced]),
        (world.says_others, (many.named > 1)[several]),
        (world.curve_share, (many.turn[:, 0] != 0)[moves]),
    ]
    for share, found in conditional:
        assert found.mean() == pytest.approx(share, abs=0.05)
    counts = Counter(many.count.tolist())
    for count, share in zip((1, 2, 3), world.count_shares, strict=True):
        assert counts[count] / NUM_DRAWN == pytest.approx(share, abs=0.03)


def test_speeds_are_broad_and_skewed_and_directions_fill_the_circle(many: OpenClips) -> None:
    speed = many.speed_px_per_frame[many.speed_px_per_frame > 0]
    assert np.median(speed) == pytest.approx(OPEN_WORLD.median_speed, abs=0.03)
    assert speed.mean() > np.median(speed) * 1.1
    assert np.quantile(speed, 0.95) / np.quantile(speed, 0.05) > 4
    sectors, _ = np.histogram(many.heading, bins=8, range=(-np.pi, np.pi))
    assert sectors.min() / sectors.max() > 0.9


def test_paths_stay_inside_bounce_and_begin_along_their_heading(many: OpenClips) -> None:
    margin = OPEN_WORLD.margin_px
    assert many.path.min() >= margin - 1e-9
    assert many.path.max() <= 32 - margin + 1e-9
    steps = np.linalg.norm(np.diff(many.path, axis=2), axis=-1)
    bounced = steps < many.speed_px_per_frame[..., None] - 1e-6
    assert not bounced[:, :, :4].any()
    assert 0.1 < bounced.any(axis=2).mean() < 0.9
    early = many.path[:, :, 4] - many.path[:, :, 0]
    moves = many.speed_px_per_frame > 0
    found = angle_between(early[moves], many.heading[moves])
    assert found.max() < 1e-6


def test_colours_within_a_clip_differ(many: OpenClips) -> None:
    ordered = np.sort(many.colour, axis=1)
    assert (np.diff(ordered, axis=1) > 0).all()


def test_no_caption_is_longer_than_the_text_of_the_recipe(many: OpenClips) -> None:
    assert max(len(text.split()) for text in open_captions(many)) + 1 <= 16
