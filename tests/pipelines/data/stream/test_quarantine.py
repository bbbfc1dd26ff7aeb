"""What cannot be used is left out by name, counted, and stops the run past the limit."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.checking.check import CheckOptions, check_shards
from pipelines.data.shards.filesystem import S3Settings, open_folder
from pipelines.data.shards.index import Shard, write_index
from pipelines.data.shards.rejection import Rejection
from pipelines.data.shards.schema import (
    TEXT_EMBEDS,
    Encoding,
    ShardKind,
    encoded_schema,
    parquet_options,
)
from pipelines.data.stream.feed import Feed, FeedProgress, StreamSettings
from pipelines.data.stream.inspect import first_captions, inspect_folder
from pipelines.data.stream.plan import ShuffleSettings
from pipelines.data.stream.quarantine import QuarantineFile, Tally
from pipelines.data.stream.source import Source
from sgmd_core.errors import ConfigError, DataError
from tests.helpers.shards import byte_strings, write_folder, write_shard

NUM_GOOD = 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three good shards of ten rows."""
    write_folder(tmp_path / "set", (10, 10, 10))
    return tmp_path / "set"


def feed(
    folder: Path, limit: float = 0.9, progress: FeedProgress = FeedProgress(), **wanted
) -> Feed:
    settings = StreamSettings(Source(str(folder), **wanted), 0, max_bad_fraction=limit)
    return Feed(settings, progress, 1000)


def one_epoch(folder: Path, **wanted) -> tuple[list[str], list[Rejection]]:
    """Ids and rejects of the first epoch."""
    stream, names, rejects = feed(folder, **wanted), [], []
    while True:
        batch = stream.take(1)
        rejects += batch.rejects
        if batch.stop is not None or batch.cursor.epoch:
            return names, rejects
        names += batch.sample_ids


def reject(folder: Path, **wanted) -> Rejection:
    """The one reject of an epoch whose good rows all came."""
    names, rejects = one_epoch(folder, **wanted)
    assert len(names) == len(set(names)) == NUM_GOOD
    assert len(rejects) == 1
    return rejects[0]


@pytest.mark.parametrize("column", ["sample_id", "caption"])
def test_text_that_is_no_utf8_costs_its_row(folder: Path, column: str) -> None:
    columns = {"sample_id": ["new-0", "new-1"], "caption": ["größer", "small"]}
    columns[column] = [b"gr\xf6\xdfer", columns[column][1]]
    table = pa.table({name: byte_strings(values) for name, values in columns.items()})
    pq.write_table(table, folder / "latin.parquet")
    names, rejects = one_epoch(folder)
    assert len(names) == NUM_GOOD + 1
    assert "new-1" in names
    reason = {"caption": "unreadable_caption", "sample_id": "no_id"}[column]
    assert [each.why for each in rejects] == [f"{reason} (no UTF-8)"]
    assert rejects[0].sample_id == ("gr\ufffd\ufffder" if column == "sample_id" else "new-0")


@pytest.mark.parametrize("caption", [None, "", " \t\n "])
def test_a_row_without_caption(folder: Path, caption: str | None) -> None:
    write_shard(folder / "bad.parquet", ["x"], [caption])
    words = "no text" if caption is None else "nothing but blanks"
    assert reject(folder) == Rejection("x", "bad.parquet", 0, "empty_caption", words, 0)


def test_a_caption_that_is_too_long(folder: Path) -> None:
    write_shard(folder / "bad.parquet", ["x"], ["é" * 101])
    found = reject(folder, max_caption_chars=100)
    assert (found.source, found.sample_id) == ("bad.parquet", "x")
    assert found.why == "long_caption (101 characters; at most 100)"


@pytest.mark.parametrize("name", [None, ""])
def test_a_row_without_id(folder: Path, name: str | None) -> None:
    write_shard(folder / "bad.parquet", [name], ["a caption"])
    assert reject(folder) == Rejection(name or "", "bad.parquet", 0, "no_id", row_group=0)
    assert check_shards(str(folder), CheckOptions(num_processes=0)).bad == {"no_id": 1}


