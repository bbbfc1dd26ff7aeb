"""A column that a command is told to read and that is not there is refused before any work."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.data.clips.clip_format import ClipFormat
from pipelines.data.encoding.encode import encode
from pipelines.data.encoding.encode_options import EncodeOptions
from pipelines.data.shards.columns import OptionColumnNames, RecipeColumnNames
from pipelines.data.stream.inspect import inspect_folder
from pipelines.data.stream.plan import ShuffleSettings
from pipelines.data.stream.source import Source
from sgmd_core.errors import DataError

ROWS = {"Key": ["a", "b"], "text": ["one", "two"], "clip_bytes": [b"v", b"w"]}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The same rows as a folder of shards, a shard, and manifests of every kind."""
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table(ROWS), tmp_path / "set" / "0.parquet")
    (tmp_path / "list.csv").write_text("Key,text,file\na,one,a.mp4\n")
    (tmp_path / "list.jsonl").write_text(json.dumps({"Key": "a", "text": "one", "file": "a.mp4"}))
    (tmp_path / "list.json").write_text(json.dumps([{"Key": "a", "text": "b", "file": "a.mp4"}]))
    (tmp_path / "prompts.txt").write_text("words\n")
    return tmp_path


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


@pytest.mark.slow
@pytest.mark.parametrize("source", ["set", "set/0.parquet"])
@pytest.mark.parametrize(
    ("option", "given", "nearest"),
    [("caption", "txt", "text"), ("id", "keys", "Key"), ("video", "clip_byte", "clip_bytes")],
)
def test_check_and_encode_name_the_columns_and_the_nearest(
    place: Path, source: str, option: str, given: str, nearest: str
) -> None:
    found = refused("check", place / source, f"--{option}-column", given)
    words = (
        f"no column {given} (--{option}-column); the columns are Key, text, clip_bytes",
        f"The nearest is {nearest}.",
    )
    assert all(each in found for each in words), found
    names = {"caption": "text", "sample_id": "Key", "video": "clip_bytes"}
    names["sample_id" if option == "id" else option] = given
    options = EncodeOptions(ClipFormat(5, 32, 32, 8), names=OptionColumnNames(**names))
    assets = Path(__file__).parents[4] / "assets" / "tiny-wan"
    with pytest.raises(DataError, match=f"The nearest is {nearest}"):
        encode(str(place / source), str(place / "out"), str(assets), options)
    assert not (place / "out").exists()


def test_training_refuses_them_too(place: Path) -> None:
    source = Source(str(place / "set"), names=RecipeColumnNames(caption="nope"))
    with pytest.raises(DataError, match=r"no column nope \(data\.columns\.caption\)"):
        inspect_folder(source, 0, ShuffleSettings())


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl", "list.json"])
@pytest.mark.parametrize("option", ["path", "caption", "id"])
def test_prepare_refuses_them_in_every_manifest(place: Path, name: str, option: str) -> None:
    names = {"path": "file", "caption": "text", "id": "Key", option: "files"}
    options = [part for key, value in names.items() for part in (f"--{key}-column", value)]
    found = refused("prepare", place / name, place / "out", *options)
    assert "the columns Key, text, file; no column files" in found
    assert "Nearest: file for files" in found
    assert not (place / "out").exists()


def test_columns_are_refused_where_there_are_none(place: Path) -> None:
    (place / "clips").mkdir()
    (place / "clips" / "a.mp4").write_bytes(b"v")
    out = place / "out"
    assert "--id-column" in refused("prepare", place / "clips", out, "--id-column", "key")
    assert "--path-column" in refused("prepare", place / "clips", out, "--path-column", "file")
    text = place / "prompts.txt"
    assert "--caption-column" in refused("prepare", text, out, "--caption-column", "words")
    assert "--caption-column" in refused("check", text, "--caption-column", "words")
    assert "--video-column" in refused("check", place / "list.csv", "--video-column", "clip")
