"""`sgmd encode`: the plan, the stages, the counting; and the whole, killed in the middle."""

import json
import os
import pickle
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from cluster.errors import InsufficientResourcesError
from pipelines.cli import app
from pipelines.data.clips.clip_decoding import ClipDecoder, decode_clip
from pipelines.data.clips.clip_format import ClipFormat, FitPolicy
from pipelines.data.encoding import encode_stages as stages
from pipelines.data.encoding.encode import EncodeReport, encode, encodings_for
from pipelines.data.encoding.encode_options import ActorPool, EncodeOptions, dtype_named
from pipelines.data.encoding.encode_plan import Part, SourceGroup, digest, plan_parts
from pipelines.data.encoding.encode_writer import PartWriter
from pipelines.data.making.journal import open_journal
from pipelines.data.shards.columns import ColumnNames, OptionColumnNames
from pipelines.data.shards.filesystem import open_folder
from pipelines.data.shards.index import read_index
from pipelines.data.shards.schema import Encoding, encoding_of, video_schema
from pipelines.data.shards.values import unpack_latents, unpack_text
from pipelines.data.stream.catalogue import Catalogue
from pipelines.data.stream.source import Source
from pipelines.shapes import ClipSplit, captions, write_shards
from sgmd_core.errors import ConfigError, DataError, ShapeError
from tests.e2e.processes import ROOT
from tests.helpers import tiny_wan
from tests.helpers.forked_python import forked_python, kill
from tests.helpers.hanging import HANG, OddDecoder
from tests.helpers.shards import byte_strings, write_folder
from workers.models.wan import load_vae
from workers.models.wan_text import load_text