def test_an_id_that_came_before(folder: Path) -> None:
    write_shard(folder / "part-001a.parquet", ["1-3"])
    found = reject(folder)
    assert found.sample_id == "1-3"
    assert found.why.startswith("duplicate_id")
    assert found.source in ("part-001.parquet", "part-001a.parquet")


def test_an_id_is_new_again_in_the_next_epoch_and_known_after_a_resume(folder: Path) -> None:
    write_shard(folder / "bad.parquet", ["0-0", "1-1", "2-2"])
    stream = feed(folder)
    first, *later = [stream.take(NUM_GOOD) for _ in range(6)]
    assert len(first.rejects) == 3
    for batch in later:
        assert sorted(batch.sample_ids) == sorted(first.sample_ids)
        assert batch.rejects == ()
    write_shard(folder / "bad.parquet", list(first.sample_ids[:4]))
    resumed = feed(folder, progress=FeedProgress(used_ids=first.sample_ids[:4]))
    batch = resumed.take(NUM_GOOD - 4)
    assert not set(batch.sample_ids) & set(first.sample_ids[:4])


@pytest.mark.parametrize("kept", [3, 100])
def test_a_shard_that_was_cut_short(folder: Path, kept: int) -> None:
    write_shard(folder / "bad.parquet", ["x"] * 50)
    path = folder / "bad.parquet"
    path.write_bytes(path.read_bytes()[:kept])
    found = reject(folder)
    assert (found.source, found.row_group, found.num_rows) == ("bad.parquet", None, None)
    assert "no readable footer" in found.why


def test_a_pointer_of_git_lfs_in_place_of_a_shard_is_called_so(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / "bad.parquet").write_text(pointer)
    assert "`git lfs pull` fetches the file" in reject(folder).why


def test_a_shard_without_rows(folder: Path) -> None:
    write_shard(folder / "bad.parquet", [])
    assert reject(folder).why == "no rows"


def test_a_missing_column(folder: Path) -> None:
    pq.write_table(pa.table({"sample_id": ["a"], "text": ["b"]}), folder / "bad.parquet")
    found = reject(folder)
    assert (found.source, found.row_group, found.row) == ("bad.parquet", 0, None)
    assert found.why == "missing column caption"


def test_a_column_of_the_wrong_type(folder: Path) -> None:
    pq.write_table(pa.table({"sample_id": ["a"], "caption": [1.5]}), folder / "bad.parquet")
    assert "type" in reject(folder).why


def test_only_the_corrupt_row_group_of_a_shard_is_left_out(folder: Path) -> None:
    ids = [f"x{row}" for row in range(6)]
    write_shard(folder / "bad.parquet", ids, ["a long caption " * 50 + name for name in ids])
    path = folder / "bad.parquet"
    start = pq.ParquetFile(path).metadata.row_group(1).column(1).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 12] = bytes(12)
    path.write_bytes(content)
    names, rejects = one_epoch(folder)
    assert {"x0", "x1", "x2"} <= set(names)
    assert len(names) == NUM_GOOD + 3
    assert [(each.row_group, each.row, each.num_rows) for each in rejects] == [(1, None, 3)]
    assert "corrupt row group" in rejects[0].why


def test_bits_that_flipped_inside_a_page_are_noticed(folder: Path) -> None:
    encoding = Encoding((1, 1, 2, 2), (2, 4), "float32", "v", "t")
    schema = encoded_schema(encoding)
    values = {"sample_id": ["x"], "caption": ["y"], "latents": [bytes(16)]}
    path = folder / "bad.parquet"
    table = pa.table({**values, "text_embeds": [b"\x01" * 32]}, schema=schema)
    pq.write_table(table, path, **parquet_options(schema))
    content = path.read_bytes()
    assert content.count(b"\x01" * 32) == 1
    path.write_bytes(content.replace(b"\x01" * 32, b"\x01" * 31 + b"\x00"))
    for shard in folder.glob("part-*"):
        shard.unlink()
    _, rejects = one_epoch(folder, columns=(TEXT_EMBEDS,), encoding=encoding, limit=0.0)
    assert "corrupt row group" in rejects[0].why


