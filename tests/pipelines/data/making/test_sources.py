"""Which clips a source names, in which order, under which ids."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from pipelines.data.making.rejections import Reason, Rejection
from pipelines.data.making.sources import (
    CaptionFile,
    Columns,
    FileRange,
    SourceClip,
    list_clips,
)
from sgmd_core.errors import DataError

_DEFAULT = Columns()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def content(place: FileRange) -> bytes:
    data = Path(place.url).read_bytes()
    end = None if place.num_bytes is None else place.offset + place.num_bytes
    return data[place.offset : end]


def clips(url: str | Path, columns: Columns = _DEFAULT) -> list[SourceClip]:
    found = list(list_clips(str(url), columns))
    assert all(isinstance(clip, SourceClip) for clip in found)
    return found


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


class TestFolder:
    def test_every_video_is_named_once_in_a_fixed_order_with_its_caption(self, tmp_path):
        touch(tmp_path, "b/2.MOV", "b/2.txt", "a.webm", "a.json", "b/1.mp4", "c.jpg", "b/.x.mp4")
        touch(tmp_path, "b/deep/er/3.mkv")
        found = clips(tmp_path)
        assert [clip.sample_id for clip in found] == [
            "a.webm",
            "b/1.mp4",
            "b/2.MOV",
            "b/deep/er/3.mkv",
        ]
        assert [content(clip.video).decode() for clip in found] == [c.sample_id for c in found]
        assert found[0].caption == CaptionFile(FileRange(f"{tmp_path}/a.json"), "caption")
        assert found[1].caption is None
        assert found[2].caption == CaptionFile(FileRange(f"{tmp_path}/b/2.txt"))

    def test_ids_do_not_depend_on_where_the_folder_lies(self, tmp_path):
        touch(tmp_path / "here", "x/1.mp4", "2.mp4")
        (tmp_path / "here").rename(tmp_path / "there")
        assert [clip.sample_id for clip in clips(tmp_path / "there")] == ["2.mp4", "x/1.mp4"]

    def test_a_missing_folder_is_told(self, tmp_path):
        with pytest.raises(DataError, match="nowhere"):
            clips(tmp_path / "nowhere")


class TestTar:
    def test_a_tar_names_its_clips_by_key_and_finds_their_bytes(self, tmp_path):
        members = {
            "d/001.mp4": b"first video",
            "d/001.txt": b"first",
            "d/002.left.mp4": b"second video",
            "d/002.json": json.dumps({"text": "second"}).encode(),
            "d/003.txt": b"no video",
            "d/004.mp4": b"fourth video",
        }
        path = write_tar(tmp_path / "t.tar", members)
        found = clips(path, Columns(caption="text"))
        assert [clip.sample_id for clip in found] == [f"t.tar/d/00{n}" for n in (1, 2, 4)]
        assert content(found[0].video) == b"first video"
        assert isinstance(found[0].caption, CaptionFile)
        assert content(found[0].caption.file) == b"first"
        assert isinstance(found[1].caption, CaptionFile)
        assert found[1].caption.json_field == "text"
        assert found[-1].caption is None

    def test_tars_in_a_folder_are_opened(self, tmp_path):
        (tmp_path / "part").mkdir()
        write_tar(tmp_path / "part" / "0.tar", {"k.mp4": b"v", "k.txt": b"t"})
        touch(tmp_path, "plain.mp4")
        assert [clip.sample_id for clip in clips(tmp_path)] == ["plain.mp4", "part/0.tar/k"]

    def test_a_tar_that_is_cut_short_is_rejected_from_there_on(self, tmp_path):
        members = {f"{n}.mp4": bytes(5000) for n in range(4)}
        path = write_tar(tmp_path / "t.tar", members)
        path.write_bytes(path.read_bytes()[: 5632 * 2 + 600])
        found = list(list_clips(str(path)))
        assert [clip.sample_id for clip in found] == ["t.tar/0", "t.tar/1", "t.tar"]
        last = found[-1]
        assert isinstance(last, Rejection)
        assert last.reason == Reason.UNREADABLE_ARCHIVE

    def test_a_compressed_tar_is_refused_with_what_to_do(self, tmp_path):
        (tmp_path / "t.tar.gz").write_bytes(b"")
        with pytest.raises(DataError, match="Decompress"):
            clips(tmp_path / "t.tar.gz")


class TestManifest:
    def test_a_csv_names_paths_of_every_kind(self, tmp_path):
        path = tmp_path / "list.csv"
        path.write_text(
            'file,words,key\nv/1.mp4,"one, two",a\n/abs/2.mp4,three,b\ns3://bucket/3.mp4,,c\n'
        )
        found = clips(path, Columns("file", "words", "key"))
        assert [clip.sample_id for clip in found] == ["a", "b", "c"]
        assert [clip.caption for clip in found] == ["one, two", "three", ""]
        expected = [f"{tmp_path}/v/1.mp4", "/abs/2.mp4", "s3://bucket/3.mp4"]
        assert [clip.video.url for clip in found] == expected
        assert [clip.row for clip in found] == [0, 1, 2]

    def test_a_csv_without_the_columns_says_which_it_has(self, tmp_path):
        path = tmp_path / "list.csv"
        path.write_text("file,words\nx,y\n")
        with pytest.raises(DataError, match=r"file, words; no path, caption.*--path-column"):
            clips(path)

    def test_json_lines_that_name_no_clip_are_rejected_by_number(self, tmp_path):
        path = tmp_path / "list.jsonl"
        path.write_text(
            '{"path": "1.mp4", "caption": "one"}\n\nnot json\n{"caption": "x"}\n{"path": "2.mp4"}\n'
        )
        good, *bad, last = list_clips(str(path))
        assert isinstance(good, SourceClip)
        assert (good.sample_id, good.caption) == ("1.mp4", "one")
        assert [(b.row, b.reason) for b in bad if isinstance(b, Rejection)] == [
            (1, Reason.BAD_MANIFEST_ROW),
            (2, Reason.BAD_MANIFEST_ROW),
        ]
        assert isinstance(last, SourceClip)
        assert last.caption is None
