"""One record of a rejected row, and one schema of `quarantine.parquet`, of sets and of runs."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.making.prepare import PrepareOptions, prepare
from pipelines.data.making.source_clip import Columns
from pipelines.data.shards.rejection import (
    Reason,
    Rejection,
    from_parquet,
    join_reason,
    split_reason,
    to_parquet,
)
from pipelines.data.stream.quarantine import QuarantineFile, Tally

ROW = Rejection("a", "s.parquet", 3, Reason.DUPLICATE_ID, "an earlier row has it", 1)
SHARD = Rejection("", "t.parquet", None, "no readable footer", num_rows=None)


def test_every_entry_comes_back_as_it_was_written():
    assert from_parquet(to_parquet([ROW, SHARD])) == [(ROW, None), (SHARD, None)]
    assert from_parquet(to_parquet([ROW, SHARD], [4, 7])) == [(ROW, 4), (SHARD, 7)]


def test_a_set_and_a_run_write_the_same_columns(tmp_path: Path):
    (tmp_path / "prompts.csv").write_text('caption\nwords\n" "\n')
    options = PrepareOptions(Columns(path=None), num_processes=0, max_bad_fraction=1.0)
    prepare(str(tmp_path / "prompts.csv"), str(tmp_path / "set"), options)
    QuarantineFile(tmp_path / "quarantine.parquet").add(5, [ROW])
    of_set = pq.read_table(tmp_path / "set" / "quarantine.parquet")
    of_run = pq.read_table(tmp_path / "quarantine.parquet")
    assert of_set.schema == of_run.schema
    assert of_set["reason"].to_pylist() == ["empty_caption"]
    assert of_run["iteration"].to_pylist() == [5]


def test_the_quarantine_of_an_earlier_run_is_read(tmp_path: Path):
    """As earlier versions wrote it: reason and detail as one text, ids that may be null."""
    old = {
        "shard": ["s.parquet", "t.parquet"],
        "row_group": pa.array([1, None], pa.int32()),
        "row": pa.array([3, None], pa.int32()),
        "sample_id": ["a", None],
        "reason": ["duplicate_id (an earlier row has it)", "no readable footer"],
        "num_rows": pa.array([1, None], pa.int64()),
        "iteration": pa.array([4, 7], pa.int64()),
    }
    path = tmp_path / "quarantine.parquet"
    pq.write_table(pa.table(old), path)
    quarantine = QuarantineFile(path)
    assert quarantine.rejects == [ROW, SHARD]
    assert Tally(1.0, quarantine.rejects).repeats("s.parquet", 1) == {3}
    quarantine.rewind(7)
    assert QuarantineFile(path).rejects == [ROW]


def test_the_quarantine_of_an_earlier_set_is_read():
    old = {
        "sample_id": ["a", ""],
        "source": ["list.csv", "t.tar"],
        "row": pa.array([3, None], pa.int64()),
        "reason": ["empty_caption", "unserved"],
        "detail": ["nothing but blanks", ""],
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(old), sink)
    assert [each for each, _ in from_parquet(sink.getvalue().to_pybytes())] == [
        Rejection("a", "list.csv", 3, Reason.EMPTY_CAPTION, "nothing but blanks"),
        Rejection("", "t.tar", None, Reason.UNSERVED),
    ]


@pytest.mark.parametrize(
    "text", ["no rows", "no_id (no UTF-8)", "a (b (c))", "a (b); d (e)", "odd (open", "see (a) b"]
)
def test_a_reason_with_its_detail_is_taken_apart_and_joined_without_loss(text: str):
    assert join_reason(*split_reason(text)) == text
