"""The world `shapes`: its captions, its clips and its shards."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.data.clips.clip_decoding import decode_video
from pipelines.shapes import (
    FPS,
    SPEED_JITTER,
    ClipSplit,
    caption,
    captions,
    render,
    render_batch,
    sample_spec,
    write_shards,
)
from sgmd_core.errors import ConfigError
from sgmd_core.worlds.shapes import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SPEEDS_PX_PER_FRAME,
    labels_from_captions,
    measure_clips,
    score_clips,
)

NUM_CLIPS = 192


def to_video(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 4, 1, 2, 3).float() / 255


@pytest.mark.slow
@pytest.mark.parametrize("split", ClipSplit)
def test_the_measurer_reads_rendered_clips_nearly_without_error(split: ClipSplit) -> None:
    pixels, texts = render_batch(5, range(NUM_CLIPS), split)
    reading = measure_clips(to_video(pixels))
    scores = score_clips(reading, labels_from_captions(texts))
    assert min(scores.colour, scores.shape, scores.direction) >= 0.98
    # Three captioned speeds tie, so even exact speeds correlate at most at about 0.94.
    assert scores.speed_spearman >= 0.93
    true_speeds = [sample_spec(5, index, split).speed_px_per_frame for index in range(NUM_CLIPS)]
    error = reading.speed_px_per_frame - torch.tensor(true_speeds)
    assert float(error.abs().max()) < 0.06
    assert abs(float(error.mean())) < 0.005


def test_held_out_captions_never_occur_in_training() -> None:
    train, held_out = set(captions(ClipSplit.TRAIN)), set(captions(ClipSplit.HELD_OUT))
    assert not train & held_out
    assert len(train | held_out) == len(COLOURS) * len(SHAPES) * len(DIRECTIONS) * len(
        SPEEDS_PX_PER_FRAME
    )
    assert len(held_out) == 36


def test_every_pair_of_words_occurs_in_training() -> None:
    pairs = set()
    for text in captions(ClipSplit.TRAIN):
        _, colour, shape, _, direction, *speed = text.split()
        words = (colour, shape, direction, speed[0] if speed else "")
        pairs |= {(i, j, words[i], words[j]) for i in range(4) for j in range(i)}
    sizes = (len(COLOURS), len(SHAPES), len(DIRECTIONS), len(SPEEDS_PX_PER_FRAME))
    assert len(pairs) == sum(sizes[i] * sizes[j] for i in range(4) for j in range(i))


def test_a_clip_depends_on_seed_and_index_alone() -> None:
    assert sample_spec(3, 17) == sample_spec(3, 17)
    assert sample_spec(3, 17) != sample_spec(3, 18)
    assert sample_spec(3, 17) != sample_spec(4, 17)
    assert np.array_equal(render(sample_spec(3, 17)), render(sample_spec(3, 17)))


def test_a_caption_leaves_size_place_background_and_jitter_open() -> None:
    specs = [sample_spec(0, index) for index in range(2000)]
    text = caption(specs[0])
    same = [spec for spec in specs if caption(spec) == text]
    assert len(same) > 3
    assert len({spec.area_px for spec in same}) == len(same)
    assert len({spec.background for spec in same}) == len(same)
    nominal = SPEEDS_PX_PER_FRAME[same[0].speed_word]
    ratios = [spec.speed_px_per_frame / nominal for spec in same]
    assert max(abs(ratio - 1) for ratio in ratios) <= SPEED_JITTER


def test_shards_hold_playable_captioned_clips(tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    addresses = write_shards(
        str(tmp_path / "shards"),
        num_clips=5,
        shard_size=2,
        seed=7,
        on_progress=lambda done, total: progress.append((done, total)),
    )
    assert progress == [(2, 5), (4, 5), (5, 5)]
    assert len(addresses) == len(list((tmp_path / "shards").glob("*.parquet"))) == 3
    rows = [row for address in sorted(addresses) for row in pq.read_table(address).to_pylist()]
    assert len({row["sample_id"] for row in rows}) == 5
    assert [row["caption"] for row in rows] == [caption(sample_spec(7, i)) for i in range(5)]
    assert {row["fps"] for row in rows} == {FPS}
    error = decode_video(rows[4]["video"]).astype(int) - render(sample_spec(7, 4)).astype(int)
    assert np.abs(error).mean() < 1.5


def test_the_clips_of_this_world_never_change() -> None:
    pixels, texts = render_batch(7, range(4), ClipSplit.TRAIN)
    digest = hashlib.sha256(pixels.tobytes() + "".join(texts).encode()).hexdigest()
    assert digest[:16] == "e54f589c17169815"


def test_shards_of_another_index_range_hold_other_clips(tmp_path: Path) -> None:
    first = write_shards(str(tmp_path), num_clips=2, shard_size=2, seed=0)
    second = write_shards(str(tmp_path), num_clips=2, shard_size=2, seed=0, first_index=2)
    ids = [row["sample_id"] for path in first + second for row in pq.read_table(path).to_pylist()]
    assert len(set(ids)) == 4


@pytest.mark.parametrize(("num_clips", "shard_size"), [(0, 1), (1, 0)])
def test_counts_must_be_positive(tmp_path: Path, num_clips: int, shard_size: int) -> None:
    with pytest.raises(ConfigError, match="from 1 to"):
        write_shards(str(tmp_path), num_clips=num_clips, shard_size=shard_size, seed=0)
