"""`sgmd prepare`: what is taken, what is not, and that a killed run loses and repeats nothing."""

import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.data.checking.check import CheckOptions, check_shards
from pipelines.data.clips.clip_decoding import read_facts
from pipelines.data.clips.clip_format import ClipFormat, FitPolicy
from pipelines.data.making.prepare import PrepareOptions, prepare
from pipelines.data.making.prepare_clip import ClipRules
from pipelines.data.making.sources import Columns
from pipelines.data.shards.filesystem import open_folder
from pipelines.data.shards.index import read_index
from pipelines.data.shards.schema import ShardKind
from sgmd_core.errors import DataError
from tests.e2e.processes import ROOT
from tests.helpers.forked_python import forked_process, kill
from tests.helpers.s3_server import serve_s3, use_server
from tests.helpers.video_files import grey_frames, real_clips, sound_file, video_file

HERE = PrepareOptions(num_processes=0, max_bad_fraction=1.0)


def rows(folder: Path | str) -> list[dict]:
    """All rows of a set, in the order of its index."""
    filesystem, root = open_folder(str(folder))
    found = []
    for shard in read_index(filesystem, root) or ():
        with filesystem.open(f"{root}/{shard.path}", "rb") as file:
            parquet = pq.ParquetFile(file)
            stored = [parquet.metadata.row_group(n).num_rows for n in range(parquet.num_row_groups)]
            assert stored == list(shard.rows or ())
            found += parquet.read().to_pylist()
    return found


def quarantine(folder: Path | str) -> dict[str, str]:
    return {
        row["sample_id"]: row["reason"]
        for row in pq.read_table(f"{folder}/quarantine.parquet").to_pylist()
    }


def write_clip(folder: Path, name: str, video: bytes, caption: str | None) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(video)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real clips and odd ones, each with a caption, in two folders."""
    folder = tmp_path_factory.mktemp("source")
    for name, path in real_clips().items():
        write_clip(folder, f"real/{name}", path.read_bytes(), f"filmed: {name}")
    frames = grey_frames(range(40, 240, 20), height=33, width=47)
    odd = {
        "odd.mp4": video_file(frames),
        "rotated.mp4": video_file(frames, rotation=90),
        "variable.mp4": video_file(frames[:3], times_s=[0, 0.1, 0.5]),
        "sound.mp4": video_file(frames, with_audio=True),
        "film.mkv": video_file(frames, fps=Fraction(24000, 1001), container_format="matroska"),
        "vp9.webm": video_file(
            frames[:, :32, :46], codec="libvpx-vp9", container_format="webm", pix_fmt="yuv420p"
        ),
    }
    for name, video in odd.items():
        write_clip(folder, f"odd/{name}", video, f"made: {name}")
    return folder


@pytest.fixture(scope="module")
def bad_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good clip, and one of every fault."""
    folder = tmp_path_factory.mktemp("bad")
    good = video_file(grey_frames([50, 100]))
    write_clip(folder, "good.mp4", good, "good")
    write_clip(folder, "a/text.mp4", b"no video", "text")
    write_clip(folder, "a/sound.mkv", sound_file(), "sound alone")
    write_clip(folder, "a/lonely.mp4", good, None)
    write_clip(folder, "a/blank.mp4", good, " \n")
    write_clip(folder, "a/wordy.mp4", good, "word " * 900)
    write_clip(folder, "a/latin.mp4", good, None)
    (folder / "a" / "latin.txt").write_bytes("café".encode("latin-1"))
    write_clip(folder, "a/large.mp4", good + bytes(200_000), "large")
    return folder


