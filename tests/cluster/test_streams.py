"""Files written piece by piece are whole or not there, and an object store is checked on them."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import streams
from cluster.errors import StorageError
from cluster.stores import open_store
from cluster.streams import write_stream

PART = 5 * 2**20
"""The smallest part that S3 takes."""


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PART_BYTES", PART)


def content(size: int) -> bytes:
    return (bytes(range(256)) * (size // 256 + 1))[:size]


def pieces(data: bytes, length: int) -> Iterator[bytes]:
    for start in range(0, len(data), length):
        yield data[start : start + length]


@pytest.mark.slow
@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("size", [0, 1000, PART - 1, PART, PART + 1, 2 * PART, 2 * PART + 7])
def test_a_stream_is_written_as_it_is(root: str, size: int) -> None:
    data = content(size)
    digest = write_stream(f"{root}/file", pieces(data, 3 * 2**20 + 1))
    files, path = open_store(f"{root}/file")
    assert files.cat_file(path) == data
    assert digest == hashlib.sha256(data).hexdigest()


@pytest.mark.slow
@pytest.mark.usefixtures("small_parts")
def test_the_store_names_an_object_as_we_expect_so_that_a_change_is_noticed(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(streams, "sha256_of", lambda path, files: read.append(str(path)) or "")
    for size in (1000, PART, 2 * PART + 7):
        write_stream(f"{s3_bucket}/named", pieces(content(size), PART))
    assert read == [], "where the names agree, nothing is read back"
    expected = streams.md5
    monkeypatch.setattr(streams, "md5", lambda data=b"": expected(data + b"x"))
    with pytest.raises(StorageError, match="other bytes are there than were sent"):
        write_stream(f"{s3_bucket}/named", [content(1000)])
    assert read


class LossyServer:
    """Loses the last byte of every object that it takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from moto.s3.models import S3Backend

        put = S3Backend.put_object

        def lose(self, bucket_name, key_name, value, *args, **options):
            return put(self, bucket_name, key_name, value[:-1], *args, **options)

        monkeypatch.setattr(S3Backend, "put_object", lose)


@pytest.mark.slow
def test_an_upload_that_the_store_has_torn_is_an_error(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    LossyServer(monkeypatch)
    with pytest.raises(StorageError, match="999 bytes are there, and 1000 were sent"):
        write_stream(f"{s3_bucket}/torn", [content(1000)])


@pytest.mark.usefixtures("small_parts")
def test_a_stream_that_breaks_off_leaves_nothing_under_the_name(root: str) -> None:
    def broken() -> Iterator[bytes]:
        yield content(PART + 100)
        raise ValueError("the source failed")

    with pytest.raises(ValueError, match="the source failed"):
        write_stream(f"{root}/broken", broken())
    files, path = open_store(root)
    assert not files.exists(f"{path}/broken")
    if root.startswith("s3://"):
        bucket = path.partition("/")[0]
        assert not files.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads")
    else:
        assert list(Path(root).iterdir()) == []