def test_a_shard_that_disappears_meanwhile(folder: Path) -> None:
    write_index(*open_folder(str(folder)), [
        *(Shard(path.name, path.stat().st_size, (3, 3, 3, 1)) for path in folder.glob("*")),
        Shard("gone.parquet", 1000, (4, 4)),
    ])  # fmt: skip
    names, rejects = one_epoch(folder)
    assert len(names) == NUM_GOOD
    assert {(each.source, each.row_group, each.num_rows) for each in rejects} == {
        ("gone.parquet", 0, 4),
        ("gone.parquet", 1, 4),
    }
    assert all("not there (any more)" in each.why for each in rejects)


def test_a_shard_that_changed_since_the_index(folder: Path) -> None:
    path = folder / "bad.parquet"
    write_shard(path, ["x", "y"])
    shards = [Shard(p.name, p.stat().st_size, (3, 3, 3, 1)) for p in folder.glob("part*")]
    write_index(
        *open_folder(str(folder)), [*shards, Shard("bad.parquet", path.stat().st_size, (7,))]
    )
    assert "changed since it was listed (7 rows, now 2)" in reject(folder).why


def encoded_shard(path: Path, encoding: Encoding, latents: bytes, text: bytes) -> None:
    columns = {"sample_id": [path.stem], "caption": ["c"], "latents": [latents]}
    schema = encoded_schema(encoding)
    pq.write_table(pa.table({**columns, "text_embeds": [text]}, schema=schema), path)


def test_encoded_rows_of_a_wrong_shape_or_maker(tmp_path: Path) -> None:
    wanted = Encoding((1, 1, 2, 2), (2, 4), "float32", "v", "t")
    folder = tmp_path / "set"
    folder.mkdir()
    encoded_shard(folder / "good.parquet", wanted, bytes(16), bytes(16))
    encoded_shard(folder / "ragged.parquet", wanted, bytes(16), bytes(15))
    encoded_shard(folder / "long.parquet", wanted, bytes(16), bytes(48))
    encoded_shard(folder / "latents.parquet", wanted, bytes(12), bytes(16))
    other = Encoding((1, 1, 2, 2), (2, 4), "float32", "v", "another")
    encoded_shard(folder / "other.parquet", other, bytes(16), bytes(16))
    write_shard(folder / "plain.parquet", ["plain"])
    names, rejects = one_epoch(folder, columns=("latents", TEXT_EMBEDS), encoding=wanted)
    assert names == ["good"]
    reasons = {Path(each.source).stem: each.why for each in rejects}
    assert set(reasons) == {"ragged", "long", "latents", "other", "plain"}
    assert "bad_encoding (text embedding of 15 bytes)" in reasons["ragged"]
    assert "bad_encoding (text embedding of 48 bytes)" in reasons["long"]
    assert "bad_encoding (latents of 12 bytes)" in reasons["latents"]
    assert "encoded otherwise" in reasons["other"]
    assert "missing column latents" in reasons["plain"]


def test_past_the_limit_the_worst_shards_are_named(folder: Path) -> None:
    write_shard(folder / "worst.parquet", [f"w{row}" for row in range(9)], [""] * 9)
    write_shard(folder / "bad.parquet", ["b"], [""])
    batch = feed(folder, limit=0.1).take(NUM_GOOD + 1)
    assert batch.stop is not None
    assert batch.sample_ids == ()
    told = str(DataError(*batch.stop))
    assert "10 of about 40 rows" in told
    worst = "worst.parquet (9 rows, empty_caption (nothing but blanks))"
    assert told.index(worst) < told.index("bad.parquet (1 rows")
    assert "10.00%" in told
    assert len(batch.rejects) == 10