class TestWhatIsTaken:
    @pytest.mark.slow
    def test_files_are_kept_byte_by_byte_under_their_paths(self, source, tmp_path):
        report = prepare(str(source), str(tmp_path / "set"), HERE)
        found = {row["sample_id"]: row for row in rows(tmp_path / "set")}
        videos = {str(p.relative_to(source)) for p in source.rglob("*.*") if p.suffix != ".txt"}
        assert set(found) == videos
        assert report.num_clips == report.num_new == len(videos) == 10
        assert report.rejected == {}
        for name, row in found.items():
            assert row["video"] == (source / name).read_bytes()
            assert row["caption"].endswith(Path(name).name)
        rates = {name: round(row["fps"], 3) for name, row in found.items()}
        assert rates["real/carphone_pristine.mp4"] == 29.97
        assert rates["odd/film.mkv"] == 23.976
        assert rates["real/bikes.mp4"] == 25

    @pytest.mark.slow
    @pytest.mark.usefixtures("forked_libraries")
    def test_processes_make_the_same_files_as_none(self, source, tmp_path):
        files = []
        for number, processes in enumerate((0, 2)):
            folder = tmp_path / str(number)
            options = PrepareOptions(num_processes=processes, shard_clips=3)
            prepare(str(source), str(folder), options)
            files.append(
                {
                    path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                    for path in folder.glob("*.parquet")
                }
            )
        assert files[0] == files[1]
        assert len(files[0]) == 4 + 1  # and the quarantine

    @pytest.mark.slow
    def test_a_shard_is_closed_by_number_or_by_size(self, source, tmp_path):
        options = PrepareOptions(num_processes=0, shard_clips=4, shard_bytes=400_000)
        prepare(str(source), str(tmp_path), options)
        filesystem, root = open_folder(str(tmp_path))
        shards = read_index(filesystem, root) or ()
        sizes = [shard.num_rows for shard in shards]
        assert max(sizes) == 4
        # Every one of the three large clips fills a shard.
        assert len(sizes) > 4 or sizes.count(4) == 1
        assert sum(sizes) == 10

    @pytest.mark.slow
    def test_clips_can_be_brought_into_one_format(self, source, tmp_path):
        wanted = ClipFormat(num_frames=5, height=32, width=48, fps=8, policy=FitPolicy.CROP)
        options = PrepareOptions(
            num_processes=0, max_bad_fraction=1.0, rules=ClipRules(wanted=wanted)
        )
        report = prepare(str(source), str(tmp_path), options)
        # Three frames that last 0.9 s in all are too few, as are 10 frames in 0.42 s.
        assert quarantine(tmp_path)["odd/film.mkv"] == "too_short"
        assert report.num_clips >= 8
        for row in rows(tmp_path):
            facts = read_facts(row["video"])
            assert (facts.height, facts.width, facts.num_frames, facts.fps) == (32, 48, 5, 8)
            assert row["fps"] == 8

    def test_other_sizes_can_be_refused(self, source, tmp_path):
        wanted = ClipFormat(height=33, width=47, policy=FitPolicy.REFUSE)
        rules = ClipRules(wanted=wanted)
        prepare(
            str(source / "odd"),
            str(tmp_path),
            PrepareOptions(num_processes=0, max_bad_fraction=1.0, rules=rules),
        )
        assert quarantine(tmp_path) == {"rotated.mp4": "wrong_size", "vp9.webm": "wrong_size"}


def clip_and_tar(folder: Path) -> Path:
    """A folder with a clip and a tar of the same clip; returns the tar."""
    write_clip(folder, "a.mp4", video_file(grey_frames([50, 100])), "words")
    with tarfile.open(folder / "b.tar", "w") as tar:
        for name in ("a.mp4", "a.txt"):
            tar.add(folder / name, f"in-tar-{name}")
    return folder / "b.tar"


