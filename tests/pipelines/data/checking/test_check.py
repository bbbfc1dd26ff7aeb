"""`sgmd check`: known sets give known figures, and each kind of damage is found."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from s3fs import S3FileSystem
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.data.checking.check import CheckOptions, check_shards
from pipelines.data.checking.check_group import choose_rows
from pipelines.data.checking.check_report import quantiles
from pipelines.data.clips.clip_format import ClipLimits
from pipelines.data.shards.schema import Encoding, encoded_schema
from pipelines.data.shards.values import pack_tensor
from pipelines.data.stream.inspect import inspect_folder
from pipelines.data.stream.plan import ShuffleSettings
from pipelines.data.stream.source import Source
from pipelines.media.video import encode_mp4
from pipelines.shapes import NUM_FRAMES, write_shards
from sgmd_core.errors import DataError
from tests.helpers.hanging import HangingBound
from tests.helpers.s3_server import serve_s3, use_server
from tests.helpers.shards import byte_strings, write_folder, write_shard, write_unknown_page

HERE = CheckOptions(num_processes=0)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean") / "train"
    write_shards(str(folder), num_clips=24, shard_size=8, seed=0)
    return folder


@pytest.fixture
def clips(clean: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged: three shards of eight rendered clips."""
    return Path(shutil.copytree(clean, tmp_path / "clips"))


def damage(shard: Path, column: str, row: int, value: object) -> None:
    """Changes one value of a shard; the index is taken away, since sizes change."""
    table = pq.read_table(shard)
    values = table[column].to_pylist()
    values[row] = value
    place, field = table.schema.get_field_index(column), table.field(column)
    made = byte_strings(values) if field.type == pa.string() else pa.array(values, field.type)
    table = table.set_column(place, field, made)
    pq.write_table(table, shard, row_group_size=4)
    (shard.parent / "_index.json").unlink(missing_ok=True)


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def captions_of(folder: Path) -> list[str]:
    return [
        text for path in shards_of(folder) for text in pq.read_table(path)["caption"].to_pylist()
    ]


def encoded_folder(folder: Path, num_rows: int = 6) -> Encoding:
    encoding = Encoding((2, 1, 2, 2), (3, 4), "float32", "made-by-vae", "made-by-text")
    rows = [
        {
            "sample_id": f"s{row}",
            "caption": f"clip {row}",
            "latents": pack_tensor(torch.full((2, 1, 2, 2), float(row)), "float32"),
            "text_embeds": pack_tensor(torch.ones(2, 4), "float32"),
        }
        for row in range(num_rows)
    ]
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows, schema=encoded_schema(encoding))
    pq.write_table(table, folder / "a.parquet", row_group_size=4)
    return encoding


