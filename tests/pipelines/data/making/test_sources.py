"""Which clips a source names, in which order, under which ids."""

import io
import json
import os
import re
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.making.skipped import SkippedFiles
from pipelines.data.making.sources import (
    CaptionFile,
    Columns,
    FileRange,
    SourceClip,
    list_clips,
)
from pipelines.data.shards.columns import CAPTION_NAMES
from pipelines.data.shards.rejection import Reason, Rejection
from sgmd_core.errors import DataError
from tests.helpers.shards import write_unknown_page

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


def rejected(found: list[SourceClip | Rejection]) -> list[Rejection]:
    return [each for each in found if isinstance(each, Rejection)]


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    for field, value in fields.items():
        setattr(entry, field, value)
    tar.addfile(entry, io.BytesIO(data))


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
        assert found[0].caption == CaptionFile(FileRange(f"{tmp_path}/a.json"), CAPTION_NAMES)
        assert found[1].caption is None
        assert found[2].caption == CaptionFile(FileRange(f"{tmp_path}/b/2.txt"))

    def test_ids_do_not_depend_on_where_the_folder_lies(self, tmp_path):
        touch(tmp_path / "here", "x/1.mp4", "2.mp4")
        (tmp_path / "here").rename(tmp_path / "there")
        assert [clip.sample_id for clip in clips(tmp_path / "there")] == ["2.mp4", "x/1.mp4"]

    def test_a_missing_folder_is_told(self, tmp_path):
        with pytest.raises(DataError, match="nowhere"):
            clips(tmp_path / "nowhere")

    def test_suffixes_in_upper_case_are_taken(self, tmp_path):
        touch(tmp_path, "A.MP4", "A.TXT", "b.Mov", "b.JSON")
        write_tar(tmp_path / "T.TAR", {"K.MP4": b"video", "K.TXT": b"words"})
        first, packed, second = clips(tmp_path)
        assert first.caption == CaptionFile(FileRange(f"{tmp_path}/A.TXT"))
        assert second.caption == CaptionFile(FileRange(f"{tmp_path}/b.JSON"), CAPTION_NAMES)
        assert (content(packed.video), content(packed.caption.file)) == (b"video", b"words")

    def test_what_is_no_clip_is_counted_by_kind_with_an_example(self, tmp_path):
        source = tmp_path / "source"
        touch(source, "a.mp4", "a.txt", "a.json", "b.mp4", "b.mov", "b.txt", "lonely.txt")
        touch(source, "list.csv", "1.jpg", "2.JPG", "c.zip", "noext", ".hidden.mp4", "._a.mp4")
        touch(tmp_path / "elsewhere", "d.mp4")
        (source / "link").symlink_to(tmp_path / "elsewhere")
        with tarfile.open(source / "t.tar", "w") as tar:
            add(tar, "k.mp4", b"video")
            add(tar, "z.txt", b"words")
            add(tar, "i.png", b"picture")
            add(tar, "linked", type=tarfile.SYMTYPE, linkname="/etc")
        skipped = SkippedFiles()
        found = list(list_clips(str(source), skipped=skipped))
        assert [clip.sample_id for clip in found] == ["a.mp4", "b.mov", "b.mp4", "t.tar/k"]
        counts = {kind.what.partition(" (")[0]: kind.count for kind in skipped.kinds}
        assert counts == {
            "hidden files and folders, whose names begin with a dot": 1,
            "links to folders, which are not followed": 1,
            "files of an unknown kind, .jpg": 2,
            "files of an unknown kind, .png": 1,
            "files of an unknown kind, without a suffix": 1,
            "clips with several caption files, of which the first named is used": 1,
            "caption files that several videos of the same name share": 1,
            "caption files without a video of the same name up to the last dot": 2,
            "manifests beside other files, which are not read": 1,
            ".zip archives that are not read": 1,
            "members of tars that are not files and name no clip": 1,
        }
        lines = "\n".join(kind.in_words() for kind in skipped.kinds)
        for example in ("source/link", "t.tar/i.png", "a.mp4 with a.txt, a.json", "c.zip"):
            assert example in lines

    def test_many_unknown_kinds_end_in_one_line(self, tmp_path):
        touch(tmp_path, "a.mp4", *(f"x.k{number:02d}" for number in range(40)))
        skipped = SkippedFiles()
        list(list_clips(str(tmp_path), skipped=skipped))
        assert sum(kind.count for kind in skipped.kinds) == 40
        assert len(skipped.kinds) == 21

    @pytest.mark.parametrize(("name", "words"), [("a.mp4", "single video"), ("a.xyz", "a kind")])
    def test_a_file_that_lists_no_clips_is_refused_by_what_it_is(self, tmp_path, name, words):
        touch(tmp_path, name)
        with pytest.raises(DataError, match=words):
            clips(tmp_path / name)


