"""Columns as other tools name and store them: taken where it is clear, refused where it is not."""

import json
import pickle
import re
import uuid
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.data.checking.check import CheckOptions, check_shards
from pipelines.data.clips.clip_decoding import ClipDecoder
from pipelines.data.clips.clip_format import DEFAULT_LIMITS, ClipFormat
from pipelines.data.encoding.encode_plan import plan_parts
from pipelines.data.encoding.encode_stages import DETAIL, REASON, read_and_decode
from pipelines.data.shards.columns import (
    ColumnMap,
    ColumnNames,
    OptionColumnNames,
    RecipeColumnNames,
    map_columns,
    settle_names,
)
from pipelines.data.shards.filesystem import S3Settings, open_folder
from pipelines.data.shards.reading import Fault
from pipelines.data.shards.rejection import join_reason
from pipelines.data.shards.schema import FPS, REQUIRED_COLUMNS, VIDEO
from pipelines.data.stream.batch import Batch
from pipelines.data.stream.catalogue import Catalogue
from pipelines.data.stream.feed import Feed, FeedProgress, StreamSettings
from pipelines.data.stream.inspect import FolderFacts, inspect_folder
from pipelines.data.stream.plan import ShuffleSettings
from pipelines.data.stream.ray_stream import TASK
from pipelines.data.stream.source import Source
from pipelines.shapes import write_shards
from sgmd_core.errors import DataError
from tests.helpers.shards import write_folder

HERE = CheckOptions(num_processes=0)
IN_HERE = S3Settings(native_reads=False)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path: Path, group: int = 2, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def take(url: Path, num_rows: int, s3: S3Settings = S3Settings(), **names: str) -> Batch:
    source = Source(str(url), s3, names=ColumnNames(**names))
    with Feed(StreamSettings(source, 0), FeedProgress(), num_rows) as feed:
        return feed.take(num_rows)


def look(url: Path, names: ColumnNames = ColumnNames()) -> FolderFacts:
    return inspect_folder(Source(str(url), names=names), 0, ShuffleSettings())


@pytest.mark.parametrize("name", ["text", "prompt", "TEXT", "Prompt", "Caption"])
def test_the_usual_name_of_captions_is_taken_and_ids_are_made_of_file_and_row(tmp_path, name):
    for part in ("split=test/part", "split=train/part"):
        write(tmp_path / f"{part}.parquet", **{name: ["a", "b", "c"], "url": ["x"] * 3})
    for s3 in (S3Settings(), IN_HERE):
        batch = take(tmp_path, 6, s3)
        pairs = dict(zip(batch.sample_ids, batch.captions, strict=True))
        assert pairs == {
            f"split={split}/part.parquet#{row}": "abc"[row]
            for split in ("test", "train")
            for row in range(3)
        }
    derived = "ids are derived from file and row (no column sample_id)"
    words = f"caption is column {name}; {derived}"
    assert look(tmp_path).found == words
    report = check_shards(str(tmp_path), HERE)
    assert (report.is_usable, report.num_rows) == (True, 6)
    assert report.columns == f"{words}; not read: url"


def test_sets_with_our_names_have_nothing_to_say(tmp_path):
    write_folder(tmp_path, [4, 3])
    assert look(tmp_path).found == check_shards(str(tmp_path), HERE).columns == ""


def test_derived_ids_do_not_depend_on_row_groups_or_on_the_folder(tmp_path):
    rows = [f"c{row}" for row in range(7)]
    write(tmp_path / "a" / "x.parquet", group=2, text=rows)
    write(tmp_path / "b" / "x.parquet", group=5, text=rows)
    found = [take(tmp_path / place, 7) for place in "ab"]
    pairs = [dict(zip(each.sample_ids, each.captions, strict=True)) for each in found]
    assert pairs[0] == pairs[1] == {f"x.parquet#{row}": f"c{row}" for row in range(7)}