WANTED = ClipFormat(
    num_frames=tiny_wan.NUM_FRAMES,
    height=tiny_wan.HEIGHT,
    width=tiny_wan.WIDTH,
    fps=8,
    policy=FitPolicy.CROP,
)
OPTIONS = EncodeOptions(wanted=WANTED, text_length=tiny_wan.TEXT_LENGTH, shard_clips=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    words = sorted(
        {word for split in ClipSplit for text in captions(split) for word in text.split()}
    )
    return str(tiny_wan.write_tiny_wan(tmp_path_factory.mktemp("wan") / "base", words))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of eight rendered clips, of which four are bad, each in its own way."""
    folder = tmp_path_factory.mktemp("source") / "train"
    write_shards(str(folder), num_clips=48, shard_size=8, seed=0)
    paths = sorted(folder.glob("*.parquet"))
    rows = pq.read_table(paths[1]).to_pylist()
    rows[2]["video"] = b"no video"
    rows[3]["caption"] = " "
    rows[4]["sample_id"] = rows[0]["sample_id"]
    rows[5]["video"] = rows[5]["video"][:200]
    pq.write_table(pa.Table.from_pylist(rows, schema=video_schema()), paths[1], row_group_size=4)
    (folder / "_index.json").unlink(missing_ok=True)
    return folder


def parts_of(folder: Path, max_rows: int) -> list[Part]:
    return plan_parts(Catalogue(*open_folder(str(folder)), 1000), max_rows)


def clips_in(folder: Path, **settings: Any) -> Source:
    """Clips of a folder as `encode` reads them."""
    wanted = {"columns": ("video",), "decode": ClipDecoder(WANTED)}
    return Source(str(folder), pixel_shape=OPTIONS.pixel_shapes[0], **(wanted | settings))


def encoding_of_clips(model: str, options: EncodeOptions) -> Encoding:
    (encoding,) = encodings_for(model, options).values()
    return encoding


def source_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The good rows by id."""
    found: dict[str, dict[str, Any]] = {}
    for number, path in enumerate(sorted(folder.glob("*.parquet"))):
        for place, row in enumerate(pq.read_table(path).to_pylist()):
            if (number, place) not in {(1, 2), (1, 3), (1, 4), (1, 5)}:
                found[row["sample_id"]] = row
    return found


@pytest.fixture(scope="module")
def foreign(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows as other tools store them: other names, and videos as structs of bytes."""
    folder = tmp_path_factory.mktemp("foreign") / "train"
    folder.mkdir()
    for path in source.glob("*.parquet"):
        table = pq.read_table(path)
        videos = [{"bytes": video, "path": None} for video in table["video"].to_pylist()]
        columns = {"Key": table["sample_id"], "words": table["caption"], "clip": videos}
        pq.write_table(pa.table(columns), folder / path.name, row_group_size=4)
    return folder


FOREIGN = OptionColumnNames(caption="words", sample_id="Key", video="clip")


BAD = {(2, "undecodable"), (3, "empty_caption"), (4, "duplicate_id"), (5, "undecodable")}


class TestPlan:
    def test_row_groups_are_gathered_up_to_the_size_of_a_part(self, tmp_path):
        write_folder(tmp_path, [10, 4], group=3)
        parts = parts_of(tmp_path, 6)
        rows = [[(g.index, g.first_row, g.num_rows) for g in part.groups] for part in parts]
        assert rows == [[(0, 0, 3), (1, 3, 3)], [(2, 6, 3), (3, 9, 1)], [(0, 0, 3), (1, 3, 1)]]
        assert [part.name for part in parts] == ["part-00000", "part-00001", "part-00002"]
        assert [part.num_rows for part in parts] == [6, 4, 4]

    def test_a_row_group_that_is_too_large_stands_alone(self, tmp_path):
        write_folder(tmp_path, [10], group=5)
        assert [part.num_rows for part in parts_of(tmp_path, 2)] == [5, 5]

    def test_a_shard_that_cannot_be_opened_is_a_part_that_says_so(self, tmp_path):
        write_folder(tmp_path, [3, 3])
        (tmp_path / "part-000.parquet").write_bytes(b"torn")
        first, second = parts_of(tmp_path, 8)
        assert first.fault
        assert (first.num_rows, second.num_rows) == (0, 3)

    def test_other_shards_make_another_plan(self, tmp_path):
        write_folder(tmp_path, [3, 3])
        before = parts_of(tmp_path, 8)
        assert digest(before) == digest(parts_of(tmp_path, 8))
        write_folder(tmp_path, [3, 4])
        assert digest(before) != digest(parts_of(tmp_path, 8))


class TestOptions:
    @pytest.mark.parametrize("missing", ["num_frames", "height", "fps"])
    def test_all_sizes_are_needed(self, missing):
        sizes = {"num_frames": 9, "height": 16, "width": 16, "fps": 8.0} | {missing: None}
        if missing == "height":
            sizes["width"] = None
        with pytest.raises(ConfigError, match="all four"):
            EncodeOptions(wanted=ClipFormat(**sizes))

    def test_sizes_that_the_networks_cannot_take_are_told(self, model):
        with pytest.raises(ShapeError, match="9 frames of 15x16"):
            encoding_of_clips(model, EncodeOptions(wanted=ClipFormat(9, 15, 16, 8)))

    def test_a_type_that_is_not_stored_is_told(self):
        assert dtype_named("bfloat16") == "bfloat16"
        with pytest.raises(ConfigError, match="float32, bfloat16, float16"):
            dtype_named("int8")


class TestTextOnly:
    """What is decided before Ray starts; `tests/e2e/test_text_only.py` has the whole."""

    def test_captions_alone_are_refused_before_ray_starts(self, model, tmp_path):
        write_folder(tmp_path / "captions", [3])
        with pytest.raises(DataError, match=r"captions without a column video.*--text-only"):
            encode(str(tmp_path / "captions"), str(tmp_path / "set"), model, OPTIONS)
        assert not (tmp_path / "set").exists()

    def test_so_is_a_file_of_captions(self, model, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        (tmp_path / "prompts.txt").write_text("a red circle")
        with pytest.raises(DataError, match=r"captions without a column video.*--text-only"):
            encode(str(tmp_path / "prompts.txt"), str(tmp_path / "set"), model, OPTIONS)

    def test_a_column_of_videos_that_is_named_wrongly_is_still_told(self, model, tmp_path):
        write_folder(tmp_path / "captions", [3])
        options = replace(OPTIONS, names=ColumnNames(video="clip"))
        with pytest.raises(DataError, match=r"no column clip "):
            encode(str(tmp_path / "captions"), str(tmp_path / "set"), model, options)

    def test_no_sizes_and_no_autoencoder_are_needed(self, model):
        options = EncodeOptions(ClipFormat(), tiny_wan.TEXT_LENGTH, text_only=True)
        found = encoding_of_clips(model, options)
        assert (found.latent_shape, found.vae) == ((), "")
        assert found.text_encoder == encoding_of_clips(model, OPTIONS).text_encoder
        assert options.pools == (options.captions,)

    @pytest.mark.slow
    def test_lines_of_videos_that_are_not_read_have_no_pixels(self, source):
        parts = parts_of(source, 8)
        tasks = pa.table({stages.TASK: [pickle.dumps(part) for part in parts[1:2]]})
        lines = pa.concat_tables(stages.read_and_decode(tasks, Source(str(source)))).to_pylist()
        assert [line["reason"] for line in lines] == [None] * 3 + ["empty_caption"] + [None] * 4
        assert {line["pixels"] for line in lines} == {None}

    @pytest.mark.parametrize("option", [["--num-frames", "9"], ["--video-gpus", "0.5"]])
    def test_options_of_videos_are_refused(self, model, source, tmp_path, option):
        command = ["encode", source, tmp_path / "set", "--model", model, "--text-only", *option]
        done = CliRunner().invoke(app, [str(each) for each in command])
        assert done.exit_code == 2
        assert f"--text-only with {option[0]}" in " ".join(done.output.split())


class TestStages:
    def lines(self, folder: Path) -> pa.Table:
        parts = parts_of(folder, 8)
        tasks = pa.table({stages.TASK: [pickle.dumps(part) for part in parts[:2]]})
        return pa.concat_tables(stages.read_and_decode(tasks, clips_in(folder)))

    def test_every_row_comes_out_with_pixels_or_a_reason(self, source):
        lines = self.lines(source).to_pylist()
        assert [(line["part"], line["row"]) for line in lines] == [
            (part, row) for part in range(2) for row in range(8)
        ]
        bad = {(line["row"], line["reason"]) for line in lines if line["reason"]}
        assert bad == BAD - {(4, "duplicate_id")}
        size = tiny_wan.NUM_FRAMES * tiny_wan.HEIGHT * tiny_wan.WIDTH * 3
        assert {len(line["pixels"]) for line in lines if not line["reason"]} == {size}

    @pytest.mark.slow
    def test_a_decoder_that_hangs_costs_its_row(self, source, tmp_path):
        table = pq.read_table(min(source.glob("*.parquet"))).slice(0, 3)
        videos = table["video"].to_pylist()
        place = table.schema.get_field_index("video")
        odd = pa.array([videos[0], HANG, videos[2]], pa.binary())
        pq.write_table(table.set_column(place, "video", odd), tmp_path / "odd.parquet")
        (part,) = parts_of(tmp_path, 8)
        tasks = pa.table({stages.TASK: [pickle.dumps(part)]})
        decoder = OddDecoder(WANTED)
        odd_clips = clips_in(tmp_path, decode=decoder, max_hang_s=2.0)
        lines = stages.read_and_decode(tasks, odd_clips)
        first, hung, last = pa.concat_tables(lines).to_pylist()
        assert (hung["reason"], hung["pixels"]) == ("too_slow", None)
        assert "--max-hang-seconds" in hung["detail"]
        for line, video in ((first, videos[0]), (last, videos[2])):
            assert line["pixels"] == decoder(video).tobytes(), "the same bits as without the guard"

    def test_text_that_is_no_utf8_costs_its_row(self, source, tmp_path):
        table = pq.read_table(sorted(source.glob("*.parquet"))[-1]).slice(0, 3)
        for name, row in (("sample_id", 0), ("caption", 2)):
            values = table[name].to_pylist()
            values[row] = b"gr\xf6n"
            place = table.schema.get_field_index(name)
            table = table.set_column(place, table.field(name), byte_strings(values))
        pq.write_table(table, tmp_path / "latin.parquet")
        reasons = [line["reason"] for line in self.lines(tmp_path).to_pylist()]
        assert reasons == ["no_id", None, "unreadable_caption"]

    def test_a_row_group_that_cannot_be_read_still_counts(self, tmp_path):
        write_folder(tmp_path, [4])  # captions alone: no column `video`
        part = Part(
            0,
            "part-000.parquet",
            (tmp_path / "part-000.parquet").stat().st_size,
            (SourceGroup(0, 0, 3), SourceGroup(1, 3, 1)),
        )
        tasks = pa.table({stages.TASK: [pickle.dumps(part)]})
        lines = pa.concat_tables(stages.read_and_decode(tasks, clips_in(tmp_path)))
        assert lines["reason"].to_pylist() == ["unreadable_rows"] * 4
        assert "video" in lines["detail"][0].as_py()

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_values_are_those_of_the_networks(self, source, model, dtype):
        lines = self.lines(source)
        shapes = OPTIONS.pixel_shapes
        encoded = stages.EncodeVideos(model, shapes, dtype, 1)(lines)
        encoded = stages.EncodeCaptions(model, tiny_wan.TEXT_LENGTH, dtype, 1)(encoded)
        encoding = encoding_of_clips(model, EncodeOptions(WANTED, tiny_wan.TEXT_LENGTH, dtype))
        vae, text = load_vae(model), load_text(model)
        kind = getattr(torch, dtype)
        rows = source_rows(source)
        for line in encoded.to_pylist():
            if line["reason"]:
                assert line["latents"] is line["text_embeds"] is None
                continue
            row = rows.get(line["sample_id"])
            if row is None or row["caption"] != line["caption"]:
                continue
            video = torch.from_numpy(decode_clip(row["video"], WANTED)).permute(3, 0, 1, 2)
            expected = vae.encode(video[None].float() / 255)[0].to(kind)
            assert torch.equal(unpack_latents(line["latents"], encoding), expected)
            words = text.encode([line["caption"]], tiny_wan.TEXT_LENGTH)[0].to(kind)
            assert torch.equal(unpack_text(line["text_embeds"], encoding), words)


class TestWriter:
    encoding = Encoding((1, 1, 1, 1), (1, 1), "float32", "v", "t")
    parts = (
        Part(0, "a.parquet", 1, (SourceGroup(0, 0, 2),)),
        Part(1, "b.parquet", 1, (SourceGroup(0, 0, 1),)),
        Part(2, "c.parquet", 1, (), "no footer"),
    )

    def writer(self, folder: Path, max_bad_fraction: float = 1.0) -> PartWriter:
        journal = open_journal(str(folder), "encode", {})
        missing = [part for part in self.parts if part.name not in journal.parts]
        return PartWriter(journal, missing, {"": self.encoding}, max_bad_fraction, "encoding")

    def line(self, part: int, row: int, name: str, reason: str | None = None) -> dict[str, Any]:
        values = {"latents": bytes(4), "text_embeds": bytes(4)} if reason is None else {}
        return {
            "part": part,
            "row": row,
            "sample_id": name,
            "caption": "c",
            "reason": reason,
            "detail": "",
            "bucket": 0,
            "latents": None,
            "text_embeds": None,
        } | values

    def test_a_part_is_written_when_its_last_row_has_come(self, tmp_path):
        writer = self.writer(tmp_path)
        writer.take(self.line(0, 0, "x"))
        assert not (tmp_path / "part-00000.parquet").exists()
        writer.take(self.line(0, 1, "y", "undecodable"))
        assert pq.read_table(tmp_path / "part-00000.parquet")["sample_id"].to_pylist() == ["x"]
        assert writer.num_waiting == 1

    def test_an_id_is_taken_once_also_by_a_run_that_goes_on(self, tmp_path):
        first = self.writer(tmp_path)
        first.take(self.line(0, 0, "x"))
        first.take(self.line(0, 1, "y", "undecodable"))
        again = self.writer(tmp_path)
        again.take(self.line(1, 0, "x"))
        again.close()
        journal = open_journal(str(tmp_path), "encode", {})
        assert {(r.source, r.sample_id, r.reason) for r in journal.rejections} == {
            ("a.parquet", "y", "undecodable"),
            ("b.parquet", "x", "duplicate_id"),
            ("c.parquet", "", "unreadable_shard"),
        }

    def test_rows_that_do_not_come_back_are_told(self, tmp_path):
        writer = self.writer(tmp_path)
        writer.take(self.line(0, 0, "x"))
        with pytest.raises(DataError, match="2 rows of 2 parts"):
            writer.close()

    def test_an_error_of_the_server_arrives_as_itself(self, tmp_path):
        line = self.line(0, -1, "", "server_failed")
        line["detail"] = json.dumps(["reading b", "no answer", "an answer", "wait"])
        with pytest.raises(DataError, match="no answer"):
            self.writer(tmp_path).take(line)

    def test_too_many_bad_rows_stop_the_command(self, tmp_path):
        writer = self.writer(tmp_path, max_bad_fraction=0.4)
        for part, row, reason in ((0, 0, None), (0, 1, "undecodable"), (1, 0, "no_id")):
            writer.take(self.line(part, row, f"{part}-{row}", reason))
        with pytest.raises(DataError, match="3 of 4"):
            writer.close()
        assert (tmp_path / "quarantine.parquet").exists()


def run_encode(source: Path, target: Path, model: str) -> subprocess.Popen[str]:
    command = [
        *(forked_python(), "-m", "pipelines.cli", "encode", str(source), str(target)),
        *("--model", model, "--num-frames", str(tiny_wan.NUM_FRAMES)),
        *("--height", str(tiny_wan.HEIGHT), "--width", str(tiny_wan.WIDTH), "--fps", "8"),
        *("--text-length", str(tiny_wan.TEXT_LENGTH), "--shard-clips", "8"),
        *("--id-column", "Key", "--caption-column", "words", "--video-column", "clip"),
        *("--max-bad-fraction", "0.1", "--json"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture(scope="module")
def encoded(
    foreign: Path, model: str, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None
) -> tuple[Path, EncodeReport]:
    """The set encoded by a command that was killed, and the report of the one that went on."""
    target = tmp_path_factory.mktemp("encoded") / "set"
    killed = run_encode(foreign, target, model)
    progress = target / "_progress"
    while not any(progress.glob("*.json")):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.002)
    kill(killed)
    assert not (target / "_index.json").exists()
    options = replace(OPTIONS, max_bad_fraction=0.1, names=FOREIGN)
    return target, encode(str(foreign), str(target), model, options)


@pytest.mark.ray
@pytest.mark.slow
class TestKilledAndRunAgain:
    def test_every_good_clip_is_there_exactly_once(self, encoded, source):
        target, report = encoded
        filesystem, root = open_folder(str(target))
        index = read_index(filesystem, root) or ()
        names = [
            name
            for shard in index
            for name in pq.read_table(target / shard.path)["sample_id"].to_pylist()
        ]
        assert len(names) == len(set(names)) == report.num_clips == 44
        assert set(names) == set(source_rows(source))
        assert 0 < report.num_new < 44
        assert report.columns == (
            "sample_id is column Key; caption is column words; video is column clip"
        )
        assert not (target / "_progress").exists()

    def test_bad_clips_are_in_the_quarantine_exactly_once(self, encoded):
        target, report = encoded
        found = pq.read_table(target / "quarantine.parquet").to_pylist()
        assert {(row["row"], row["reason"]) for row in found} == BAD
        assert len(found) == len(BAD)
        assert report.rejected == {"undecodable": 2, "empty_caption": 1, "duplicate_id": 1}

    def test_values_are_those_of_the_networks(self, encoded, source, model):
        target, _ = encoded
        table = pq.read_table(sorted(target.glob("part-*.parquet"))[-1])
        encoding = encoding_of(table.schema)
        assert encoding == encoding_of_clips(model, OPTIONS)
        vae, text, rows = load_vae(model), load_text(model), source_rows(source)
        for line in table.to_pylist():
            row = rows[line["sample_id"]]
            video = torch.from_numpy(decode_clip(row["video"], WANTED)).permute(3, 0, 1, 2)
            expected = vae.encode(video[None].float() / 255)[0]
            assert torch.equal(unpack_latents(line["latents"], encoding), expected)
            words = text.encode([line["caption"]], tiny_wan.TEXT_LENGTH)[0]
            assert torch.equal(unpack_text(line["text_embeds"], encoding), words)

    def test_a_finished_set_is_left_as_it_is(self, encoded, foreign, model):
        target, _ = encoded
        again = run_encode(foreign, target, model)
        out, err = again.communicate(timeout=300)
        assert again.returncode == 0, err
        report = json.loads(out)
        assert (report["clips"], report["new_clips"]) == (44, 0)

    def test_another_model_is_refused(self, encoded, foreign, model, tmp_path):
        target, _ = encoded
        words = sorted({word for text in captions(ClipSplit.TRAIN) for word in text.split()})
        other = tiny_wan.write_tiny_wan(tmp_path / "other", words, seed=1)
        with pytest.raises(DataError, match=r"encoding\.vae ="):
            encode(str(foreign), str(target), str(other), replace(OPTIONS, names=FOREIGN))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_shares_of_gpus_that_the_cluster_does_not_have_are_told(source, model, tmp_path):
    options = replace(OPTIONS, videos=ActorPool(2, 0.5), captions=ActorPool(1, 0.25))
    with pytest.raises(InsufficientResourcesError, match=r"0 GPU.*at least 1.25 GPU"):
        encode(str(source), str(tmp_path / "set"), model, options)