class TestTar:
    def test_a_tar_names_its_clips_by_key_and_finds_their_bytes(self, tmp_path):
        members = {
            "d/001.mp4": b"first video",
            "d/001.txt": b"first",
            "d/002.left.mp4": b"second video",
            "d/002.left.json": json.dumps({"text": "second"}).encode(),
            "d/003.txt": b"no video",
            "d/004.mp4": b"fourth video",
        }
        path = write_tar(tmp_path / "t.tar", members)
        found = clips(path, Columns(caption="text"))
        names = ("001", "002.left", "004")
        assert [clip.sample_id for clip in found] == [f"t.tar/d/{name}" for name in names]
        assert content(found[0].video) == b"first video"
        assert isinstance(found[0].caption, CaptionFile)
        assert content(found[0].caption.file) == b"first"
        assert isinstance(found[1].caption, CaptionFile)
        assert found[1].caption.json_fields == ("text",)
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
        assert last.reason == Reason.DAMAGED_ARCHIVE

    def test_names_with_dots_are_paired_up_to_the_last_dot(self, tmp_path):
        members = {
            "Show.S01E01.mp4": b"first video",
            "Show.S01E01.txt": b"first",
            "Show.S01E02.mp4": b"second video",
            "x_1.5_3.0.mp4": b"third video",
            "x_1.5_3.0.txt": b"third",
        }
        first, second, third = clips(write_tar(tmp_path / "t.tar", members))
        assert (content(first.video), content(first.caption.file)) == (b"first video", b"first")
        assert (content(second.video), second.caption) == (b"second video", None)
        assert third.sample_id == "t.tar/x_1.5_3.0"
        assert content(third.caption.file) == b"third"

    def test_members_of_a_clip_may_lie_apart_and_those_of_macos_are_left_out(self, tmp_path):
        members = {
            "a.mp4": b"video a",
            "b.mp4": b"video b",
            "._a.mp4": b"attributes",
            "__MACOSX/b.mp4": b"attributes",
            "b.txt": b"b",
            "a.txt": b"a",
        }
        found = clips(write_tar(tmp_path / "t.tar", members))
        assert [clip.sample_id for clip in found] == ["t.tar/a", "t.tar/b"]
        assert [content(clip.caption.file) for clip in found] == [b"a", b"b"]

    def test_two_tars_joined_are_read_to_the_end(self, tmp_path):
        one = write_tar(tmp_path / "1", {"a.mp4": b"video a", "a.txt": b"a"}).read_bytes()
        two = write_tar(tmp_path / "2", {"b.mp4": b"video b", "b.txt": b"b"}).read_bytes()
        path = tmp_path / "t.tar"
        path.write_bytes(one + two)
        found = clips(path)
        assert [content(clip.video) for clip in found] == [b"video a", b"video b"]
        assert content(found[1].caption.file) == b"b"

    def test_a_caption_goes_with_the_video_of_its_own_tar_among_joined_ones(self, tmp_path):
        one = {"a.mp4": b"video a1", "b.mp4": b"video b1", "c.mp4": b"video c", "b.txt": b"b1"}
        two = {"a.mp4": b"video a2", "a.txt": b"a2", "b.mp4": b"video b2", "c.txt": b"c"}
        tars = [write_tar(tmp_path / f"{len(each)}", each).read_bytes() for each in (one, two)]
        (tmp_path / "t.tar").write_bytes(b"".join(tars))
        skipped = SkippedFiles()
        found = list(list_clips(str(tmp_path / "t.tar"), skipped=skipped))
        a, b, c = (clip for clip in found if isinstance(clip, SourceClip))
        assert (content(a.video), a.caption) == (b"video a1", None)
        assert (content(b.video), content(b.caption.file)) == (b"video b1", b"b1")
        assert (content(c.video), content(c.caption.file)) == (b"video c", b"c")
        assert [bad.reason for bad in rejected(found)] == [Reason.DUPLICATE_ID] * 2
        assert [kind.example for kind in skipped.kinds] == ["t.tar/a.txt"]

    def test_paths_in_a_tar_are_one_with_and_without_the_dot(self, tmp_path):
        with tarfile.open(tmp_path / "t.tar", "w") as tar:
            add(tar, "./a.mp4", b"video")
            add(tar, "b.mp4", type=tarfile.LNKTYPE, linkname="a.mp4")
            add(tar, "a.mp4", b"again")
        found = list(list_clips(str(tmp_path / "t.tar")))
        assert [content(clip.video) for clip in found[:2]] == [b"video", b"video"]
        assert [(bad.sample_id, bad.reason) for bad in rejected(found)] == [
            ("t.tar/a.mp4", Reason.UNREADABLE_MEMBER)
        ]

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            (lambda data: data[:2048], "no end mark at byte 2048"),
            (lambda data: data[:2048] + b"?" * 512 + data[2560:], "damaged header at byte 2048"),
            (lambda data: data + b"not a tar".ljust(512, b"?"), "damaged header"),
            (lambda data: data[:2500], "unexpected|truncated|no end mark|damaged"),
        ],
        ids=["cut at a member's border", "damaged header", "other data behind", "cut in a header"],
    )
    def test_a_tar_that_does_not_end_well_never_ends_silently(self, tmp_path, damage, words):
        path = write_tar(tmp_path / "t.tar", {f"{n}.mp4": b"video" for n in range(4)})
        path.write_bytes(damage(path.read_bytes()))
        found = list(list_clips(str(path)))
        assert [clip.sample_id for clip in found[:2]] == ["t.tar/0", "t.tar/1"]
        assert found[-1].reason == Reason.DAMAGED_ARCHIVE
        assert re.search(words, found[-1].detail)
        assert len(rejected(found)) == 1

    def test_a_hard_link_is_the_file_and_what_is_no_file_is_rejected_by_name(self, tmp_path):
        with tarfile.open(tmp_path / "t.tar", "w") as tar:
            add(tar, "a.mp4", b"video")
            add(tar, "b.mp4", type=tarfile.LNKTYPE, linkname="a.mp4")
            add(tar, "c.mp4", type=tarfile.LNKTYPE, linkname="gone.mp4")
            add(tar, "d.mp4", type=tarfile.SYMTYPE, linkname="/etc/passwd")
            add(tar, "e.mp4", type=tarfile.FIFOTYPE)
            add(tar, "f.fifo", type=tarfile.FIFOTYPE)
            add(tar, "g.mp4", type=tarfile.DIRTYPE)
            add(tar, "a.mp4", b"again")
            add(tar, "a.mov", b"another format")
        found = list(list_clips(str(tmp_path / "t.tar")))
        good = [clip for clip in found if isinstance(clip, SourceClip)]
        assert [clip.sample_id for clip in good] == ["t.tar/a", "t.tar/b"]
        assert [clip.reason for clip in rejected(found) if "mp4" in clip.sample_id] == (
            [Reason.UNREADABLE_MEMBER] * 4
        )
        details = " ".join(clip.detail for clip in rejected(found))
        for words in ("gone.mp4", "symbolic link", "a pipe", "the same name"):
            assert words in details
        assert len(rejected(found)) == 5
        assert len({clip.row for clip in found}) == len(found)

    def test_videos_whose_names_differ_in_the_case_of_the_suffix_are_named(self, tmp_path):
        path = write_tar(tmp_path / "t.tar", {"k.mp4": b"1", "k.MP4": b"2", "k.txt": b"words"})
        first, second = list_clips(str(path))
        assert content(first.video) == b"1"
        assert (second.reason, second.detail) == (
            Reason.DUPLICATE_ID,
            "k.MP4 beside k.mp4, which is taken",
        )

    def test_a_member_larger_than_its_tar_is_rejected(self, tmp_path):
        header = tarfile.TarInfo("a.mp4")
        header.size = 2**40
        path = tmp_path / "t.tar"
        path.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
        (found,) = list_clips(str(path))
        assert found.reason == Reason.UNREADABLE_ARCHIVE

    @pytest.mark.parametrize("name", ["b.tar.gz", "b.TGZ", "b.tar.lz4", "b.txz"])
    def test_a_compressed_tar_in_a_folder_is_rejected(self, tmp_path, name):
        touch(tmp_path, "a.mp4", name)
        _, packed = list_clips(str(tmp_path))
        assert isinstance(packed, Rejection)
        assert (packed.sample_id, packed.reason) == (name, Reason.UNREADABLE_ARCHIVE)
        assert "gunzip" in packed.detail

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
        with pytest.raises(
            DataError, match=r"words; no column path, .*no column caption, .*--path"
        ):
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

    @pytest.mark.parametrize(
        "caption", ['["one", "two"]', '{"en": "one"}', "3", "NaN", "true", '"\\ud800"']
    )
    def test_a_caption_that_is_no_text_is_rejected_and_never_stored_as_python(
        self, tmp_path, caption
    ):
        path = tmp_path / "list.jsonl"
        path.write_text(f'{{"path": "1.mp4", "caption": {caption}}}\n{{"path": "2.mp4"}}\n')
        bad, good = list_clips(str(path))
        assert isinstance(bad, Rejection)
        assert (bad.sample_id, bad.reason) == ("1.mp4", Reason.UNREADABLE_CAPTION)
        assert isinstance(good, SourceClip)

    @pytest.mark.parametrize(
        ("row", "words"),
        [
            ("1.mp4,a cat, a dog", "3 fields, the header has 2"),
            ("1.mp4", "1 fields"),
            ('1.mp4,"a cat', "unexpected end|expected"),
            ('1.mp4,"' + "x" * (2**20 + 1) + '"', "field limit"),
        ],
        ids=["bare comma", "too few", "unclosed quote", "huge field"],
    )
    @pytest.mark.parametrize("after", ["2.mp4,two", '2.mp4,"two"'])
    def test_a_bad_csv_row_costs_only_itself(self, tmp_path, row, words, after):
        path = tmp_path / "list.csv"
        path.write_text(f"path,caption\n{row}\n{after}\n3.mp4,three\n")
        bad, *good = list_clips(str(path))
        assert isinstance(bad, Rejection)
        assert bad.reason == Reason.BAD_MANIFEST_ROW
        assert re.search(words, bad.detail)
        assert [clip.caption for clip in good] == ["two", "three"]

    @pytest.mark.parametrize("column", ["path", "caption", "id"])
    def test_two_columns_of_one_name_are_refused_and_unused_ones_are_not(self, tmp_path, column):
        path = tmp_path / "list.csv"
        path.write_text(f"path,caption,id,,,{column}\n1.mp4,one,a,,,x\n")
        with pytest.raises(DataError, match=f"several columns of the name {column}"):
            clips(path, Columns(sample_id="id"))
        path.write_text("path,caption,id,,,\n1.mp4,one,a,,,\n")
        assert [clip.sample_id for clip in clips(path, Columns(sample_id="id"))] == ["a"]

    @pytest.mark.parametrize("sample_id", ["null", "true", "1.5", "NaN", '["a"]', '{"a": 1}', '""'])
    def test_an_id_that_is_no_text_or_number_is_rejected_and_never_stored_as_python(
        self, tmp_path, sample_id
    ):
        path = tmp_path / "list.jsonl"
        row = '{{"path": "1.mp4", "caption": "x", "id": {}}}\n'
        path.write_text("".join(row.format(each) for each in (sample_id, "7", '"b"')))
        bad, *good = list_clips(str(path), Columns(sample_id="id"))
        assert isinstance(bad, Rejection)
        assert bad.reason == Reason.BAD_MANIFEST_ROW
        assert [clip.sample_id for clip in good] == ["7", "b"]

    def test_a_long_quoted_caption_over_several_lines_is_one_caption(self, tmp_path):
        text = "line\n" * 40_000
        path = tmp_path / "list.csv"
        path.write_text(f'path,caption\n1.mp4,"{text}"\n2.mp4,two\n')
        assert [clip.caption for clip in clips(path)] == [text, "two"]

    def test_rows_that_are_not_utf8_are_rejected_and_the_others_kept(self, tmp_path):
        path = tmp_path / "list.csv"
        path.write_bytes("path,caption\n1.mp4,café\n".encode("latin-1") + b"2.mp4,two\n")
        bad, good = list_clips(str(path))
        assert (bad.sample_id, bad.reason) == ("1.mp4", Reason.UNREADABLE_CAPTION)
        assert "UTF-8" in bad.detail
        assert good.caption == "two"

    @pytest.mark.parametrize(
        ("encoding", "words"),
        [
            ("utf-16", "UTF-16LE.*iconv -f UTF-16 "),
            ("utf-16-le", "UTF-16LE.*iconv -f UTF-16LE "),
            ("utf-16-be", "UTF-16BE.*iconv -f UTF-16BE "),
            ("utf-32", "UTF-32LE.*iconv -f UTF-32 "),
        ],
    )
    @pytest.mark.parametrize("text", ["path,caption\n1.mp4,one\n", "一只猫\n一只狗\n"])
    @pytest.mark.parametrize("name", ["list.csv", "list.jsonl", "list.txt"])
    def test_wide_text_is_refused_by_the_name_of_its_encoding(
        self, tmp_path, name, text, encoding, words
    ):
        path = tmp_path / name
        path.write_bytes(text.encode(encoding))
        with pytest.raises(DataError, match=words):
            clips(path)

    def test_a_zero_byte_is_not_called_another_encoding(self, tmp_path):
        path = tmp_path / "list.txt"
        path.write_bytes(b"a red c\0rcle\na blue bar\n")
        with pytest.raises(DataError, match=r"zero bytes in the first line.*file of text"):
            clips(path)
        path.write_bytes(b"a red circle\na blue b\0r\n")
        assert len(clips(path)) == 2

    @pytest.mark.parametrize("name", ["path", "file_name", "File_Name", "video_path", "video"])
    def test_the_only_column_with_a_usual_name_holds_the_paths(self, tmp_path, name):
        table = {name: ["v/1.mp4"], "Caption": ["one"]}
        pq.write_table(pa.table(table), tmp_path / "a.parquet")
        (tmp_path / "a.csv").write_text(f"{name},Caption\nv/1.mp4,one\n")
        (tmp_path / "a.jsonl").write_text(json.dumps({name: "v/1.mp4", "Caption": "one"}))
        (tmp_path / "a.json").write_text(json.dumps([{name: "v/1.mp4", "Caption": "one"}]))
        for path in sorted(tmp_path.iterdir()):
            (clip,) = clips(path)
            assert (clip.sample_id, clip.caption) == ("v/1.mp4", "one")
            assert clip.video.url == f"{tmp_path}/v/1.mp4"

    @pytest.mark.parametrize("name", ["list.csv", "list.jsonl"])
    def test_two_columns_that_may_be_the_path_are_refused(self, tmp_path, name):
        path = tmp_path / name
        row = {"video": "1.mp4", "file_name": "2.mp4", "caption": "one"}
        csv_text = f"{','.join(row)}\n{','.join(row.values())}\n"
        path.write_text(csv_text if name.endswith("csv") else json.dumps(row))
        with pytest.raises(DataError, match=r"video and file_name, each.*--path-column"):
            clips(path)
        assert clips(path, Columns("video"))[0].sample_id == "1.mp4"

    @pytest.mark.parametrize("suffix", ["csv", "tsv"])
    @pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
    def test_the_first_line_shows_what_separates_the_fields(self, tmp_path, suffix, delimiter):
        path = tmp_path / f"list.{suffix}"
        rows = [["file_name", "caption"], ["1.mp4", '"a, b; c\td | e"']]
        path.write_text("".join(f"{delimiter.join(row)}\n" for row in rows))
        assert [clip.caption for clip in clips(path)] == ["a, b; c\td | e"]

    @pytest.mark.parametrize("name", ["video", "mp4"])
    def test_a_table_that_holds_the_videos_is_named_a_set(self, tmp_path, name):
        path = tmp_path / "train.parquet"
        videos = [{"bytes": b"video", "path": "1.mp4"}]
        pq.write_table(pa.table({name: videos, "caption": ["one"]}), path)
        with pytest.raises(DataError, match=rf"column {name}: a set.*sgmd check DATA"):
            clips(path)
        assert clips(path, Columns(None))[0].caption == "one"

    @pytest.mark.parametrize("end", ["\r", "\r\n"])
    def test_lines_may_end_as_other_systems_end_them(self, tmp_path, end):
        (tmp_path / "a.csv").write_bytes(f"path,caption{end}1.mp4,one{end}2.mp4,two{end}".encode())
        (tmp_path / "a.txt").write_bytes(f"one{end}two".encode())
        for name in ("a.csv", "a.txt"):
            assert [clip.caption for clip in clips(tmp_path / name)] == ["one", "two"]

    @pytest.mark.parametrize(("encoding", "text"), [("latin-1", "café"), ("gbk", "一只猫在跑步")])
    @pytest.mark.parametrize("name", ["list.csv", "list.jsonl", "list.json", "list.txt"])
    def test_a_file_in_another_encoding_is_refused_in_one_sentence(
        self, tmp_path, name, encoding, text
    ):
        listed = [{"path": f"{number}.mp4", "caption": text} for number in range(5)]
        lines = [json.dumps(row, ensure_ascii=False) for row in listed]
        content = {
            "list.csv": "path,caption\n" + "".join(f"{n}.mp4,{text}\n" for n in range(5)),
            "list.jsonl": "\n".join(lines),
            "list.json": f"[{','.join(lines)}]",
            "list.txt": f"{text}\n" * 5,
        }[name]
        (tmp_path / name).write_bytes(content.encode(encoding))
        with pytest.raises(DataError, match=r"not UTF-8.*iconv -f LATIN1 -t UTF-8"):
            clips(tmp_path / name)
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert [clip.caption for clip in clips(tmp_path / name)] == [text] * 5

    def test_json_nested_too_deep_costs_its_row(self, tmp_path):
        path = tmp_path / "list.jsonl"
        path.write_text("[" * 200_000 + '\n{"path": "2.mp4", "caption": "two"}\n')
        bad, good = list_clips(str(path))
        assert bad.reason == Reason.BAD_MANIFEST_ROW
        assert good.caption == "two"


def test_a_file_name_that_is_not_utf8_is_rejected(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.mp4")).write_bytes(b"video")
    touch(tmp_path, "a.mp4")
    good, bad = list_clips(str(tmp_path))
    assert good.sample_id == "a.mp4"
    assert (bad.reason, bad.sample_id) == (Reason.NO_ID, "\\udcff.mp4")


def test_a_parquet_manifest_of_which_arrow_skips_a_page_is_not_read_as_a_shorter_one(tmp_path):
    names = {"path": [f"{row}.mp4" for row in range(12)]}
    names["caption"] = [f"clip {row}" for row in range(12)]
    write_unknown_page(tmp_path / "clips.parquet", pa.table(names), group=12)
    with pytest.raises(DataError, match=r"clips\.parquet.*12 rows fewer than the footer promises"):
        list(list_clips(str(tmp_path / "clips.parquet"), Columns(path="path")))


def test_a_caption_file_beside_a_video_holds_its_caption(tmp_path):
    touch(tmp_path, "a.mp4")
    touch(tmp_path, "a.caption")
    (clip,) = clips(tmp_path)
    assert clip.caption == CaptionFile(FileRange(f"{tmp_path}/a.caption"))