def test_two_columns_that_may_be_the_caption_are_refused_by_name_until_one_is_chosen(tmp_path):
    write(tmp_path / "a.parquet", text=["a", "b"], prompt=["c", "d"], id=[7, 8])
    with pytest.raises(DataError, match=r"text and prompt.*data\.columns\.caption"):
        look(tmp_path, RecipeColumnNames())
    report = check_shards(str(tmp_path), CheckOptions(num_processes=0, names=OptionColumnNames()))
    assert not report.is_usable
    assert "text and prompt" in report.examples[0]
    assert "--caption-column" in report.examples[0]
    batch = take(tmp_path, 2, caption="prompt", sample_id="id")
    assert sorted(zip(batch.sample_ids, batch.captions, strict=True)) == [("7", "c"), ("8", "d")]
    chosen = OptionColumnNames(caption="text", sample_id="id")
    report = check_shards(str(tmp_path), CheckOptions(num_processes=0, names=chosen))
    assert report.is_usable
    told = "sample_id is column id; caption is column text; not read: prompt"
    assert report.columns == told


def test_shards_that_disagree_are_refused_unless_some_have_our_name(tmp_path):
    write(tmp_path / "a.parquet", text=["a", "b"])
    write(tmp_path / "b.parquet", prompt=["c", "d"])
    with pytest.raises(DataError, match="text and prompt"):
        look(tmp_path)
    assert "text and prompt" in check_shards(str(tmp_path), HERE).problems[0]
    write(tmp_path / "c.parquet", caption=["e"] * 9)
    report = check_shards(str(tmp_path), HERE)
    derived = "ids are derived from file and row (no column sample_id)"
    assert report.columns == f"caption is column caption; {derived}"
    assert "missing column caption" in report.examples[0]


@pytest.mark.parametrize("names", [{"caption": "txt"}, {"sample_id": "key"}])
def test_a_name_that_is_not_there_is_refused_with_the_columns_that_are(tmp_path, names):
    write(tmp_path / "a.parquet", text=["a"], width=[3])
    missing = next(iter(names.values()))
    with pytest.raises(DataError, match=rf"no column {missing} \(data\.columns.*text, width"):
        look(tmp_path, RecipeColumnNames(**names))


def test_of_a_larger_set_the_first_shards_are_named_as_what_was_looked_at(tmp_path):
    for number in range(10):
        words = {"text": ["a"]} if number < 8 else {"text": ["a"], "long": ["b"]}
        write(tmp_path / f"{number:02}.parquet", sample_id=[str(number)], **words)
    with pytest.raises(DataError, match=r"no column long \(.*\) in its first 8 shards; the col"):
        look(tmp_path, RecipeColumnNames(caption="long"))


TEXTS = ["a", "b", None]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
)
def test_captions_and_ids_may_be_text_of_any_kind(tmp_path, kind):
    is_bytes = "binary" in str(kind)
    values = [text.encode() if text and is_bytes else text for text in TEXTS]
    column = pa.array(values, kind)
    write(tmp_path / "a.parquet", 3, sample_id=column, caption=column)
    write(tmp_path / "b.parquet", 3, sample_id=["x"] * 97, caption=["x"] * 97)
    for s3 in (S3Settings(), IN_HERE):
        source = Source(str(tmp_path), s3)
        with Feed(StreamSettings(source, 0, max_bad_fraction=1), FeedProgress(), 3) as feed:
            batch = feed.take(3)
        assert sorted(batch.sample_ids) == sorted(batch.captions) == ["a", "b", "x"]
        assert "no_id" in [reject.reason for reject in batch.rejects]
    assert check_shards(str(tmp_path), HERE).bad == {"duplicate_id": 96, "no_id": 1}


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        (pa.array([5, 6], pa.uint64()), ["5", "6"]),
        (pa.array([Decimal(5), Decimal(6)], pa.decimal128(38, 0)), ["5", "6"]),
        (
            pa.array([uuid.UUID(int=number).bytes for number in (5, 6)], pa.uuid()),
            [str(uuid.UUID(int=number)) for number in (5, 6)],
        ),
    ],
)
def test_ids_may_be_numbers_and_uuids(tmp_path, ids, wanted):
    write(tmp_path / "a.parquet", sample_id=ids, caption=["a", "b"])
    for s3 in (S3Settings(), IN_HERE):
        assert sorted(take(tmp_path, 2, s3).sample_ids) == wanted
    assert check_shards(str(tmp_path), HERE).is_usable


def test_a_column_of_nulls_is_bad_row_by_row_and_gives_way_to_one_with_values(tmp_path):
    write(tmp_path / "a.parquet", sample_id=["a", "b"], caption=pa.nulls(2))
    assert check_shards(str(tmp_path), HERE).bad == {"empty_caption": 2}
    write(tmp_path / "a.parquet", sample_id=["a", "b"], caption=pa.nulls(2), text=["c", "d"])
    assert sorted(take(tmp_path, 2).captions) == ["c", "d"]
    told = "sample_id is column sample_id; caption is column text; not read: caption"
    assert check_shards(str(tmp_path), HERE).columns == told


