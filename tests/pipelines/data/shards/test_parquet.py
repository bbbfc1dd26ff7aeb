"""Parquet read from Python's files: nothing of Arrow's may outlive the read."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.data.shards.filesystem import S3Settings, open_folder
from pipelines.data.shards.parquet import RowGroupReader
from pipelines.data.shards.reading import Fault
from tests.helpers.shards import write_folder

# Counts the threads of its process around each read, once everything is imported.
PROGRAM = """
import io, os, sys
from pathlib import Path
from pipelines.data.shards.filesystem import S3Settings, open_folder
from pipelines.data.shards.opening import read_parquet
from pipelines.data.shards.parquet import RowGroupReader

folder = sys.argv[1]
path = next(Path(folder).glob("*.parquet"))

def row_group():
    reader = RowGroupReader(*open_folder(folder), S3Settings(native_reads=False))
    (table,) = reader.read([(path.name, path.stat().st_size, 1)], ["sample_id", "caption"])
    return table

ways = {
    "row_group": row_group,
    "file": lambda: read_parquet(path.open("rb")),
    "bytes": lambda: read_parquet(io.BytesIO(path.read_bytes()), ["caption"]),
}
for way, read in ways.items():
    before = len(os.listdir("/proc/self/task"))
    assert read().num_rows > 0
    print(way, len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.slow
def test_reading_starts_no_thread_that_might_meet_the_end_of_the_process(tmp_path: Path) -> None:
    write_folder(tmp_path, [9])
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["row_group 0", "file 0", "bytes 0"]


def test_a_footer_whose_column_names_are_no_text_is_a_fault_of_its_row_groups(tmp_path: Path):
    write_folder(tmp_path, [3, 3])
    shard = tmp_path / "part-000.parquet"
    content = shard.read_bytes()
    # In the schema the name stays; in what the footer says of the row group it is damaged.
    place = content.rindex(b"caption")
    assert content.count(b"caption") == 2
    shard.write_bytes(content[:place] + b"cap\xffion" + content[place + 7 :])
    reader = RowGroupReader(*open_folder(str(tmp_path)), S3Settings(native_reads=False))
    groups = [(path.name, path.stat().st_size, 0) for path in sorted(tmp_path.iterdir())]
    broken, whole = reader.read(groups, ["sample_id", "caption"])
    assert isinstance(broken, Fault)
    assert "corrupt footer" in broken.reason
    assert not isinstance(whole, Fault)
    assert whole.num_rows == 3


@pytest.mark.slow
def test_a_column_chunk_that_parquet_refuses_is_a_fault_and_ends_no_process(tmp_path: Path):
    write_folder(tmp_path, [3])
    shard = tmp_path / "part-000.parquet"
    content = shard.read_bytes()
    # Histograms of the levels of `caption`: none for repetition, and two counts for definition.
    none, two = b"\x19\x06", b"\x19&\x00\x06"
    place = content.rindex(none + two)
    shard.write_bytes(content[:place] + two + none + content[place + 6 :])
    code = CHUNKS.format(shard=str(shard))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "histogram size mismatch" in done.stdout


CHUNKS = """
import sys
import pyarrow.parquet as pq
from pipelines.data.shards.parquet import column_chunks
metadata = pq.ParquetFile({shard!r}).metadata
try:
    column_chunks(metadata, 0, metadata.schema.names)
except OSError as error:
    print(error)
"""
