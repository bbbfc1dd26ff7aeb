"""One feed for captions, latents, embeddings and decoded clips."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.data.clips.clip_decoding import ClipDecoder, decode_video
from pipelines.data.clips.clip_format import ClipFormat, FitPolicy
from pipelines.data.shards.schema import FPS, LATENTS, TEXT_EMBEDS, VIDEO, Encoding, encoded_schema
from pipelines.data.shards.values import pack_tensor, pack_text
from pipelines.data.stream.batch import Batch
from pipelines.data.stream.feed import Feed, FeedProgress, StreamSettings
from pipelines.data.stream.ray_stream import ReadAheadSettings
from pipelines.data.stream.source import Source
from pipelines.media.video import encode_mp4
from pipelines.shapes import render, sample_spec, write_shards
from tests.helpers.hanging import CRASH, HANG, OddDecoder, grey_clip

SHAPE = (13, 32, 32, 3)


def decode(data: bytes, fps: float) -> np.ndarray:
    assert fps == 8
    return decode_video(data)


def feed(source: Source) -> Feed:
    return Feed(StreamSettings(source, 0, max_bad_fraction=1.0), FeedProgress(), 100)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latents_and_embeddings_come_with_their_rows(tmp_path: Path, dtype) -> None:
    encoding = Encoding((2, 3, 2, 2), (4, 5), dtype, "v", "t")
    latents, texts = torch.randn(20, 2, 3, 2, 2), torch.randn(20, 4, 5)
    texts[:, 3:] = 0
    columns = {
        "sample_id": [str(row) for row in range(20)],
        "caption": ["c"] * 20,
        "latents": [pack_tensor(value, dtype) for value in latents],
        "text_embeds": [pack_text(value, dtype) for value in texts],
    }
    table = pa.table(columns, schema=encoded_schema(encoding))
    pq.write_table(table, tmp_path / "one.parquet", row_group_size=6)
    source = Source(str(tmp_path), columns=(LATENTS, TEXT_EMBEDS), encoding=encoding)
    stream = feed(source)
    stored = getattr(torch, dtype)
    for _ in range(5):
        first, second = stream.take(3), stream.take(5)
        for batch, found, true in (
            (first, stream.latents(first.number), latents.to(stored)),
            (second, stream.embeddings(second.number), texts.to(stored).float()),
        ):
            rows = torch.tensor([int(name) for name in batch.sample_ids])
            assert found.dtype == true.dtype
            assert torch.equal(found, true[rows])


def test_a_batch_lets_go_of_what_it_has_handed_out_and_keeps_no_more_than_was_asked_for(
    tmp_path: Path,
) -> None:
    encoding = Encoding((2, 3, 2, 2), (4, 5), "float32", "v", "t")
    columns = {
        "sample_id": [str(row) for row in range(8)],
        "caption": ["c"] * 8,
        "latents": [
            pack_tensor(torch.full((2, 3, 2, 2), float(row)), "float32") for row in range(8)
        ],
        "text_embeds": [pack_text(torch.ones(4, 5), "float32")] * 8,
    }
    pq.write_table(pa.table(columns, schema=encoded_schema(encoding)), tmp_path / "one.parquet")
    stream = feed(Source(str(tmp_path), columns=(LATENTS, TEXT_EMBEDS), encoding=encoding))
    both, text, none = stream.take(2), stream.take(2, (TEXT_EMBEDS,)), stream.take(2, ())
    assert {*stream._payloads} == {both.number, text.number}
    data = stream.data(both.number)
    assert data.x0[:, 0, 0, 0, 0].tolist() == [float(name) for name in both.sample_ids]
    assert data.cut(1, 2).num_samples == 1
    assert stream.embeddings(both.number).shape == (2, 4, 5)
    stream.embeddings(text.number)
    assert not stream._payloads
    assert none.number == 2


@pytest.mark.slow
def test_clips_are_decoded_and_the_undecodable_left_out(tmp_path: Path) -> None:
    write_shards(str(tmp_path), num_clips=6, shard_size=6, seed=0)
    small = encode_mp4(np.zeros((13, 16, 16, 3), np.uint8), 8)
    whole = encode_mp4(render(sample_spec(0, 0)), 8)
    rows = {"torn": whole[: len(whole) // 2], "text": b"no video", "empty": b"", "small": small}
    columns = {
        "sample_id": [*rows],
        "caption": ["c"] * 4,
        "video": [*rows.values()],
        "fps": [8] * 4,
    }
    pq.write_table(pa.table(columns), tmp_path / "bad.parquet")
    (tmp_path / "_index.json").unlink()
    source = Source(str(tmp_path), columns=(VIDEO, FPS), decode=decode, pixel_shape=SHAPE)
    stream = feed(source)
    batches: list[Batch] = [stream.take(3), stream.take(3)]
    reasons = {each.sample_id: each.why for batch in batches for each in batch.rejects}
    assert set(reasons) == set(rows)
    assert reasons["text"].startswith("undecodable")
    assert reasons["torn"].startswith(("undecodable", "wrong_size"))
    assert reasons["empty"] == "missing_video"
    assert reasons["small"] == "wrong_size (pixels of (13, 16, 16, 3))"
    for batch in batches:
        pixels = stream.pixels(batch.number)
        assert pixels.shape == (3, *SHAPE)
        for name, clip in zip(batch.sample_ids, pixels, strict=True):
            true = render(sample_spec(0, int(name.split("-")[-1])))
            # Nearly lossless: a level or two of 255 on average.
            assert np.abs(clip.astype(int) - true.astype(int)).mean() < 2


@pytest.mark.parametrize("policy", FitPolicy)
def test_what_becomes_of_another_size_and_length_is_the_policys(
    tmp_path: Path, policy: FitPolicy
) -> None:
    films = {
        "right": np.full((5, 32, 32, 3), 90, np.uint8),
        "wide": np.full((5, 32, 48, 3), 90, np.uint8),
        "short": np.full((2, 32, 32, 3), 90, np.uint8),
    }
    columns = {
        "sample_id": [*films],
        "caption": ["c"] * 3,
        "video": [encode_mp4(frames, 8) for frames in films.values()],
        "fps": [8.0] * 3,
    }
    pq.write_table(pa.table(columns), tmp_path / "one.parquet")
    decoder = ClipDecoder(ClipFormat(5, 32, 32, fps=8, policy=policy))
    source = Source(str(tmp_path), columns=(VIDEO, FPS), decode=decoder, pixel_shape=(5, 32, 32, 3))
    usable = 1 if policy is FitPolicy.REFUSE else 2
    stream = feed(source)
    batch = stream.take(usable)
    assert stream.pixels(batch.number).shape == (usable, 5, 32, 32, 3)
    reasons = {each.sample_id: each.why for each in batch.rejects}
    assert reasons.pop("short").startswith("too_short (0.250 s of video")
    if policy is FitPolicy.REFUSE:
        refused = "wrong_size (a picture of 32x48 (height x width); expected 32x32)"
        assert reasons == {"wide": refused}
    else:
        assert set(batch.sample_ids) == {"right", "wide"}


def write_odd_set(folder: Path, *odd: bytes) -> dict[str, bytes]:
    """A shard of four good videos and some files that a decoder hangs at; the good ones by id."""
    good = {f"good{n}": encode_mp4(grey_clip(40 * n + 40), 8) for n in range(4)}
    videos = {**good, **{value.decode(): value for value in odd}}
    columns = {
        "sample_id": [*videos],
        "caption": ["c"] * len(videos),
        "video": [*videos.values()],
        "fps": [8.0] * len(videos),
    }
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / "one.parquet", row_group_size=2)
    return good


@pytest.mark.parametrize("readers", [0, pytest.param(1, marks=pytest.mark.ray)])
@pytest.mark.slow
def test_a_decoder_that_hangs_costs_its_clip_and_not_the_run(
    tmp_path: Path, readers: int, request: pytest.FixtureRequest
) -> None:
    good = write_odd_set(tmp_path, HANG)
    decoder = OddDecoder(ClipFormat(5, 32, 32, fps=8))
    source = Source(
        str(tmp_path), columns=(VIDEO,), decode=decoder, pixel_shape=(5, 32, 32, 3), max_hang_s=2.0
    )
    if readers:
        request.getfixturevalue("ray_cluster")
    ahead = ReadAheadSettings(readers)
    settings = StreamSettings(source, 0, max_bad_fraction=0.5, ahead=ahead)
    with Feed(settings, FeedProgress(), 4) as stream:
        batch = stream.take(4)
        pixels = stream.pixels(batch.number)
    (left_out,) = batch.rejects
    assert (left_out.sample_id, left_out.reason) == ("hang", "too_slow")
    assert "max_hang_s" in left_out.detail
    assert set(batch.sample_ids) == set(good)
    for name, clip in zip(batch.sample_ids, pixels, strict=True):
        assert np.array_equal(clip, decoder(good[name])), "the same bits as without the guard"


@pytest.mark.slow
def test_a_decoder_that_crashes_costs_its_clip_too(tmp_path: Path) -> None:
    write_odd_set(tmp_path, CRASH)
    decoder = OddDecoder(ClipFormat(5, 32, 32, fps=8))
    source = Source(str(tmp_path), columns=(VIDEO,), decode=decoder, pixel_shape=(5, 32, 32, 3))
    batch = feed(source).take(4)
    assert [each.reason for each in batch.rejects] == ["worker_died"]
