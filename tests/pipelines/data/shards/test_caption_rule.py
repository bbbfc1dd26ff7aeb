"""One rule for captions: who prepares, checks, encodes and trains takes the same rows."""

import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.checking.check import CheckOptions, check_shards
from pipelines.data.clips.clip_decoding import ClipDecoder
from pipelines.data.clips.clip_format import ClipFormat
from pipelines.data.encoding.encode_plan import plan_parts
from pipelines.data.encoding.encode_stages import read_and_decode
from pipelines.data.making.prepare_clip import ClipRules, prepare_clip
from pipelines.data.making.source_clip import SourceClip
from pipelines.data.shards.filesystem import open_folder
from pipelines.data.shards.rejection import Rejection
from pipelines.data.stream.catalogue import Catalogue
from pipelines.data.stream.feed import Feed, FeedProgress, StreamSettings
from pipelines.data.stream.ray_stream import TASK
from pipelines.data.stream.source import Source

LIMIT = 10
CAPTIONS = {
    "good": "a" * LIMIT,
    "blanks around": f"  {'a' * LIMIT}\n",
    "separators": f"\x1c{'é' * LIMIT}\u3000",
    "long": "é" * (LIMIT + 1),
    "empty": "",
    "blank": " \t\n",
    "no-break": "\u00a0",
    "separated": "\u2028\u3000\x85",
    "nul": "\0\0",
    "zero-width": "\u200b \u200d\ufeff",
    "deleted": "\x7f",
}
FAULTS = {
    "long": ("long_caption", "11 characters; at most 10"),
    "empty": ("empty_caption", "nothing but blanks"),
    "blank": ("empty_caption", "nothing but blanks"),
    "no-break": ("empty_caption", "nothing but blanks"),
    "separated": ("empty_caption", "nothing but blanks"),
    "nul": ("empty_caption", "nothing but blanks and invisible characters"),
    "zero-width": ("empty_caption", "nothing but blanks and invisible characters"),
    "deleted": ("empty_caption", "nothing but blanks and invisible characters"),
}


@pytest.fixture
def shards(tmp_path) -> Path:
    columns = {"sample_id": [*CAPTIONS], "caption": [*CAPTIONS.values()]}
    videos = {"video": [b""] * len(CAPTIONS), "fps": [8.0] * len(CAPTIONS)}
    (tmp_path / "captions").mkdir()
    (tmp_path / "videos").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "captions" / "part.parquet")
    pq.write_table(pa.table(columns | videos), tmp_path / "videos" / "part.parquet")
    return tmp_path


def test_a_shard_in_ascii_is_looked_at_as_closely(tmp_path):
    captions = {"good": "a", "nul": "\0", "deleted": "\x7f\x7f", "inside": "a\0b"}
    table = pa.table({"sample_id": [*captions], "caption": [*captions.values()]})
    pq.write_table(table, tmp_path / "part.parquet")
    assert check_shards(str(tmp_path), CheckOptions(num_processes=0)).bad == {"empty_caption": 2}
    settings = StreamSettings(Source(str(tmp_path)), 0, max_bad_fraction=1.0)
    with Feed(settings, FeedProgress(), 4) as feed:
        batch = feed.take(2)
    assert {*batch.sample_ids} == {"good", "inside"}
    assert {each.sample_id for each in batch.rejects} == {"nul", "deleted"}


def test_training_and_check_and_encode_and_prepare_reject_the_same_captions_alike(shards):
    source = Source(str(shards / "captions"), max_caption_chars=LIMIT)
    settings = StreamSettings(source, 0, max_bad_fraction=1.0)
    with Feed(settings, FeedProgress(), 4) as feed:
        batches = [feed.take(3), feed.take(1)]
    trained = {
        each.sample_id: (each.reason, each.detail) for batch in batches for each in batch.rejects
    }
    assert trained == FAULTS

    options = CheckOptions(max_caption_chars=LIMIT, num_processes=0)
    report = check_shards(str(shards / "captions"), options)
    assert report.bad == {"empty_caption": 7, "long_caption": 1}

    prepared = {
        name: prepare_clip(SourceClip(name, "list.csv", 0, None, text), rules)
        for rules in [ClipRules(max_caption_chars=LIMIT)]
        for name, text in CAPTIONS.items()
    }
    assert {
        name: (found.reason, found.detail)
        for name, found in prepared.items()
        if isinstance(found, Rejection)
    } == FAULTS

    encoded = {
        line["sample_id"]: (line["reason"], line["detail"])
        for part in plan_parts(Catalogue(*open_folder(str(shards / "videos")), 1000), 100)
        for table in read_and_decode(
            pa.table({TASK: [pickle.dumps(part)]}),
            Source(
                str(shards / "videos"),
                columns=("video",),
                max_caption_chars=LIMIT,
                decode=ClipDecoder(ClipFormat(5, 32, 32, 8)),
                pixel_shape=(5, 32, 32, 3),
            ),
        )
        for line in table.to_pylist()
    }
    assert {name: encoded[name] for name in FAULTS} == FAULTS
    # The others come to their videos, which hold nothing.
    assert {encoded[name][0] for name in CAPTIONS if name not in FAULTS} == {"missing_video"}