class TestWhatIsNotTaken:
    def test_every_fault_has_its_name(self, bad_source, tmp_path):
        rules = ClipRules(max_clip_bytes=200_000)
        options = PrepareOptions(num_processes=0, max_bad_fraction=1.0, rules=rules)
        report = prepare(str(bad_source), str(tmp_path), options)
        assert quarantine(tmp_path) == {
            "a/text.mp4": "undecodable",
            "a/sound.mkv": "no_frames",
            "a/lonely.mp4": "missing_caption",
            "a/blank.mp4": "empty_caption",
            "a/wordy.mp4": "long_caption",
            "a/latin.mp4": "unreadable_caption",
            "a/large.mp4": "too_large",
        }
        assert [row["sample_id"] for row in rows(tmp_path)] == ["good.mp4"]
        assert sum(report.rejected.values()) == 7

    def test_too_many_stop_the_command_and_the_worst_place_is_named(self, bad_source, tmp_path):
        options = PrepareOptions(num_processes=0, max_bad_fraction=0.5)
        with pytest.raises(DataError, match=r"6 of 8.*/a \(6\)") as caught:
            prepare(str(bad_source), str(tmp_path), options)
        assert "--retry-bad" in str(caught.value)
        assert not (tmp_path / "_index.json").exists()
        assert len(quarantine(tmp_path)) == 6

    def test_repaired_clips_are_taken_when_asked_for(self, bad_source, tmp_path):
        source = tmp_path / "source"
        good = video_file(grey_frames([50, 100]))
        for name in ("a.mp4", "b.mp4"):
            write_clip(source, name, good, name)
        (source / "b.mp4").write_bytes(b"broken")
        prepare(str(source), str(tmp_path / "set"), HERE)
        (source / "b.mp4").write_bytes(good)
        prepare(str(source), str(tmp_path / "set"), HERE)
        assert len(rows(tmp_path / "set")) == 1
        again = PrepareOptions(num_processes=0, retry_bad=True)
        assert prepare(str(source), str(tmp_path / "set"), again).num_new == 1
        assert [row["sample_id"] for row in rows(tmp_path / "set")] == ["a.mp4", "b.mp4"]
        assert quarantine(tmp_path / "set") == {}

    def test_an_id_that_comes_again_is_rejected_and_stays_so(self, source, tmp_path):
        manifest = tmp_path / "list.jsonl"
        lines = [("x", "odd.mp4"), ("y", "sound.mp4"), ("x", "rotated.mp4"), ("z", "gone.mp4")]
        manifest.write_text(
            "".join(
                json.dumps({"id": name, "path": f"{source}/odd/{file}", "caption": file}) + "\n"
                for name, file in lines
            )
        )
        options = PrepareOptions(
            num_processes=0, max_bad_fraction=1.0, columns=Columns(sample_id="id")
        )
        for _ in range(2):
            prepare(str(manifest), str(tmp_path / "set"), options)
            assert {r["sample_id"]: r["caption"] for r in rows(tmp_path / "set")} == {
                "x": "odd.mp4",
                "y": "sound.mp4",
            }
            assert quarantine(tmp_path / "set") == {"x": "duplicate_id", "z": "missing_video"}
            assert pq.read_table(tmp_path / "set" / "quarantine.parquet").num_rows == 2

    def test_a_source_without_videos_is_told(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match="not a single video"):
            prepare(str(tmp_path / "empty"), str(tmp_path / "set"), HERE)

    def test_the_summary_names_each_kind_of_what_is_not_in_the_set(self, tmp_path):
        video = video_file(grey_frames([50, 100]))
        write_clip(tmp_path / "source", "A.MP4", video, None)
        (tmp_path / "source" / "A.TXT").write_text("upper case")
        for name in ("lonely.txt", "1.jpg", "2.jpg", "x.tar.gz"):
            (tmp_path / "source" / name).write_text("words")
        arguments = ["prepare", str(tmp_path / "source"), str(tmp_path / "set")]
        options = ["--processes", "0", "--max-bad-fraction", "0.5"]
        for more in ([], ["--json"]):
            result = CliRunner().invoke(app, [*arguments, *options, *more])
            assert result.exit_code == 1, "no clip of the compressed tar is in the set"
            assert [row["caption"] for row in rows(tmp_path / "set")] == ["upper case"]
            if more:
                skipped = json.loads(result.stdout)["skipped"]
                assert [kind["count"] for kind in skipped] == [2, 1]
                continue
            lines = [line for line in result.stdout.splitlines() if "such as" in line]
            assert len(lines) == 3
            for words in ("clips are missing, tars of which nothing", ".jpg: 2", "lonely.txt"):
                assert any(words in line for line in lines)

    @pytest.mark.parametrize("kind", ["no tar", "empty", "cut in its first header", "gone", "pipe"])
    def test_a_tar_of_which_nothing_can_be_read_is_a_line_of_its_own_and_exit_code_1(
        self, tmp_path, kind
    ):
        path = clip_and_tar(tmp_path / "source")
        whole = path.read_bytes()
        if kind == "gone":
            path.unlink()
            path.symlink_to(tmp_path / "nowhere")
        elif kind == "pipe":
            path.unlink()
            os.mkfifo(path)
        else:
            bad = {"no tar": b"words " * 999, "empty": b"", "cut in its first header": whole[:300]}
            path.write_bytes(bad[kind])
        arguments = ["prepare", str(tmp_path / "source"), str(tmp_path / "set")]
        options = ["--processes", "0", "--max-bad-fraction", "0.5"]
        result = CliRunner().invoke(app, [*arguments, *options])
        assert result.exit_code == 1, result.output
        lines = [line for line in result.stdout.splitlines() if "clips are missing" in line]
        assert len(lines) == 1
        assert re.search(r"tars of which nothing can be read .*: 1, such as .*b\.tar", lines[0])
        assert [row["caption"] for row in rows(tmp_path / "set")] == ["words"]
        again = CliRunner().invoke(app, [*arguments, *options])
        assert again.exit_code == 1, "the clips are still missing"
        path.unlink()
        path.write_bytes(whole)
        mended = CliRunner().invoke(app, [*arguments, *options, "--retry-bad", "--json"])
        assert mended.exit_code == 0, mended.output
        assert json.loads(mended.stdout)["unread"] == []
        assert len(rows(tmp_path / "set")) == 2

    def test_a_tar_whose_rest_cannot_be_read_is_said_in_a_line_of_its_own(self, tmp_path):
        path = clip_and_tar(tmp_path / "source")
        path.write_bytes(path.read_bytes().rstrip(b"\0"))
        arguments = ["prepare", str(tmp_path / "source"), str(tmp_path / "set")]
        options = ["--processes", "0", "--max-bad-fraction", "0.5"]
        result = CliRunner().invoke(app, [*arguments, *options])
        assert result.exit_code == 0, "a part of it is in the set"
        assert "clips are missing, tars of which the rest cannot be read" in result.stdout
        assert "damaged_archive" in result.stdout

    def test_a_source_without_a_clip_says_what_lies_there(self, tmp_path):
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "list.csv").write_text("path,caption\n")
        with pytest.raises(DataError, match=r"not a single video; manifests.*list\.csv"):
            prepare(str(tmp_path / "source"), str(tmp_path / "set"), HERE)
        with pytest.raises(DataError, match="content of the file"):
            prepare(str(tmp_path / "source" / "list.csv"), str(tmp_path / "set"), HERE)

    def test_a_source_of_bad_clips_alone_names_the_first_of_them(self, tmp_path):
        (tmp_path / "a.mp4").write_bytes(b"no video")
        (tmp_path / "a.json").write_text('{"title": "words"}')
        options = replace(HERE, max_bad_fraction=1.0)
        words = r"1 clips, none .*no field caption or prompt or text, of .* title"
        with pytest.raises(DataError, match=words):
            prepare(str(tmp_path), str(tmp_path / "set"), options)

    def test_a_set_that_has_lost_a_shard_is_not_filled_further(self, tmp_path):
        source, target = tmp_path / "prompts.txt", tmp_path / "set"
        source.write_text("one\ntwo\n")
        prepare(str(source), str(target), replace(HERE, shard_clips=1))
        (target / "part-00000.parquet").unlink()
        with pytest.raises(DataError, match=r"1 of 2 shards are gone: part-00000\.parquet"):
            prepare(str(source), str(target), HERE)

    @pytest.mark.parametrize("name", ["part-00000.parquet", "A.PARQUET", "quarantine.parquet"])
    def test_a_folder_of_other_data_is_left_alone(self, source, tmp_path, name):
        (tmp_path / name).write_bytes(b"mine")
        with pytest.raises(DataError, match="did not write"):
            prepare(str(source), str(tmp_path), HERE)
        assert (tmp_path / name).read_bytes() == b"mine"

    def test_one_folder_holds_one_format(self, source, tmp_path):
        prepare(str(source / "odd"), str(tmp_path), HERE)
        rules = ClipRules(wanted=ClipFormat(fps=5))
        options = PrepareOptions(num_processes=0, max_bad_fraction=1.0, rules=rules)
        with pytest.raises(DataError, match=r"fps = None.*this run has fps = 5"):
            prepare(str(source / "odd"), str(tmp_path), options)