def test_a_wrong_type_and_two_columns_of_one_name_are_told():
    wanted = REQUIRED_COLUMNS
    numbers = pa.schema([("sample_id", pa.int64()), ("caption", pa.int32())])
    found = map_columns(numbers, ColumnNames(), wanted)
    assert found == Fault("a type that cannot be read in column caption (int32)")
    twice = pa.schema([("sample_id", pa.int64()), ("caption", pa.string())] * 2)
    found = map_columns(twice, ColumnNames(), wanted)
    assert found == Fault("more than one column is named sample_id, caption")
    text = map_columns(numbers.append(pa.field("text", pa.string())), ColumnNames(), wanted)
    assert isinstance(text, ColumnMap)
    assert text.in_words() == "caption is column text"


def test_our_name_settles_a_set_and_a_given_one_is_kept():
    ours, other = pa.schema([("caption", pa.string())]), pa.schema([("text", pa.string())])
    assert settle_names([other, ours], ColumnNames()) == ColumnNames(caption="caption")
    assert settle_names([other, ours], ColumnNames("text")) == ColumnNames(caption="text")


def as_hugging_face_stores(folder: Path, path: Path, name: str = "video") -> int:
    """One file of video structs, without ids and rates, out of rendered clips."""
    write_shards(str(folder), num_clips=6, shard_size=6, seed=0)
    table = pq.read_table(next(folder.glob("*.parquet")))
    videos = [{"bytes": value, "path": None} for value in table[VIDEO].to_pylist()]
    videos[2] = {"bytes": None, "path": "clips/../c.mp4"}
    videos[4] = {"bytes": None, "path": None}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    write(path, 4, text=table["caption"], **{name: pa.array(videos, kind)})
    return table.num_rows


def encoded_reasons(folder: Path) -> list[str]:
    """Reasons by which `sgmd encode` takes no row, "" where it takes it."""
    parts = plan_parts(Catalogue(*open_folder(str(folder)), 1000), 8)
    tasks = pa.table({TASK: [pickle.dumps(part) for part in parts]})
    decode = ClipDecoder(ClipFormat(13, 32, 32), DEFAULT_LIMITS)
    clips = {"columns": ("video",), "decode": decode, "pixel_shape": (13, 32, 32, 3)}
    lines = pa.concat_tables(read_and_decode(tasks, Source(str(folder), max_hang_s=0, **clips)))
    return [
        "" if line[REASON] is None else join_reason(line[REASON], line[DETAIL])
        for line in lines.to_pylist()
    ]


@pytest.mark.slow
def test_video_structs_are_read_and_a_single_file_of_them_is_a_set(tmp_path):
    path = tmp_path / "hub" / "data.parquet"
    as_hugging_face_stores(tmp_path / "clips", path)
    for url in (path, path.parent):
        report = check_shards(str(url), HERE)
        assert (report.kind, report.num_rows, report.decoded) == ("video", 6, 6)
        assert report.videos["sizes"] == {"32x32": 4}
        assert report.bad == {"missing_video": 2}
        alone = "missing_video (a path alone, clips/../c.mp4; its file is not in the set)"
        rest = "data.parquet, row 4: missing_video"
        assert report.examples == [f"data.parquet, row 2: {alone}", rest]
        assert report.columns == (
            "caption is column text; video is column video; "
            "ids are derived from file and row (no column sample_id)"
        )
        assert len(take(url, 6).sample_ids) == 6
        assert "data.parquet#3" in take(url, 6).sample_ids
    for s3 in (S3Settings(), IN_HERE):
        source = Source(str(path), s3, columns=(VIDEO, FPS))
        settings = StreamSettings(source, 0, max_bad_fraction=1)
        with Feed(settings, FeedProgress(), 5) as feed:
            batch = feed.take(5)
        assert "data.parquet#2" not in batch.sample_ids
        rejects = {(reject.row_group, reject.row, reject.why) for reject in batch.rejects}
        assert rejects == {(0, 2, alone), (1, 0, "missing_video")}
    assert encoded_reasons(path.parent) == ["", "", alone, "", "missing_video", ""]
    (path.parent / "other.parquet").write_bytes(b"no shard")
    assert look(path).num_shards == 1
    assert check_shards(str(path), HERE).num_shards == 1
    with pytest.raises(DataError, match="single file"):
        check_shards(str(path), CheckOptions(num_processes=0, write_index=True))


