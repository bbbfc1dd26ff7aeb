"""A file of captions as a data set: the same rows, checks and positions as a folder of shards."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem

from pipelines.data.checking.check import CheckOptions, check_shards
from pipelines.data.making.caption_file import JOB_FOLDER, open_set, read_prompts
from pipelines.data.making.prepare import PrepareOptions, prepare
from pipelines.data.making.source_clip import Columns
from pipelines.data.stream.batch import Batch
from pipelines.data.stream.feed import Feed, FeedProgress, StreamSettings
from pipelines.data.stream.inspect import first_captions, inspect_folder
from pipelines.data.stream.plan import ShuffleSettings
from pipelines.data.stream.source import Source
from pipelines.submitting.request import TRAVELLING
from sgmd_core.errors import DataError
from tests.helpers.s3_server import serve_s3, use_server

CAPTIONS = [f"a red circle moves left {number} times" for number in range(70)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path: Path, captions: list[str] = CAPTIONS) -> Path:
    rows = [{"prompt": caption, "length_s": 2} for caption in captions]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    texts = {
        ".txt": "\n\n".join(captions),
        ".csv": "\n".join(["prompt,length_s", *(f'"{text}",2' for text in captions)]),
        ".tsv": "\n".join(["prompt\tlength_s", *(f"{text}\t2" for text in captions)]),
        ".json": json.dumps(rows),
        ".jsonl": "\n".join(map(json.dumps, rows)),
    }
    path.write_text(texts[path.suffix])
    return path


def take(
    path: Path | str, num_rows: int, progress: FeedProgress = FeedProgress(), **settings
) -> Batch:
    wanted = StreamSettings(Source(str(path)), seed=3, **settings)
    with Feed(wanted, progress, num_rows) as feed:
        return feed.take(num_rows)


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_a_file_of_any_kind_is_streamed_each_caption_once_in_the_order_of_the_seed(
    tmp_path, suffix
):
    path = write(tmp_path / f"prompts{suffix}")
    assert inspect_folder(Source(str(path)), 3, ShuffleSettings()).num_rows == len(CAPTIONS)
    batch = take(path, len(CAPTIONS))
    assert sorted(batch.captions) == sorted(CAPTIONS)
    assert batch.captions != tuple(CAPTIONS)
    assert batch.captions == take(path, len(CAPTIONS)).captions
    assert first_captions(str(path), Source("").s3, 3, 5) == batch.captions[:5]


def test_every_kind_of_file_gives_the_same_ids_in_the_same_order(tmp_path):
    batches = {
        suffix: take(write(tmp_path / f"prompts{suffix}"), len(CAPTIONS))
        for suffix in (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")
    }
    assert len({batch.sample_ids for batch in batches.values()}) == 1


def test_a_bad_row_is_quarantined_with_its_place_in_the_file_and_counted_by_check(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"caption": text}) for text in CAPTIONS]
    lines[40] = "{broken"
    lines[50] = '{"caption": "  "}'
    path.write_text("\n".join(lines))
    batch = take(path, 68, max_bad_fraction=0.1)
    assert sorted(batch.captions) == sorted(CAPTIONS[:40] + CAPTIONS[41:50] + CAPTIONS[51:])
    reasons = sorted(reject.why for reject in batch.rejects)
    assert reasons[0] == "bad_manifest_row (row 40 of the file: no JSON object: {broken)"
    assert len(reasons) == 2
    report = check_shards(str(path), CheckOptions(num_processes=0))
    assert report.bad == {"bad_manifest_row": 1, "empty_caption": 1}
    assert (report.kind, report.num_rows) == ("captions", 70)


def test_an_object_with_a_key_twice_is_no_row_and_not_the_last_value(tmp_path):
    twice = '{"prompt": "a red circle", "prompt": "another"}'
    lines = [json.dumps({"prompt": CAPTIONS[0]}), twice, json.dumps({"prompt": CAPTIONS[1]})]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines))
    report = check_shards(str(path), CheckOptions(num_processes=0))
    assert (report.num_rows, report.bad) == (3, {"bad_manifest_row": 1})
    whole = tmp_path / "prompts.json"
    whole.write_text(f"[{twice}]")
    with pytest.raises(DataError, match=r"the key 'prompt' twice in an object"):
        read_prompts(str(whole))


def test_a_run_goes_on_within_a_file_and_refuses_one_that_has_changed(tmp_path):
    path = write(tmp_path / "prompts.txt")
    whole = take(path, 60)
    first = take(path, 20)
    so_far = FeedProgress(first.cursor, first.position, first.notes, (), first.sample_ids)
    assert take(path, 40, so_far).captions == whole.captions[20:]
    write(path, [*CAPTIONS[:-1], "a blue square"])
    with pytest.raises(DataError, match="a file that has changed since the run began"):
        take(path, 40, so_far)
    write(path)
    assert take(path, 40, so_far).captions == whole.captions[20:]


@pytest.mark.slow
def test_a_file_in_a_bucket_is_the_same_set(tmp_path, monkeypatch):
    here = take(write(tmp_path / "prompts.txt"), 40)
    (tmp_path / "s3" / "bucket").mkdir(parents=True)
    write(tmp_path / "s3" / "bucket" / "prompts.txt")
    with serve_s3(tmp_path / "s3") as server:
        use_server(server.environment, monkeypatch)
        there = take("s3://bucket/prompts.txt", 40)
        report = check_shards("s3://bucket/prompts.txt", CheckOptions(num_processes=0))
        with pytest.raises(DataError, match="Check the address"):
            take("s3://bucket/nowhere.txt", 1)
    S3FileSystem.clear_instance_cache()
    assert (there.sample_ids, there.captions) == (here.sample_ids, here.captions)
    assert report.is_usable


def test_a_changed_file_is_read_anew_within_one_process(tmp_path):
    path = write(tmp_path / "prompts.txt")
    take(path, 1)
    write(path, ["a blue square"])
    assert take(path, 1).captions == ("a blue square",)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "words,length\na red circle,2\n", "no column caption, prompt or text"),
        ("a.csv", "id;words\n1;a red circle\n", "the columns id, words; no column caption"),
        ("a.csv", "a red circle\na blue bar\n", "whose first line names the columns"),
        ("a.csv", "a red circle,3\na blue bar,4\n", "put a line such as caption before it"),
        ("a.txt", "\n  \n", "no row"),
        ("a.json", "{broken", "no JSON"),
        ("a.json", '{"a": {"b": 1}}', "an object with the keys a"),
        ("a.txt", None, "Check the address"),
    ],
)
def test_a_file_without_captions_is_refused_in_one_sentence(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        inspect_folder(Source(str(tmp_path / name)), 0, ShuffleSettings())


def test_a_file_that_went_along_with_a_job_is_asked_for_again(tmp_path, monkeypatch):
    assert str(TRAVELLING) == JOB_FOLDER  # in two places, as jobs load none of the data plane
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"went along with a submitted job.*--captions"):
        take("submitted/data.train/prompts.txt", 1)
    (tmp_path / "submitted" / "data.train").mkdir(parents=True)
    write(tmp_path / "submitted" / "data.train" / "prompts.txt")
    assert take("submitted/data.train/prompts.txt", 1).captions


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match="Set XDG_CACHE_HOME"):
        take(write(tmp_path / "prompts.txt"), 1)


def test_prompts_are_read_in_the_order_of_their_file_or_refused(tmp_path):
    assert read_prompts(str(write(tmp_path / "prompts.csv"))) == CAPTIONS
    (tmp_path / "bad.txt").write_bytes(b"a red circle\n\xff\n")
    with pytest.raises(DataError, match="1 rows that are not captions"):
        read_prompts(str(tmp_path / "bad.txt"))


@pytest.mark.parametrize("suffix", [".tsv", ".json", ".parquet"])
def test_a_manifest_of_captions_becomes_shards(tmp_path, suffix):
    options = PrepareOptions(columns=Columns(None, "prompt"), num_processes=0)
    target = tmp_path / "shards"
    report = prepare(str(write(tmp_path / f"prompts{suffix}")), str(target), options)
    assert report.num_clips == len(CAPTIONS)
    batch = take(target, len(CAPTIONS))
    assert sorted(batch.captions) == sorted(CAPTIONS)


def test_an_object_of_captions_names_its_samples(tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"one": "a red circle", "two": "a blue square"}))
    batch = take(path, 2)
    found = dict(zip(batch.sample_ids, batch.captions, strict=True))
    assert found == {"one": "a red circle", "two": "a blue square"}


@pytest.mark.parametrize("name", ["clip.mp4", "noise.bin", "noise"])
def test_a_file_of_another_kind_is_named_and_not_searched_for_an_index(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match=r"neither a Parquet shard nor a list") as caught:
        open_set(str(tmp_path / name))
    assert "_index.json" not in str(caught.value)
    assert "sgmd prepare" in str(caught.value)
