"""Texts and JSON of a run, on a local disk or an object store.

Paths are what `cluster.stores.open_store` takes: `/disk/run`, `s3://bucket/run`. Keys and endpoint
of S3 come from the usual AWS variables. Folders are made on local disks only. Asked to make a
folder, s3fs may create its bucket, and whether a bucket exists is not ours to decide.
"""

import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from cluster.errors import StorageError
from cluster.files import write_whole
from cluster.paths import require_file
from cluster.storage_errors import storage_errors
from cluster.stores import open_store, opened_store


def read_text(url: str) -> str:
    """The text of a file.

    Raises:
        StorageError: It is not there, or the store refuses it.
    """
    with storage_errors(f"reading {url}"):
        files, path = open_store(url)
        if isinstance(files, LocalFileSystem):
            require_file(path)
        return str(files.read_text(path, encoding="utf-8"))


def write_text(url: str, text: str) -> None:
    """Writes a file whole or not at all; a reader sees the old text or the new one.

    Raises:
        StorageError: The store refuses it.
    """
    with storage_errors(f"writing {url}"):
        write_whole(url, text.encode())


def read_json(url: str) -> Any:  # noqa: ANN401 - JSON can be anything
    """The content of a JSON file.

    Raises:
        StorageError: It is not there, or no JSON.
    """
    text = read_text(url)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"reading {url}", f"no JSON: {error}", "a JSON document") from error


def write_json(url: str, content: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(url, json.dumps(content, indent=2) + "\n")


def is_folder(url: str) -> bool:
    """Returns True if a folder, or any object below an address, is there.

    Raises:
        StorageError: The store does not say.
    """
    with opened_store(url, f"looking for {url}") as (files, path):
        return bool(files.isdir(path))


def file_size(url: str) -> int:
    """Size of a file in bytes.

    Raises:
        StorageError: It is not there, or the store does not say.
    """
    with opened_store(url, f"looking at {url}") as (files, path):
        return int(files.info(path)["size"])


def file_sizes(folder: str) -> dict[str, int]:
    """Size in bytes of every file under a folder, by relative path."""
    with opened_store(folder, f"listing {folder}") as (files, path):
        found = dict(files.find(path, detail=True))
    return {
        str(PurePosixPath(name).relative_to(path)): entry["size"]
        for name, entry in sorted(found.items())
    }