def test_up_to_the_limit_the_stream_goes_on(folder: Path) -> None:
    write_shard(folder / "bad.parquet", ["b"], [""])
    assert feed(folder, limit=1 / 31).take(NUM_GOOD + 1).stop is None


def test_a_whole_epoch_without_a_usable_row_is_an_error(tmp_path: Path) -> None:
    write_shard(tmp_path / "set" / "bad.parquet", ["a", "b"], ["", None])
    with pytest.raises(DataError, match=r"no usable row in the whole of epoch 0"):
        feed(tmp_path / "set", limit=1.0).take(1)


def test_rejects_are_told_once_and_not_again_after_a_resume(folder: Path) -> None:
    write_shard(folder / "bad.parquet", ["b"], [""])
    stream = feed(folder)
    told = [reject for _ in range(9) for reject in stream.take(10).rejects]
    assert len(told) == 1
    resumed = feed(folder, progress=FeedProgress(rejects=tuple(told)))
    assert resumed.take(NUM_GOOD).rejects == ()


def test_a_shard_of_unknown_length_counts_like_the_others(folder: Path) -> None:
    unknown = Rejection("", "x", None, "no readable footer", num_rows=None)
    tally = Tally(0.2)
    tally.add([unknown])
    assert tally.verdict(num_rows=40, rows_per_shard=10) is not None
    assert tally.verdict(num_rows=50, rows_per_shard=10) is None


def test_the_file_is_whole_at_any_time_and_can_be_rewound(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.parquet"
    book = QuarantineFile(path)
    book.add(0, [])
    assert not path.exists()
    rejects = [Rejection(f"id{row}", "s", row, "no caption", row_group=0) for row in range(3)]
    for iteration, each in enumerate(rejects):
        book.add(iteration, [each])
        assert pq.read_table(path).num_rows == iteration + 1
    again = QuarantineFile(path)
    assert again.rejects == rejects
    again.rewind(1)
    assert QuarantineFile(path).rejects == rejects[:1]
    assert again.counts() == {"entries": 1, "shards": 1, "reasons": {"no caption": 1}}


def test_a_first_look_tells_size_and_kind(folder: Path) -> None:
    facts = inspect_folder(Source(str(folder)), 0, ShuffleSettings())
    assert (facts.num_shards, facts.num_rows, facts.kind) == (3, NUM_GOOD, ShardKind.CAPTIONS)


def test_a_first_look_refuses_a_folder_whose_shards_all_lack_a_column(tmp_path: Path) -> None:
    for shard in range(3):
        table = pa.table({"sample_id": ["a"], "label": ["b"]})
        (tmp_path / "set").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "set" / f"{shard}.parquet")
    with pytest.raises(DataError, match=r"no usable row.*0\.parquet.*missing column caption"):
        inspect_folder(Source(str(tmp_path / "set")), 0, ShuffleSettings())


def test_held_out_captions_are_all_good_or_refused(folder: Path) -> None:
    assert len(set(first_captions(str(folder), S3Settings(), 0, NUM_GOOD))) == NUM_GOOD
    with pytest.raises(ConfigError, match=r"30 rows.*at least 31.*Set validation.num_captions=30"):
        first_captions(str(folder), S3Settings(), 0, 31, setting="validation.num_captions={}")
    everything = first_captions(str(folder), S3Settings(), 0, NUM_GOOD)
    assert first_captions(str(folder), S3Settings(), 0, 70, at_least=2) == everything
    with pytest.raises(ConfigError, match=r"30 rows.*at least 31"):
        first_captions(str(folder), S3Settings(), 0, 70, at_least=31)
    write_shard(folder / "bad.parquet", ["b"], [""])
    with pytest.raises(DataError, match=r"held-out.*bad\.parquet"):
        first_captions(str(folder), S3Settings(), 0, NUM_GOOD)


def test_a_part_of_no_byte_is_named_and_counts_no_row(folder: Path) -> None:
    (folder / "part-empty.parquet").write_bytes(b"")
    found = reject(folder)
    assert (found.source, found.why, found.num_rows) == ("part-empty.parquet", "no rows", 0)