class TestGoodSets:
    @pytest.mark.slow
    def test_a_rendered_set_has_the_figures_it_was_made_with(self, clips):
        report = check_shards(str(clips), HERE)
        assert report.is_usable
        assert (report.kind, report.num_shards, report.num_rows, report.decoded) == (
            "video",
            3,
            24,
            24,
        )
        assert report.videos["sizes"] == {"32x32": 24}
        assert report.videos["fps"] == {"8": 24}
        assert report.videos["frames"]["min"] == report.videos["frames"]["max"] == NUM_FRAMES
        assert report.videos["seconds"]["median"] == NUM_FRAMES / 8
        assert report.videos["sound"] == {"no": 24}
        captions = [
            t for path in shards_of(clips) for t in pq.read_table(path)["caption"].to_pylist()
        ]
        assert report.captions["distinct"] == len(set(captions))
        assert report.captions["characters"]["max"] == max(map(len, captions))

    @pytest.mark.slow
    @pytest.mark.usefixtures("forked_libraries")
    def test_processes_find_the_same_as_none(self, clips):
        damage(shards_of(clips)[1], "video", 3, b"broken")
        reports = [check_shards(str(clips), CheckOptions(num_processes=n)) for n in (0, 2)]
        assert reports[0] == reports[1]

    @pytest.mark.slow
    @pytest.mark.usefixtures("forked_libraries")
    def test_a_video_whose_decoding_hangs_costs_its_row(self, clips):
        shard = shards_of(clips)[1]
        damage(shard, "video", 3, encode_mp4(np.zeros((5, 48, 48, 3), np.uint8), 8))
        damage(shard, "video", 2, b"broken")
        limits = ClipLimits(max_pixels=HangingBound(40_000_000))
        options = CheckOptions(num_processes=1, limits=limits, max_hang_s=1.0)
        report = check_shards(str(clips), options)
        assert report.bad == {"undecodable": 1, "too_slow": 1}
        assert any(f"{shard.name}, row 3" in each for each in report.examples), report.examples
        assert (report.decoded, report.videos["sizes"]) == (24, {"32x32": 22})

    def test_a_sample_decodes_as_many_rows_as_wanted(self, clips):
        report = check_shards(str(clips), CheckOptions(sample=5, num_processes=0))
        assert (report.decoded, report.num_rows) == (5, 24)
        assert choose_rows(100, 7, 0).tolist() == choose_rows(100, 7, 0).tolist()
        assert choose_rows(100, 7, 0).tolist() != choose_rows(100, 7, 1).tolist()
        assert choose_rows(5, 7, 0).tolist() == [0, 1, 2, 3, 4]
        assert len(set(choose_rows(100, 50, 0).tolist())) == 50

    def test_captions_alone_are_a_set_too(self, tmp_path):
        write_folder(tmp_path, [5, 4])
        report = check_shards(str(tmp_path), HERE)
        assert (report.is_usable, report.kind, report.num_rows) == (True, "captions", 9)
        assert (report.decoded, report.videos) == (0, {})

    def test_files_that_are_not_read_are_counted_and_suffixes_in_upper_case_are(self, tmp_path):
        table = pa.table({"caption": ["one", "two"]})
        for name in ("a.parquet", "b.PARQUET", "c.parq", "d.parquet.gz"):
            pq.write_table(table, tmp_path / name)
        for name in ("_SUCCESS", ".a.parquet.crc", "quarantine.parquet"):
            (tmp_path / name).write_bytes(b"")
        report = check_shards(str(tmp_path), HERE)
        assert report.num_rows == 4
        assert report.others.startswith("2 files that are not .parquet and are not read")
        assert report.others.endswith("such as c.parq")
        (tmp_path / "c.parq").unlink()
        (tmp_path / "d.parquet.gz").unlink()
        assert check_shards(str(tmp_path), HERE).others == ""

    def test_tokens_are_counted_with_the_end_of_the_caption(self, tmp_path):
        write_shard(tmp_path / "a.parquet", ["a", "b", "c"], ["one", "one two", "one two three"])
        counted = CheckOptions(
            num_processes=0,
            count_tokens=lambda captions: [len(caption.split()) + 1 for caption in captions],
            text_length=3,
        )
        report = check_shards(str(tmp_path), counted)
        assert report.captions["tokens"]["max"] == 4
        assert report.captions["cut"] == 1

    def test_encoded_values_are_tried(self, tmp_path):
        encoding = encoded_folder(tmp_path / "set")
        report = check_shards(str(tmp_path / "set"), HERE)
        assert (report.is_usable, report.kind, report.decoded) == (True, "encoded", 6)
        assert report.encoding is not None
        assert report.encoding["vae"] == encoding.vae

    def test_embeddings_without_latents_are_tried(self, tmp_path):
        encoding = Encoding((), (3, 4), "float32", "", "made-by-text")
        good, bad = torch.ones(2, 4), torch.full((2, 4), torch.nan)
        rows = [
            {"sample_id": f"s{row}", "caption": "c", "text_embeds": pack_tensor(text, "float32")}
            for row, text in enumerate((good, good, bad))
        ]
        table = pa.Table.from_pylist(rows, schema=encoded_schema(encoding))
        pq.write_table(table, tmp_path / "a.parquet")
        report = check_shards(str(tmp_path), replace(HERE, max_bad_fraction=0.5))
        assert (report.is_usable, report.kind, report.decoded) == (True, "text", 3)
        assert report.bad == {"bad_encoding": 1}

    def test_quantiles_of_known_numbers(self):
        found = quantiles(range(101))
        assert found == {"min": 0, "p5": 5, "median": 50, "p95": 95, "max": 100}
        assert quantiles([]) == {}


