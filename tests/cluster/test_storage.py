"""Texts are replaced as a whole, on a disk and on an object store alike."""

import errno
import os
import re
from pathlib import Path

import fsspec
import pytest
from botocore.exceptions import EndpointConnectionError

from cluster.errors import StorageError, StoreRefusedError
from cluster.paths import nearest_folder
from cluster.storage import read_json, write_json, write_text
from cluster.storage_errors import full_disk_errors, room_at, storage_errors, with_room


@pytest.mark.slow
def test_a_file_is_replaced_as_a_whole(root):
    write_json(f"{root}/a.json", {"value": 1})
    write_json(f"{root}/a.json", {"value": 2})
    assert read_json(f"{root}/a.json") == {"value": 2}
    files, path = fsspec.core.url_to_fs(root)
    files.invalidate_cache()
    assert len(files.ls(path)) == 1


@pytest.mark.slow
def test_what_cannot_be_read_says_so(root):
    with pytest.raises(StorageError, match=r"reading .*absent\.json: FileNotFoundError"):
        read_json(f"{root}/absent.json")
    write_text(f"{root}/broken.json", "{")
    with pytest.raises(StorageError, match=r"broken\.json: no JSON"):
        read_json(f"{root}/broken.json")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "identity.json")
    with pytest.raises(StorageError, match=r"identity\.json: a named pipe. Expected a file"):
        read_json(f"{tmp_path}/identity.json")


@pytest.mark.slow
def test_a_missing_bucket_is_an_error_and_stays_missing(s3_bucket):
    with pytest.raises(StorageError, match="bucket exists"):
        write_text("s3://elsewhere/run/config.yaml", "x")
    assert "elsewhere" not in fsspec.filesystem("s3", skip_instance_cache=True).ls("")


@pytest.mark.parametrize(
    ("place", "cause", "named"),
    [
        ("/disk/run", None, "Check the path and the rights to it"),
        ("s3://bucket/run", None, "AWS_ENDPOINT_URL"),
        ("bucket/run", EndpointConnectionError(endpoint_url="http://x"), "AWS_ENDPOINT_URL"),
    ],
)
def test_a_remedy_names_the_settings_of_s3_only_where_s3_is_meant(place, cause, named):
    with pytest.raises(StorageError) as caught, storage_errors(f"reading {place}"):
        raise PermissionError(13, "Permission denied") from cause
    assert named in str(caught.value)
    assert ("AWS" in str(caught.value)) == ("AWS" in named)


def following(cause: BaseException) -> RuntimeError:
    """An error that a library raises in place of the system's."""
    error = RuntimeError("unexpected pos 64 vs 0")
    error.__context__ = cause
    return error


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        OSError(f"[Errno {errno.ENOSPC}] Error writing bytes to file"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        RuntimeError('IoError(Os { code: 28, message: "No space left on device" })'),
        RuntimeError("database or disk is full"),
        following(FULL),
    ],
    ids=["handle", "pyarrow", "safetensors", "in words", "sqlite", "torch"],
)
def test_a_full_disk_is_told_with_its_folder_and_its_room_by_whoever_meets_it(
    error: Exception, tmp_path: Path
):
    place = tmp_path / "not-there" / "step-000004"
    for wording in (storage_errors, full_disk_errors):
        with (
            pytest.raises(StoreRefusedError) as caught,
            wording(f"saving the generator to {place}"),
        ):
            raise error
        assert f"({tmp_path} has " in caught.value.found
        assert " free of " in caught.value.found
        assert "Free space there" in str(caught.value)


def test_the_nearest_folder_is_found_through_links_and_above_what_is_none(tmp_path: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    assert nearest_folder(folder) == folder
    assert nearest_folder(folder / "a" / "b") == folder
    assert nearest_folder(tmp_path / "link" / "a") == tmp_path / "link"
    assert nearest_folder(tmp_path / "file" / "a") == tmp_path
    assert nearest_folder(tmp_path / "nowhere" / "a") == tmp_path
    assert nearest_folder("not-there") == Path.cwd()


def test_room_is_told_of_local_places_alone(tmp_path: Path):
    assert room_at(tmp_path).startswith(f"{tmp_path} has ")
    assert re.search(r"has \d+\.\d [KMGT]iB free of \d+\.\d [KMGT]iB", room_at(tmp_path))
    assert room_at("s3://bucket/runs") == room_at("") == ""
    assert with_room("full", FULL, "writing s3://bucket/run") == "full"
    assert with_room("full", FULL, f"writing file://{tmp_path}/a").startswith(
        f"full ({tmp_path} has "
    )