def test_a_video_column_is_named_by_option(tmp_path):
    as_hugging_face_stores(tmp_path / "clips", tmp_path / "hub" / "data.parquet", "mp4")
    arguments = ["check", str(tmp_path / "hub"), "--json", "--processes", "0"]
    found = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert found["kind"] == "captions"
    found = json.loads(CliRunner().invoke(app, [*arguments, "--video-column", "mp4"]).stdout)
    assert (found["kind"], found["decoded"]) == ("video", 6)
    assert "video is column mp4" in found["columns"]


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl", "txt"])
def test_check_says_what_it_reads_of_a_file_of_captions(tmp_path, suffix):
    path = tmp_path / f"prompts.{suffix}"
    rows = [{"Text": f"words {row}", "id": row, "score": 0.5} for row in range(3)]
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "csv":
        path.write_text(
            "\n".join(["Text,id,score", *(",".join(map(str, row.values())) for row in rows)])
        )
    else:
        words = [row["Text"] for row in rows] if suffix == "txt" else map(json.dumps, rows)
        path.write_text("\n".join(map(str, words)))
    told = "caption is column Text; sample_id is a digest of it (no column sample_id); not read: id"
    if suffix == "txt":
        told = "caption is each line; sample_id is a digest of it"
        assert check_shards(str(path), HERE).columns == told
        return
    assert check_shards(str(path), HERE).columns == f"{told}, score"
    named = replace(HERE, names=OptionColumnNames(sample_id="id"))
    told = "caption is column Text; sample_id is column id; not read: score"
    assert check_shards(str(path), named).columns == told


def test_check_names_the_columns_that_it_does_not_read(tmp_path):
    write(tmp_path / "a.parquet", caption=["one"], sample_id=["a"], mp4=[b"film"])
    told = "sample_id is column sample_id; caption is column caption; not read: mp4"
    assert check_shards(str(tmp_path), HERE).columns == told


def test_codes_of_a_terminal_in_names_and_paths_of_foreign_data_are_shown_as_escapes(tmp_path):
    name, path = "na\x1b[31mme", "/etc/pass\x1b]0;pwn\x07wd"
    video = pa.array([{"bytes": None, "path": path}], pa.struct({"bytes": "binary", "path": "str"}))
    codes = {name: ["x"], "Te\x9bxt": [1]}
    write(tmp_path / "video" / "a\x1b[1mb.parquet", caption=["one"], video=video, **codes)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.csv").write_text(f"caption,{name}\none,two\n")
    write(tmp_path / "two" / "a.parquet", Text=["one"], text=["two"], **codes)
    shown, alone = "na\\x1b[31mme", "/etc/pass\\x1b]0;pwn\\x07wd"
    for place, words in (
        (
            "video",
            [f"not read: {shown}, Te\\x9bxt", f"a path alone, {alone}", "a\\x1b[1mb.parquet"],
        ),
        ("rows/a.csv", [f"not read: {shown}"]),
        ("two", ["Text and text"]),
        ("two --caption-column x", [f"{shown}, Te\\x9bxt", "Name one of these"]),
    ):
        folder, *options = place.split()
        arguments = ["check", str(tmp_path / folder), *options, "--processes", "0"]
        told = CliRunner().invoke(app, arguments, env={"COLUMNS": "400"}).output
        assert not re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", told), told
        for expected in words:
            assert expected in told


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_a_file_of_captions_with_two_columns_of_them_needs_a_name(tmp_path, suffix):
    rows = [{"text": f"t{row}", "prompt": f"p{row}", "id": row} for row in range(4)]
    path = tmp_path / f"captions.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "csv":
        lines = ["text,prompt,id", *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"text and prompt.*data\.columns\.caption"):
        look(path, RecipeColumnNames())
    batch = take(path, 4, caption="prompt", sample_id="id")
    pairs = dict(zip(batch.sample_ids, batch.captions, strict=True))
    assert pairs == {str(row): f"p{row}" for row in range(4)}
    assert sorted(take(path, 4, caption="text").captions) == [f"t{row}" for row in range(4)]