@pytest.mark.parametrize("suffix", [".MP4", ".gif", ".ts", ".mts", ".3g2", ".asf", ".vob", ".ogv"])
def test_files_of_every_usual_kind_are_clips(tmp_path, suffix):
    # FFmpeg goes by the content; the name only says that a file is meant as a clip.
    write_clip(tmp_path / "src", f"a{suffix}", video_file(grey_frames([50, 100])), "a")
    assert prepare(str(tmp_path / "src"), str(tmp_path / "set"), HERE).num_clips == 1


@pytest.mark.parametrize("max_bad_fraction", [0.01, 1.0])
def test_where_captions_are_missing_the_table_beside_the_videos_is_named(
    tmp_path, max_bad_fraction
):
    """As sets of other tools have it: videos, and a metadata.csv that says what they show."""
    write_clip(tmp_path / "set", "a.mp4", video_file(grey_frames([10, 20])), None)
    (tmp_path / "set" / "metadata.csv").write_text("file_name,text\na.mp4,a red circle\n")
    with pytest.raises(DataError, match=r"name the manifest itself as SRC.*metadata\.csv"):
        prepare(
            str(tmp_path / "set"),
            str(tmp_path / "shards"),
            replace(HERE, max_bad_fraction=max_bad_fraction),
        )


