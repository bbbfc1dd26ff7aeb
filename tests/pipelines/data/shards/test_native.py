"""Arrow's own reader gives what the careful one gives, and may fail without a loss."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.shards.filesystem import S3Settings, open_folder
from pipelines.data.shards.native import Group, NativeReader, endpoint_options, native_filesystem
from pipelines.data.shards.parquet import Fault, RowGroupReader
from tests.helpers.logs import record_warnings
from tests.helpers.s3_server import S3Access, S3Server, free_port, serve_s3, use_server

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


def groups_in(folder: Path) -> list[Group]:
    sizes = [(path.name, path.stat().st_size) for path in sorted(folder.glob("*.parquet"))]
    return [(name, size, index) for name, size in sizes for index in range(3)]


def read_carefully(url: str, groups: list[Group]) -> list[pa.Table | Fault]:
    settings = S3Settings(native_reads=False, backoff_s=0.01)
    return RowGroupReader(*open_folder(url, settings), settings).read(groups, COLUMNS)


def read_natively(url: str, groups: list[Group]) -> list[pa.Table | Exception]:
    filesystem, root = open_folder(url)
    client = native_filesystem(filesystem, S3Settings())
    assert client is not None
    return NativeReader(client, root).read(groups, COLUMNS)


def assert_same(found: list[pa.Table | Exception], expected: list[pa.Table | Fault]) -> None:
    """What one reader reads, the other one reads alike; what it cannot, the other cannot."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        if isinstance(theirs, pa.Table):
            assert isinstance(ours, pa.Table), ours
            assert ours.equals(theirs, check_metadata=True)
        else:
            assert isinstance(ours, Exception)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, s3_access: S3Access) -> Iterator[S3Server]:
    root = tmp_path_factory.mktemp("s3")
    write_variants(root / "clips" / "set")
    with serve_s3(root, replace(s3_access, port=free_port())) as running:
        yield running


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the reader warns of."""
    return record_warnings("pipelines.data.shards.parquet", monkeypatch)


@pytest.fixture
def set_on_s3(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    use_server(server.environment, monkeypatch)
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
    # Replaced since it was listed by a file of as many rows, but another size.
    sizes = {name: size for name, size, _ in groups}
    (folder / "large.parquet").write_bytes((folder / "named.parquet").read_bytes())
    assert (folder / "large.parquet").stat().st_size != sizes["large.parquet"]
    expected = read_carefully(str(folder), groups)
    assert_same(read_natively(str(folder), groups), expected)
    reader = RowGroupReader(*open_folder(str(folder)), S3Settings())
    for ours, theirs in zip(reader.read(groups, COLUMNS), expected, strict=True):
        assert ours.equals(theirs) if isinstance(ours, pa.Table) else ours == theirs
    faults = [group[0] for group, one in zip(groups, expected, strict=True) if type(one) is Fault]
    bad = ["torn.parquet", "gone.parquet", "bent.parquet", "plain.parquet"]
    assert faults == ["large.parquet"] * 3 + ["short.parquet"] * 3 + bad


@pytest.mark.slow
def test_both_readers_agree_on_s3(server: S3Server, set_on_s3: str) -> None:
    groups = groups_in(server.root / "clips" / "set")
    expected = read_carefully(set_on_s3, groups)
    assert_same(read_natively(set_on_s3, groups), expected)
    assert sum(isinstance(found, pa.Table) for found in expected) == 9


@pytest.mark.slow
def test_a_store_that_arrow_cannot_enter_is_read_through_s3fs(
    server: S3Server,
    set_on_s3: str,
    monkeypatch: pytest.MonkeyPatch,
    told: list[str],
) -> None:
    groups = groups_in(server.root / "clips" / "set")
    expected = read_carefully(set_on_s3, groups)
    settings = S3Settings(backoff_s=0.01)
    reader = RowGroupReader(*open_folder(set_on_s3, settings), settings)
    # s3fs has read its keys; what Arrow finds from now on is wrong.
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-of-this-server")
    for _ in range(5):
        assert reader.read(groups, COLUMNS) == expected
        # Where all is broken, nothing is learnt about Arrow.
        assert {type(found) for found in reader.read(groups[-3:], COLUMNS)} == {Fault}
    (message,) = told
    assert "read through fsspec from now on" in message


@pytest.mark.slow
def test_a_client_that_cannot_be_made_is_no_error(
    server: S3Server, set_on_s3: str, told: list[str]
) -> None:
    groups = groups_in(server.root / "clips" / "set")
    # More than a C++ number holds; s3fs was opened with its own settings and connects all the same.
    settings = S3Settings(max_attempts=2**70)
    filesystem, root = open_folder(set_on_s3)
    secret = server.environment["AWS_SECRET_ACCESS_KEY"]
    found = RowGroupReader(filesystem, root, settings).read(groups, COLUMNS)
    assert found == read_carefully(set_on_s3, groups)
    (message,) = told
    assert "OverflowError" in message
    assert secret not in message


@pytest.mark.parametrize(
    ("url", "override"),
    [
        ("https://s3.eu-west-1.amazonaws.com", None),
        ("https://s3.amazonaws.com", None),
        ("https://bucket.vpce-1-2.s3.eu-west-1.vpce.amazonaws.com", True),
        ("https://s3-fips.eu-west-1.amazonaws.com", True),
        ("http://127.0.0.1:9000", True),
    ],
)
def test_only_the_usual_endpoints_of_aws_are_left_to_arrow(url: str, override: bool | None) -> None:
    options = endpoint_options(url, "eu-west-1")
    scheme, host = url.split("://")
    assert options["scheme"] == scheme
    assert options.get("endpoint_override") == (host if override else None)
