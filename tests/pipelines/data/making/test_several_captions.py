"""`sgmd prepare --captions`: clips with several captions, in lists and in repeated rows."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.data.making.caption_choice import CaptionChoice
from pipelines.data.making.prepare import PrepareOptions, prepare
from pipelines.data.making.prepare_clip import ClipRules
from pipelines.data.making.source_clip import Columns
from sgmd_core.errors import DataError
from tests.helpers.video_files import grey_frames, video_file

CHOICES = tuple(CaptionChoice)
FIVE = [f"caption {number}" for number in range(5)]


def options(choice: CaptionChoice, seed: int = 0, columns: Columns = Columns()) -> PrepareOptions:
    rules = ClipRules(captions=choice, seed=seed)
    return PrepareOptions(num_processes=0, max_bad_fraction=1.0, rules=rules, columns=columns)


def captions(folder: Path) -> dict[str, str]:
    """The captions of a set by id, in its order; no id stands twice."""
    table = pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("part-*.parquet")))
    ids = table["sample_id"].to_pylist()
    assert len(ids) == len(set(ids))
    return dict(zip(ids, table["caption"].to_pylist(), strict=True))


def reasons(folder: Path) -> dict[str, str]:
    found = pq.read_table(folder / "quarantine.parquet").to_pylist()
    return {row["sample_id"]: row["reason"] for row in found}


def write_rows(path: Path, rows: Sequence[tuple[str, object]]) -> Path:
    """JSON lines with a path and a caption, beside the videos that they name."""
    lines = [json.dumps({"path": name, "caption": caption}) for name, caption in rows]
    path.write_text("\n".join(lines))
    for name in {name for name, _ in rows}:
        shade = 40 + sum(name.encode()) % 150
        (path.parent / name).write_bytes(video_file(grey_frames([shade, shade + 20])))
    return path


def write_source(folder: Path, form: str) -> Path:
    """Clips a and b with the five captions and c with one, in one of the forms of a source."""
    held: dict[str, object] = {"a.mp4": FIVE, "b.mp4": FIVE, "c.mp4": "alone"}
    if form == "repeated rows":
        rows = [(name, caption) for caption in FIVE for name in ("a.mp4", "b.mp4")]
        return write_rows(folder / "list.jsonl", [("c.mp4", "alone"), *rows])
    manifest = write_rows(folder / "list.jsonl", list(held.items()))
    if form == "lists":
        return manifest
    manifest.unlink()
    if form == "Parquet":
        table = pa.table({"path": [*held], "caption": [FIVE, FIVE, ["alone"]]})
        pq.write_table(table, folder / "list.parquet")
        return folder / "list.parquet"
    if form == "JSON":
        (folder / "list.json").write_text(json.dumps(held))
        return folder / "list.json"
    for name, value in held.items():
        (folder / name).with_suffix(".json").write_text(json.dumps({"caption": value}))
    if form == "folder":
        return folder
    archive = folder / "clips.tar"
    with tarfile.open(archive, "w") as tar:
        for path in sorted(folder.iterdir()):
            if path != archive:
                member = tarfile.TarInfo(path.name)
                member.size = path.stat().st_size
                tar.addfile(member, io.BytesIO(path.read_bytes()))
    return archive


@pytest.mark.parametrize("form", ["lists", "repeated rows", "Parquet", "JSON", "folder", "tar"])
def test_each_form_of_several_captions_follows_the_rule(tmp_path, form):
    (tmp_path / "source").mkdir()
    source = write_source(tmp_path / "source", form)
    a, b, c = (f"clips.tar/{name}" if form == "tar" else f"{name}.mp4" for name in "abc")
    found, reports = {}, {}
    for choice in CHOICES:
        reports[choice] = prepare(str(source), str(tmp_path / choice), options(choice))
        again = prepare(str(source), str(tmp_path / choice), options(choice))
        assert (again.num_new, again.rejected) == (0, {})
        found[choice] = captions(tmp_path / choice)
    assert found["first"] == {a: FIVE[0], b: FIVE[0], c: "alone"}
    assert found["random"].keys() == found["first"].keys()
    assert found["random"][a] in FIVE
    expected = {f"{clip}#{n}": text for clip in (a, b) for n, text in enumerate(FIVE)}
    assert found["all"] == expected | {f"{c}#0": "alone"}
    assert [reports[choice].num_left_out for choice in CHOICES] == [8, 0, 8]


class TestRandom:
    def test_the_choice_depends_on_the_id_and_the_seed_and_on_nothing_else(self, tmp_path):
        names = [f"clip {number}" for number in range(12)]
        columns = Columns(None, sample_id="id")
        found = []
        for number, (order, seed) in enumerate([(names, 0), (names[::-1], 0), (names, 1)]):
            path = tmp_path / f"{number}.jsonl"
            path.write_text("\n".join(json.dumps({"id": n, "caption": FIVE}) for n in order))
            rule = options(CaptionChoice.RANDOM, seed, columns)
            prepare(str(path), str(tmp_path / str(number)), rule)
            found.append(captions(tmp_path / str(number)))
        assert found[0] == found[1]
        assert len(set(found[0].values())) >= 3
        assert sum(found[0][name] != found[2][name] for name in names) >= 4

    def test_the_choice_of_some_ids_is_fixed(self, tmp_path):
        path = tmp_path / "list.json"
        path.write_text(json.dumps({name: FIVE for name in ("one", "two", "three", "four")}))
        columns = Columns(None, sample_id="id")
        prepare(str(path), str(tmp_path / "set"), options(CaptionChoice.RANDOM, 0, columns))
        expected = {"one": FIVE[4], "two": FIVE[4], "three": FIVE[4], "four": FIVE[1]}
        assert captions(tmp_path / "set") == expected


class TestUnusableCaptions:
    def test_only_usable_ones_are_taken_and_each_keeps_its_number(self, tmp_path):
        rows = [("a.mp4", [" ", 3, "x" * 5000, "good", "\ud800", " better "]), ("b.mp4", [])]
        source = write_rows(tmp_path / "list.jsonl", [*rows, ("c.mp4", [1, 2]), ("d.mp4", [""])])
        for choice in CHOICES:
            prepare(str(source), str(tmp_path / choice), options(choice))
        whole = {"b.mp4": "missing_caption", "c.mp4": "unreadable_caption"}
        assert captions(tmp_path / "first") == {"a.mp4": "good"}
        assert captions(tmp_path / "random").popitem()[1] in ("good", "better")
        for choice in ("first", "random"):
            assert reasons(tmp_path / choice) == whole | {"d.mp4": "empty_caption"}
        assert captions(tmp_path / "all") == {"a.mp4#3": "good", "a.mp4#5": "better"}
        assert reasons(tmp_path / "all") == whole | {
            "a.mp4#0": "empty_caption",
            "a.mp4#1": "unreadable_caption",
            "a.mp4#2": "long_caption",
            "a.mp4#4": "unreadable_caption",
            "d.mp4#0": "empty_caption",
        }


class TestRepeatedRows:
    @pytest.mark.parametrize("choice", CHOICES)
    def test_an_id_with_another_path_stays_a_duplicate(self, tmp_path, choice):
        write_rows(tmp_path / "videos.jsonl", [("a.mp4", ""), ("b.mp4", "")])
        source = tmp_path / "list.csv"
        source.write_text(
            "path,caption,id\na.mp4,one,x\nb.mp4,other,x\na.mp4,two,x\na.mp4,own,y\na.mp4,one,x\n"
        )
        columns = Columns(sample_id="id")
        report = prepare(str(source), str(tmp_path / "set"), options(choice, 0, columns))
        found = captions(tmp_path / "set")
        if choice is CaptionChoice.ALL:
            assert found == {"x#0": "one", "x#1": "two", "y#0": "own"}
        else:
            assert found.keys() == {"x", "y"}
            assert found["x"] in ("one", "two")
        assert reasons(tmp_path / "set") == {"x": "duplicate_id"}
        repeated = [kind for kind in report.skipped if "repeat" in kind.what]
        assert [(kind.count, kind.example) for kind in repeated] == [(1, f"{source}, row 4")]

    def test_captions_that_join_the_manifest_later_join_all(self, tmp_path):
        source = write_rows(tmp_path / "list.jsonl", [("a.mp4", "one")])
        for rows in ([("a.mp4", "one")], [("a.mp4", "one"), ("a.mp4", "two")]):
            write_rows(source, rows)
            report = prepare(str(source), str(tmp_path / "set"), options(CaptionChoice.ALL))
            assert report.num_new == 1
        assert captions(tmp_path / "set") == {"a.mp4#0": "one", "a.mp4#1": "two"}


class TestCommand:
    def test_the_summary_counts_what_is_left_out_and_another_rule_is_refused(self, tmp_path):
        source = write_rows(tmp_path / "list.jsonl", [("a.mp4", "one"), ("a.mp4", "two")])
        command = ["prepare", str(source), str(tmp_path / "set"), "--processes", "0"]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        (line,) = [line for line in result.stdout.splitlines() if line.startswith("left out")]
        assert "several: 1 (--captions first" in line
        again = CliRunner().invoke(app, [*command, "--captions", "all"])
        assert again.exit_code == 2
        assert "captions = 'first'; this run has captions = 'all'" in again.stderr
        # Without a random choice the seed decides nothing.
        assert CliRunner().invoke(app, [*command, "--seed", "3"]).exit_code == 0

    def test_another_seed_of_a_random_choice_is_refused(self, tmp_path):
        source = write_rows(tmp_path / "list.jsonl", [("a.mp4", FIVE)])
        prepare(str(source), str(tmp_path / "set"), options(CaptionChoice.RANDOM))
        with pytest.raises(DataError, match=r"caption_seed = 0; this run has caption_seed = 1"):
            prepare(str(source), str(tmp_path / "set"), options(CaptionChoice.RANDOM, 1))

    @pytest.mark.parametrize("choice", CHOICES)
    def test_lists_are_taken_without_videos(self, tmp_path, choice):
        source = tmp_path / "list.json"
        source.write_text(json.dumps([{"caption": FIVE}, {"caption": "alone"}]))
        command = ["prepare", str(source), str(tmp_path / "set"), "--captions-only", "--json"]
        result = CliRunner().invoke(app, [*command, "--captions", choice, "--processes", "0"])
        assert result.exit_code == 0, result.output
        found = [*captions(tmp_path / "set").values()]
        assert found[-1] == "alone"
        assert set(found[:-1]) <= set(FIVE)
        num_left_out = 0 if choice is CaptionChoice.ALL else 4
        assert json.loads(result.stdout)["captions_left_out"] == num_left_out
        assert len(found) == 6 - num_left_out