def test_a_pipe_or_a_dead_link_in_place_of_a_file_is_one_missing_video(tmp_path):
    write_clip(tmp_path / "src", "a.mp4", video_file(grey_frames([50, 100])), "a")
    os.mkfifo(tmp_path / "src" / "b.mp4")
    (tmp_path / "src" / "c.mp4").symlink_to("gone.mp4")
    (tmp_path / "src" / "d.mp4").symlink_to("d.mp4")
    for name in "bcd":
        (tmp_path / "src" / f"{name}.txt").write_text(name)
    options = PrepareOptions(num_processes=0, max_bad_fraction=0.8)
    report = prepare(str(tmp_path / "src"), str(tmp_path / "set"), options)
    assert (report.num_clips, report.rejected) == (1, {"missing_video": 3})


def test_an_odd_address_in_a_manifest_is_one_missing_video(tmp_path):
    write_clip(tmp_path, "a.mp4", video_file(grey_frames([50, 100])), "a")
    manifest = tmp_path / "clips.csv"
    manifest.write_text("path,caption\na.mp4,a\nftp://server/b.mp4,b\n")
    options = PrepareOptions(num_processes=0, max_bad_fraction=0.5)
    report = prepare(str(manifest), str(tmp_path / "set"), options)
    assert (report.num_clips, report.rejected) == (1, {"missing_video": 1})


@pytest.mark.parametrize(("status", "is_missing"), [(404, True), (503, False)])
def test_an_http_server_that_fails_is_not_taken_for_missing_videos(tmp_path, status, is_missing):
    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    write_clip(tmp_path, "a.mp4", video_file(grey_frames([50, 100])), "a")
    manifest = tmp_path / "clips.csv"
    manifest.write_text(f"path,caption\na.mp4,a\nhttp://127.0.0.1:{server.server_port}/b.mp4,b\n")
    options = PrepareOptions(num_processes=0, max_bad_fraction=0.5)
    try:
        if is_missing:
            report = prepare(str(manifest), str(tmp_path / "set"), options)
            assert (report.num_clips, report.rejected) == (1, {"missing_video": 1})
        else:
            with pytest.raises(DataError, match=r"b\.mp4"):
                prepare(str(manifest), str(tmp_path / "set"), options)
    finally:
        server.shutdown()
        server.server_close()


class TestIdentity:
    @pytest.mark.parametrize(
        ("option", "values"),
        [
            ("caption_column", ("short", "long")),
            ("path_column", ("path", "file")),
            ("id_column", ("id", "path")),
            ("crf", ("18", "30")),
            ("policy", ("crop", "resize")),
            ("height", ("32", "16")),
            ("decode_all", ("--decode-all", "--decode-first")),
        ],
    )
    def test_a_setting_that_decides_the_content_is_the_same_in_all_runs(
        self, source, tmp_path, option, values
    ):
        manifest = tmp_path / "list.csv"
        manifest.write_text(
            f"id,path,file,caption,short,long\na,{source}/odd/odd.mp4,odd.mp4,c,red,a red circle\n"
        )
        outputs = []
        for value in values:
            given = [value] if value[0] == "-" else [f"--{option.replace('_', '-')}={value}"]
            size = ["--height=32", "--width=32"] if option in ("crf", "policy", "height") else []
            command = ["prepare", str(manifest), str(tmp_path / "set"), "--processes=0"]
            result = CliRunner().invoke(app, [*command, *size, *given, "--max-bad-fraction=1"])
            outputs.append((result.exit_code, " ".join(result.stderr.split())))
        assert outputs[0][0] == 0
        assert outputs[1][0] == 2
        said = {"--decode-all": "True", "--decode-first": "False"}
        for value in values:
            words = str(said.get(value, value))
            assert re.search(rf"{option} = '?{re.escape(words)}'?", outputs[1][1]), outputs[1]
        assert len(rows(tmp_path / "set")) == 1

    def test_spellings_of_one_source_are_one_source(self, tmp_path, monkeypatch):
        good = video_file(grey_frames([50, 100]))
        write_clip(tmp_path / "home" / "videos", "a.mp4", good, "a")
        write_clip(tmp_path / "home" / "videos", "b.mp4", b"broken", "b")
        (tmp_path / "link").symlink_to(tmp_path / "home" / "videos")
        monkeypatch.chdir(tmp_path / "home")
        whole = str(tmp_path / "home" / "videos")
        spellings = ("videos/", "./videos", whole, f"{whole}/", "../link", f"file://{whole}")
        for number, spelling in enumerate(spellings):
            report = prepare(spelling, str(tmp_path / "set"), HERE)
            assert (report.num_clips, report.num_new) == (1, int(number == 0))
            assert report.rejected == {"undecodable": 1}
        other = tmp_path / "home" / "other"
        write_clip(other, "a.mp4", good, "a")
        with pytest.raises(DataError, match=rf"source = '{whole}'.*source = '{other}'"):
            prepare("other", str(tmp_path / "set"), HERE)

    @pytest.mark.parametrize("wrong", ["vidoes", "empty", "clips.csv", "notes.md"])
    def test_a_typing_error_in_the_source_writes_nothing(self, source, tmp_path, wrong):
        (tmp_path / "empty").mkdir()
        (tmp_path / "notes.md").write_text("no videos")
        with pytest.raises(DataError, match=wrong):
            prepare(str(tmp_path / wrong), str(tmp_path / "set"), HERE)
        assert not (tmp_path / "set").exists()
        assert prepare(str(source / "odd"), str(tmp_path / "set"), HERE).num_clips == 6

    def test_a_folder_without_a_shard_is_not_bound_to_a_typing_error(self, source, tmp_path):
        manifest = tmp_path / "list.jsonl"
        manifest.write_text(json.dumps({"path": f"{source}/odd/odd.mp4", "text": "odd"}) + "\n")
        for columns in (Columns(path="place"), Columns(caption="words")):
            with pytest.raises(DataError, match=r"the columns path, text; no column (place|words)"):
                prepare(str(manifest), str(tmp_path / "set"), replace(HERE, columns=columns))
        options = replace(HERE, columns=Columns(caption="text"))
        report = prepare(str(manifest), str(tmp_path / "set"), options)
        assert (report.num_clips, report.rejected) == (1, {})
        assert quarantine(tmp_path / "set") == {}