class TestDamage:
    @pytest.mark.parametrize(
        ("column", "value", "reason"),
        [
            ("video", b"no video", "undecodable"),
            ("video", b"", "missing_video"),
            ("video", None, "missing_video"),
            ("caption", "  ", "empty_caption"),
            ("caption", None, "empty_caption"),
            ("caption", "word " * 1000, "long_caption"),
            ("caption", b"gr\xf6n", "unreadable_caption"),
            ("sample_id", None, "no_id"),
            ("sample_id", b"gr\xf6n", "no_id"),
            ("sample_id", "shapes-0-train-0000001", "duplicate_id"),
        ],
    )
    def test_a_bad_row_is_named_with_its_reason(self, clips, column, value, reason):
        damage(shards_of(clips)[1], column, 5, value)
        report = check_shards(str(clips), HERE)
        assert report.bad == {reason: 1}
        assert not report.is_usable
        assert report.examples[0].startswith(f"{shards_of(clips)[1].name}, row 5: {reason}")
        assert check_shards(
            str(clips), CheckOptions(num_processes=0, max_bad_fraction=0.05)
        ).is_usable

    def test_a_shard_that_is_cut_short_counts_as_many_rows_as_the_others(self, clips):
        shard = shards_of(clips)[0]
        shard.write_bytes(shard.read_bytes()[:-50])
        (clips / "_index.json").unlink(missing_ok=True)
        report = check_shards(str(clips), HERE)
        assert report.bad == {"unreadable_shard": 8}
        assert report.num_rows == 24
        assert shard.name in report.examples[0]

    def test_a_row_group_that_ends_before_its_rows_is_bad(self, tmp_path):
        names = [f"clip-{row}" for row in range(12)]
        write_unknown_page(tmp_path / "a.parquet", pa.table({"sample_id": names, "caption": names}))
        report = check_shards(str(tmp_path), HERE)
        assert report.bad == {"unreadable_rows": 4}
        assert "0 rows; the footer promises 4" in report.examples[0]

    def test_a_corrupt_row_group_is_bad_and_the_others_are_read(self, tmp_path):
        encoded_folder(tmp_path / "set", num_rows=8)
        shard = tmp_path / "set" / "a.parquet"
        data = bytearray(shard.read_bytes())
        data[4:40] = b"\xff" * 36
        shard.write_bytes(data)
        report = check_shards(str(tmp_path / "set"), HERE)
        assert report.bad == {"unreadable_rows": 4}
        assert report.decoded == 4

    def test_a_missing_column_is_told(self, clips):
        shard = shards_of(clips)[2]
        pq.write_table(pq.read_table(shard).drop_columns(["fps"]), shard)
        (clips / "_index.json").unlink(missing_ok=True)
        report = check_shards(str(clips), HERE)
        assert "fps" in report.examples[0]
        assert not report.is_usable

    @pytest.mark.slow
    def test_an_index_that_differs_from_the_folder_is_told_and_can_be_written_anew(self, clips):
        assert check_shards(str(clips), CheckOptions(num_processes=0, write_index=True)).is_usable
        shards_of(clips)[0].rename(clips / "renamed.parquet")
        report = check_shards(str(clips), HERE)
        assert not report.is_usable
        assert len(report.problems) == 2
        assert "--write-index" in report.problems[0]
        assert check_shards(str(clips), CheckOptions(num_processes=0, write_index=True)).is_usable

    def test_shards_of_several_kinds_are_no_set(self, clips):
        write_shard(clips / "z.parquet", ["x"])
        (clips / "_index.json").unlink(missing_ok=True)
        report = check_shards(str(clips), HERE)
        assert report.problems == ["shards of several kinds: 3 video, 1 captions"]

    @pytest.mark.parametrize(
        "value", [b"", bytes(31), pack_tensor(torch.full((8,), float("nan")), "float32")]
    )
    def test_latents_of_another_shape_or_without_numbers_are_bad(self, tmp_path, value):
        encoded_folder(tmp_path / "set")
        damage(tmp_path / "set" / "a.parquet", "latents", 2, value)
        assert check_shards(str(tmp_path / "set"), HERE).bad == {"bad_encoding": 1}

    def test_a_folder_without_shards_is_a_wrong_request(self, tmp_path):
        with pytest.raises(DataError, match="sgmd prepare"):
            check_shards(str(tmp_path), HERE)


@pytest.mark.slow
def test_a_bucket_is_checked_like_a_folder(clips, tmp_path, monkeypatch):
    damage(shards_of(clips)[1], "video", 3, b"broken")
    shutil.copytree(clips, tmp_path / "s3" / "bucket" / "set")
    with serve_s3(tmp_path / "s3") as server:
        use_server(server.environment, monkeypatch)
        there = check_shards("s3://bucket/set", HERE).to_json()
    S3FileSystem.clear_instance_cache()
    assert there | {"folder": ""} == check_shards(str(clips), HERE).to_json() | {"folder": ""}


