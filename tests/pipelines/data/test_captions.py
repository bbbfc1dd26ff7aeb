"""The caption plan: order, position and what is wrong with a shard."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.captions import CaptionRow, plan_captions, read_rows
from sgmd_core.errors import DataError


def write_shard(path: Path, ids: list[str], captions: list[str | None], group: int = 3) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"sample_id": ids, "caption": captions}), path, row_group_size=group)


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Four shards of 7, 7, 7 and 5 rows in row groups of at most 3."""
    for shard, num_rows in enumerate((7, 7, 7, 5)):
        ids = [f"{shard}-{row}" for row in range(num_rows)]
        write_shard(tmp_path / "set" / f"part-{shard}.parquet", ids, [f"clip {i}" for i in ids])
    return str(tmp_path / "set")


def stream(folder: str, seed: int, start: int, num_rows: int) -> list[CaptionRow]:
    plan = plan_captions(folder)
    rows = [row for task in plan.tasks(seed, start, num_rows) for row in read_rows(task)]
    return rows[:num_rows]


def test_an_epoch_hands_out_every_row_exactly_once(shards: str) -> None:
    names = [row.sample_id for row in stream(shards, 0, 0, 26)]
    assert len(set(names)) == 26


def test_epochs_and_seeds_have_orders_of_their_own(shards: str) -> None:
    first, second = stream(shards, 0, 0, 26), stream(shards, 0, 26, 26)
    assert first != second
    assert sorted(row.sample_id for row in first) == sorted(row.sample_id for row in second)
    assert stream(shards, 1, 0, 26) != first


@pytest.mark.parametrize("start", [0, 1, 2, 7, 25, 26, 27, 60])
def test_the_stream_goes_on_from_any_position_as_if_never_stopped(shards: str, start: int) -> None:
    whole = stream(shards, 3, 0, 80)
    assert stream(shards, 3, start, 80 - start) == whole[start:]


def test_a_row_keeps_its_own_caption(shards: str) -> None:
    assert all(row.caption == f"clip {row.sample_id}" for row in stream(shards, 5, 0, 26))


def test_a_missing_folder_is_named_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.*sgmd shapes"):
        plan_captions(str(tmp_path / "nowhere"))


def test_a_truncated_shard_is_named(shards: str) -> None:
    path = Path(shards) / "part-2.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"part-2\.parquet"):
        plan_captions(shards)


def test_an_empty_file_is_named(shards: str) -> None:
    (Path(shards) / "part-9.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"part-9\.parquet"):
        plan_captions(shards)


def test_a_shard_without_rows_is_named(shards: str) -> None:
    write_shard(Path(shards) / "part-9.parquet", [], [])
    with pytest.raises(DataError, match=r"part-9\.parquet.*without rows"):
        plan_captions(shards)


def test_a_missing_column_is_named(shards: str) -> None:
    pq.write_table(pa.table({"sample_id": ["a"], "text": ["b"]}), Path(shards) / "part-9.parquet")
    with pytest.raises(DataError, match=r"part-9\.parquet.*missing caption"):
        plan_captions(shards)


def test_a_corrupt_page_is_named(shards: str) -> None:
    path = Path(shards) / "part-1.parquet"
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)
    path.write_bytes(content)
    plan = plan_captions(shards)
    with pytest.raises(DataError, match=r"row group 0 of .*part-1\.parquet"):
        [read_rows(task) for task in plan.tasks(0, 0, plan.num_rows)]


@pytest.mark.parametrize("blank", [None, "", "  "])
def test_a_missing_caption_names_shard_and_sample(tmp_path: Path, blank: str | None) -> None:
    write_shard(tmp_path / "set" / "one.parquet", ["a", "b"], ["fine", blank])
    plan = plan_captions(str(tmp_path / "set"))
    with pytest.raises(DataError, match=r"one\.parquet.*first sample_id: b"):
        [read_rows(task) for task in plan.tasks(0, 0, 2)]