def test_a_folder_of_tables_with_videos_is_named_a_set(tmp_path):
    videos = [{"bytes": video_file(grey_frames([50, 100])), "path": "a.mp4"}]
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.table({"video": videos, "text": ["a"]}), tmp_path / "hub" / "train.parquet")
    with pytest.raises(DataError, match=r"a set already: see `sgmd check SRC`"):
        prepare(str(tmp_path / "hub"), str(tmp_path / "set"), HERE)


class TestResuming:
    def test_clips_that_join_the_source_later_join_the_set(self, tmp_path):
        good = video_file(grey_frames([50, 100]))
        for name in ("b.mp4", "c.mp4"):
            write_clip(tmp_path / "source", name, good, name)
        prepare(str(tmp_path / "source"), str(tmp_path / "set"), HERE)
        write_clip(tmp_path / "source", "a.mp4", good, "a.mp4")
        report = prepare(str(tmp_path / "source"), str(tmp_path / "set"), HERE)
        assert (report.num_clips, report.num_new) == (3, 1)
        names = [row["sample_id"] for row in rows(tmp_path / "set")]
        assert names == ["b.mp4", "c.mp4", "a.mp4"]

    @pytest.mark.slow
    @pytest.mark.usefixtures("forked_libraries")
    def test_killed_in_the_middle_and_run_again_every_clip_is_there_once(self, tmp_path):
        video = real_clips()["carphone_distorted.mp4"].read_bytes()
        for number in range(48):
            caption = f"clip {number}" if number % 8 else ""
            write_clip(tmp_path / "source", f"{number:02d}.mp4", video, caption)
        command = [
            *(sys.executable, "-m", "pipelines.cli", "prepare", str(tmp_path / "source")),
            *(str(tmp_path / "set"), "--shard-clips=4", "--processes=1", "--max-bad-fraction=1"),
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        progress = tmp_path / "set" / "_progress"
        while not progress.is_dir() or len(list(progress.glob("*.json"))) < 2:
            assert run.poll() is None
            time.sleep(0.01)
        children = children_of(forked_process(run.pid))
        assert children
        kill(run)
        assert not (tmp_path / "set" / "_index.json").exists()
        # What a kill between a shard and its line in the journal leaves behind.
        (tmp_path / "set" / "part-00099.parquet.writing").write_bytes(b"torn")
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)

        names = [row["sample_id"] for row in rows(tmp_path / "set")]
        bad = quarantine(tmp_path / "set")
        assert len(names) == len(set(names)) == 42
        assert sorted([*names, *bad]) == [f"{number:02d}.mp4" for number in range(48)]
        assert not progress.exists()
        end = time.monotonic() + 20
        while any(Path(f"/proc/{child}").exists() for child in children):
            assert time.monotonic() < end, "processes outlive the command"
            time.sleep(0.1)