class TestCommand:
    def sgmd(self, *arguments: str | Path):
        return CliRunner().invoke(app, ["check", *map(str, arguments), "--processes", "0"])

    def test_the_exit_code_is_the_verdict(self, clips, tmp_path):
        good = self.sgmd(clips, "--json")
        assert good.exit_code == 0
        assert json.loads(good.stdout)["usable"] is True
        damage(shards_of(clips)[0], "caption", 0, "")
        bad = self.sgmd(clips, "--json")
        assert bad.exit_code == 1
        assert json.loads(bad.stdout)["bad"] == {"empty_caption": 1}
        assert self.sgmd(tmp_path / "nowhere").exit_code == 2

    def test_the_table_ends_with_the_verdict(self, clips):
        damage(shards_of(clips)[0], "caption", 0, "")
        lines = self.sgmd(clips).stdout.strip().splitlines()
        assert lines[-1] == f"{clips}: NOT USABLE"
        assert "empty_caption" in lines[-2]

    def test_a_model_counts_tokens(self, clips):
        tiny = Path(__file__).parents[4] / "assets" / "tiny-wan"
        result = self.sgmd(clips, "--json", "--model", tiny, "--text-length", "6", "--sample", "0")
        found = json.loads(result.stdout)["captions"]
        captions = [
            t for path in shards_of(clips) for t in pq.read_table(path)["caption"].to_pylist()
        ]
        # One token a word, and the end.
        words = [len(caption.split()) + 1 for caption in captions]
        assert found["tokens"]["max"] == max(words)
        assert found["cut"] == sum(length > 6 for length in words)


def test_a_folder_without_captions_is_told_with_its_columns(tmp_path: Path):
    pq.write_table(pa.table({"clip": ["a"], "width": [1]}), tmp_path / "0.parquet")
    report = check_shards(str(tmp_path), CheckOptions(num_processes=0))
    assert not report.is_usable
    assert report.problems == ["no row can be read: 1 of 1 shards are bad"]
    assert "missing column caption (the columns are clip, width)" in report.examples[0]


def test_a_file_of_captions_has_its_own_size(tmp_path: Path):
    file = tmp_path / "captions.txt"
    file.write_text("a cat\na dog\n")
    report = check_shards(str(file), CheckOptions(num_processes=0))
    assert (report.num_rows, report.num_bytes) == (2, file.stat().st_size)


def test_a_file_that_is_no_shard_by_its_name_is_told_so(clips: Path):
    shutil.copy(shards_of(clips)[0], clips / "_prompts.parquet")
    with pytest.raises(DataError, match="names that begin with _ or"):
        check_shards(str(clips / "_prompts.parquet"), CheckOptions(num_processes=0))


@pytest.mark.slow
@pytest.mark.usefixtures("forked_libraries")
def test_a_set_whose_making_stopped_halfway_is_not_called_whole(tmp_path):
    manifest = tmp_path / "captions.csv"
    manifest.write_text('caption\na red circle\na blue bar\n" "\n')
    made = ["prepare", str(manifest), str(tmp_path / "set"), "--captions-only"]
    runner = CliRunner()
    assert runner.invoke(app, made).exit_code == 2, "one caption of three is blank"
    looked = runner.invoke(app, ["check", str(tmp_path / "set")])
    assert looked.exit_code == 0
    assert "not whole" in looked.output
    assert "_index.json" in looked.output
    first_look = inspect_folder(Source(str(tmp_path / "set")), 0, ShuffleSettings())
    assert "not whole" in first_look.unfinished
    assert runner.invoke(app, [*made, "--max-bad-fraction", "0.5"]).exit_code == 0
    assert check_shards(str(tmp_path / "set"), HERE).unfinished == ""
    assert "not whole" not in runner.invoke(app, ["check", str(tmp_path / "set")]).output


def test_a_bad_row_of_a_file_of_captions_is_named_in_that_file(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.data.making.caption_file._SHARD_ROWS", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    table = tmp_path / "captions.csv"
    table.write_text("prompt,id\na,1\nb,2\nc,3\n ,4\n")
    report = check_shards(str(table), HERE)
    assert report.num_shards == 2
    assert report.examples == ["captions.csv, row 3: empty_caption (nothing but blanks)"]
