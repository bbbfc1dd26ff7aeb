"""Arrow's own reader gives what the careful one gives, and may fail without a loss."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem

from pipelines.data.filesystem import S3Settings, open_folder
from pipelines.data.parquet import Fault, RowGroupReader
from tests.helpers.s3_server import S3Access, S3Server, free_port, serve_s3

COLUMNS = ("sample_id", "caption", "latents")
ROWS = 40
GROUP = 16


def rows(seed: int) -> dict[str, pa.Array]:
    rng = np.random.default_rng(seed)
    return {
        "sample_id": pa.array([f"{seed}-{row}" for row in range(ROWS)]),
        "caption": pa.array([["a", "b c", "", None][row % 4] for row in range(ROWS)]),
        "latents": pa.array([rng.bytes(500) for _ in range(ROWS)]),
    }


def write_variants(folder: Path) -> None:
    """Shards that store the same in different ways, and one that lacks a column."""
    folder.mkdir(parents=True)
    plain = pa.table(rows(0)).replace_schema_metadata({"sgmd": "kept"})
    large = pa.table(rows(1)).cast(
        pa.schema({"sample_id": "large_string", "caption": "large_string", "latents": "binary"})
    )
    named = pa.table({**rows(2), "caption": rows(2)["caption"].dictionary_encode()})
    lacking = pa.table(rows(3)).drop_columns(["latents"])
    for name, table in (("plain", plain), ("large", large), ("named", named), ("short", lacking)):
        path = folder / f"{name}.parquet"
        pq.write_table(table, path, row_group_size=GROUP, write_page_checksum=True)


def groups_in(folder: Path) -> list[tuple[str, int, int]]:
    sizes = [(path.name, path.stat().st_size) for path in sorted(folder.glob("*.parquet"))]
    return [(name, size, index) for name, size in sizes for index in range(3)]


def read(url: str, groups: list[tuple[str, int, int]], *, native: bool) -> list[pa.Table | Fault]:
    settings = S3Settings(native_reads=native, backoff_s=0.01)
    return RowGroupReader(*open_folder(url, settings), settings).read(groups, COLUMNS)


def assert_same(found: list[pa.Table | Fault], expected: list[pa.Table | Fault]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert type(ours) is type(theirs)
        if isinstance(ours, pa.Table) and isinstance(theirs, pa.Table):
            assert ours.equals(theirs, check_metadata=True)
        else:
            assert ours == theirs


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, s3_access: S3Access) -> Iterator[S3Server]:
    root = tmp_path_factory.mktemp("s3")
    write_variants(root / "clips" / "set")
    with serve_s3(root, replace(s3_access, port=free_port())) as running:
        yield running


@pytest.fixture
def set_on_s3(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    return "s3://clips/set"


def test_both_readers_agree_on_what_is_good_and_what_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_variants(folder)
    groups = groups_in(folder)
    torn = folder / "torn.parquet"
    torn.write_bytes((folder / "plain.parquet").read_bytes()[:-40])
    bent = bytearray((folder / "plain.parquet").read_bytes())
    chunk = pq.ParquetFile(folder / "plain.parquet").metadata.row_group(1).column(2)
    bent[chunk.dictionary_page_offset + chunk.total_compressed_size // 2] ^= 1
    (folder / "bent.parquet").write_bytes(bent)
    groups += [("torn.parquet", torn.stat().st_size, 0), ("gone.parquet", 900, 0)]
    groups += [("bent.parquet", len(bent), index) for index in range(3)]
    groups += [("plain.parquet", groups[6][1], 7)]
    expected = read(str(folder), groups, native=False)
    assert_same(read(str(folder), groups, native=True), expected)
    faults = [group[0] for group, one in zip(groups, expected, strict=True) if type(one) is Fault]
    assert faults == ["short.parquet"] * 3 + [
        "torn.parquet",
        "gone.parquet",
        "bent.parquet",
        "plain.parquet",
    ]


def test_both_readers_agree_on_s3(server: S3Server, set_on_s3: str) -> None:
    groups = groups_in(server.root / "clips" / "set")
    expected = read(set_on_s3, groups, native=False)
    assert_same(read(set_on_s3, groups, native=True), expected)


def test_a_store_that_arrow_cannot_enter_is_read_through_s3fs(
    server: S3Server,
    set_on_s3: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    groups = groups_in(server.root / "clips" / "set")
    expected = read(set_on_s3, groups, native=False)
    settings = S3Settings(backoff_s=0.01)
    reader = RowGroupReader(*open_folder(set_on_s3, settings), settings)
    # s3fs has read its keys; what Arrow finds from now on is wrong.
    secret = "not-the-secret-of-this-server"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            assert_same(reader.read(groups, COLUMNS), expected)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "s3fs could and does so from now on" in message
    assert secret not in message