def children_of(process: int) -> list[str]:
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()


@pytest.mark.slow
def test_from_a_bucket_into_a_bucket(source, tmp_path, monkeypatch):
    bucket = tmp_path / "s3" / "clips"
    bucket.mkdir(parents=True)
    for path in (source / "odd").iterdir():
        (bucket / "raw" / "deep").mkdir(parents=True, exist_ok=True)
        (bucket / "raw" / "deep" / path.name).write_bytes(path.read_bytes())
    (bucket / "raw" / "bad.mp4").write_bytes(b"")
    with serve_s3(tmp_path / "s3") as server:
        use_server(server.environment, monkeypatch)
        options = PrepareOptions(num_processes=0, max_bad_fraction=0.2, shard_clips=2)
        for spelling in ("s3://clips/raw", "s3://clips/raw/", "s3a://clips/raw"):
            report = prepare(spelling, "s3://clips/set", options)
            assert (report.num_clips, report.num_shards) == (6, 3)
            assert report.rejected == {"missing_caption": 1}
        found = rows("s3://clips/set")
    S3FileSystem.clear_instance_cache()
    assert sorted(row["sample_id"] for row in found) == sorted(
        f"deep/{path.name}" for path in (source / "odd").iterdir() if path.suffix != ".txt"
    )
    assert sorted(path.name for path in (bucket / "set").iterdir()) == [
        "_index.json",
        "_prepare.json",
        *(f"part-0000{n}.parquet" for n in range(3)),
        "quarantine.parquet",
    ]


class TestCommand:
    def test_the_counts_are_printed_as_json_and_progress_apart_from_them(self, source, tmp_path):
        result = CliRunner().invoke(
            app,
            ["prepare", str(source / "odd"), str(tmp_path), "--json", "--processes", "0"],
        )
        assert result.exit_code == 0
        data = json.loads(result.stdout)
        assert (data["clips"], data["new_clips"], data["rejected"]) == (6, 6, {})
        assert "6 clips, 0 bad, 1 shards" in result.stderr

    def test_too_many_bad_clips_are_a_wrong_request(self, bad_source, tmp_path):
        result = CliRunner().invoke(
            app, ["prepare", str(bad_source), str(tmp_path), "--processes", "0"]
        )
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1].startswith("DataError: ")


