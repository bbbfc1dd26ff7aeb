"""Texts are replaced as a whole, on a disk and on an object store alike."""

import fsspec
import pytest

from cluster.errors import StorageError
from cluster.storage import read_json, write_json, write_text


def test_a_file_is_replaced_as_a_whole(root):
    write_json(f"{root}/a.json", {"value": 1})
    write_json(f"{root}/a.json", {"value": 2})
    assert read_json(f"{root}/a.json") == {"value": 2}
    files, path = fsspec.core.url_to_fs(root)
    files.invalidate_cache()
    assert len(files.ls(path)) == 1


def test_what_cannot_be_read_says_so(root):
    with pytest.raises(StorageError, match=r"reading .*absent\.json: FileNotFoundError"):
        read_json(f"{root}/absent.json")
    write_text(f"{root}/broken.json", "{")
    with pytest.raises(StorageError, match=r"broken\.json: no JSON"):
        read_json(f"{root}/broken.json")


def test_a_missing_bucket_is_an_error_and_stays_missing(s3_bucket):
    with pytest.raises(StorageError, match="bucket exists"):
        write_text("s3://elsewhere/run/config.yaml", "x")
    assert "elsewhere" not in fsspec.filesystem("s3", skip_instance_cache=True).ls("")