def test_a_file_of_prompts_becomes_shards_of_captions(tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_bytes("a cat, “grey”\n\n  a dog \na cat, “grey”\n".encode() + b"\xff\n")
    report = prepare(str(prompts), str(out), HERE)
    assert report.rejected == {"unreadable_caption": 1}
    first = rows(out)
    assert [row["caption"] for row in first] == ["a cat, “grey”", "a dog", "a cat, “grey”"]
    assert len({row["sample_id"] for row in first}) == 3
    assert set(first[0]) == {"sample_id", "caption"}
    prompts.write_text("new\na cat, “grey”\na dog\n")
    assert prepare(str(prompts), str(out), HERE).num_new == 1
    assert check_shards(str(out), CheckOptions(num_processes=0)).kind == ShardKind.CAPTIONS


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl"])
def test_captions_of_a_manifest_without_videos_are_taken_only_when_asked(tmp_path, name):
    manifest, out = tmp_path / name, tmp_path / "out"
    text = "caption\none\ntwo\n" if name.endswith("csv") else '{"caption": "one"}\n' * 2
    manifest.write_text(text)
    with pytest.raises(DataError):
        prepare(str(manifest), str(tmp_path / "videos"), HERE)
    result = CliRunner().invoke(
        app, ["prepare", str(manifest), str(out), "--captions-only", "--processes", "0"]
    )
    assert result.exit_code == 0, result.output
    expected = ["one", "two"] if name.endswith("csv") else ["one", "one"]
    assert [row["caption"] for row in rows(out)] == expected


@pytest.mark.parametrize("column", ["prompt", "TEXT"])
@pytest.mark.parametrize("kind", ["manifest", "beside the video", "captions only"])
def test_captions_are_found_by_their_usual_names(tmp_path, kind, column):
    video = video_file(grey_frames([50, 100]))
    write_clip(tmp_path / "source", "a.mp4", video, None)
    source = tmp_path / "source"
    row = {column: "words", "other": "x"}
    if kind == "beside the video":
        (source / "a.json").write_text(json.dumps(row))
    else:
        source = source / "list.jsonl"
        source.write_text(json.dumps(row | {"path": "a.mp4"}))
    path = None if kind == "captions only" else "path"
    options = replace(HERE, columns=Columns(path), max_bad_fraction=1.0)
    prepare(str(source), str(tmp_path / "set"), options)
    assert [found["caption"] for found in rows(tmp_path / "set")] == ["words"]
    both = row | {"path": "a.mp4", "prompt": "other words", "Text": "more"}
    (source if source.is_file() else source / "a.json").write_text(json.dumps(both))
    with pytest.raises(DataError, match=r"each of which may be|several fields may be it"):
        prepare(str(source), str(tmp_path / "new"), options)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.usefixtures("forked_libraries")
def test_json_files_beside_videos_have_one_field_for_all_of_them(tmp_path, processes):
    video = video_file(grey_frames([50, 100]))
    files = {
        "a": {"prompt": "x", "text": "y"},  # settles nothing, and is not a caption by itself
        "b": ["one of a list"],
        "c": {"text": "three"},
        "d": {"caption": "SALE"},
        "e": {"text": "five", "caption": "OCR"},
    }
    for name, content in files.items():
        write_clip(tmp_path / "source", f"{name}.mp4", video, None)
        (tmp_path / "source" / f"{name}.json").write_text(json.dumps(content))
    options = replace(HERE, max_bad_fraction=1.0, num_processes=processes)
    report = prepare(str(tmp_path / "source"), str(tmp_path / "set"), options)
    taken = [found["caption"] for found in rows(tmp_path / "set")]
    assert taken == ["one of a list", "three", "five"]
    assert report.rejected == {"unreadable_caption": 2}
    assert report.to_json()["caption_field"] == "text"
    assert "captions of all JSON files are their field text" in report.notes()[-1]
    named = replace(options, columns=Columns(caption="caption"))
    report = prepare(str(tmp_path / "source"), str(tmp_path / "named"), named)
    taken = [found["caption"] for found in rows(tmp_path / "named")]
    assert taken == ["one of a list", "SALE", "OCR"]
    assert report.caption_field == ""


@pytest.mark.parametrize(
    ("lines", "taken", "rejected"),
    [
        # One name for the whole file: `text` is something else beside `caption`.
        (
            [{"caption": "a red circle", "text": "OCR: SALE"}, {"text": "OCR: 50% OFF"}],
            ["a red circle"],
            {"missing_caption": 1},
        ),
        (
            [{"text": "OCR"}, {"caption": "a red circle"}, {"text": "OCR", "prompt": "x"}],
            ["a red circle"],
            {"missing_caption": 2},
        ),
        (
            [{"text": "one"}, {"text": "two", "prompt": "x"}, {"prompt": "y", "text": "z"}],
            ["one"],
            {"bad_manifest_row": 2},
        ),
        # Beyond the rows that settle the name.
        (
            [*({"text": "one"},) * 64, {"caption": "late"}, {"prompt": "late"}, {"other": "x"}],
            ["one"] * 64,
            {"bad_manifest_row": 2, "missing_caption": 1},
        ),
    ],
    ids=["caption first", "caption later", "text", "late"],
)
def test_a_manifest_has_one_name_of_captions_and_other_rows_cost_themselves(
    tmp_path, lines, taken, rejected
):
    source, out = tmp_path / "list.jsonl", str(tmp_path / "set")
    source.write_text("\n".join(map(json.dumps, lines)))
    options = replace(HERE, columns=Columns(None), max_bad_fraction=1.0)
    report = prepare(str(source), out, options)
    assert report.rejected == rejected
    assert [found["caption"] for found in rows(tmp_path / "set")] == taken


def test_a_manifest_whose_rows_disagree_on_the_name_of_captions_is_refused(tmp_path):
    source = tmp_path / "list.jsonl"
    source.write_text('{"text": "one"}\n{"prompt": "two"}\n')
    options = replace(HERE, columns=Columns(None))
    with pytest.raises(DataError, match=r"text and prompt, each of which may be.*--caption-column"):
        prepare(str(source), str(tmp_path / "set"), options)
    named = replace(options, columns=Columns(None, "text"), max_bad_fraction=1.0)
    assert prepare(str(source), str(tmp_path / "set"), named).rejected == {"missing_caption": 1}


def test_captions_only_of_a_folder_is_refused(source, tmp_path):
    with pytest.raises(DataError, match="no file of captions"):
        prepare(str(source), str(tmp_path), PrepareOptions(columns=Columns(path=None)))
