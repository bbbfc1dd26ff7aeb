"""Stores: the file system of a path or an address, and the path in it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
from fsspec import AbstractFileSystem

from cluster.storage_errors import storage_errors
from sgmd_core.errors import ConfigError

if TYPE_CHECKING:
    from cluster.s3.settings import S3Settings

# Path() makes one slash of two.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.+)", re.DOTALL)
_ON_DISK = "file"


def open_store(
    address: str | Path, s3: "S3Settings | None" = None
) -> tuple[AbstractFileSystem, str]:
    """The file system of a path or URL, and the path in it.

    A request to an S3 server is repeated after errors that pass, such as a 503, and given up within
    a budget of time (120 s, and a second more for each MiB), so a server that accepts and never
    answers ends in an error.

    Args:
        address: `/disk/run`, `s3://bucket/run`, or whatever fsspec takes.
        s3: Requests to an S3 server; None takes the usual budget.

    Raises:
        ConfigError: No such protocol is known, or its client is not installed.
    """
    protocol, separator, path = str(address).partition("://")
    if separator and protocol in ("s3", "s3a"):
        # Loading the client takes a second, and most folders are on a disk.
        from cluster.s3.filesystem import open_s3

        return open_s3(s3), path.rstrip("/")
    try:
        files, path = fsspec.core.url_to_fs(str(address))
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"opening {address}",
            f"the protocol {protocol}: {error}",
            "a path of a disk, or s3://bucket/prefix",
            "Correct the address, or install the client of that protocol",
        ) from error
    return files, path.rstrip("/") or path


@contextmanager
def opened_store(
    address: str | Path, attempted: str, s3: "S3Settings | None" = None
) -> Iterator[tuple[Any, str]]:
    """The file system of a path or URL, which lists again, and the path in it; as a context.

    Args:
        address: As `open_store` takes it.
        attempted: As `storage_errors` takes it.
        s3: As `open_store` takes it.

    Raises:
        StorageError: The file system fails inside of it.
    """
    with storage_errors(attempted):
        files, path = open_store(address, s3)
        files.invalidate_cache()
        yield files, path


def store_address(place: str | Path) -> str:
    """The address of an object store, `s3://bucket/prefix`; empty for a path of a disk.

    Args:
        place: A path or an address, also one that a `Path` has made `s3:/bucket/prefix` of.
    """
    found = _ADDRESS.fullmatch(str(place))
    if found is None or found[1] == _ON_DISK:
        return ""
    return f"{found[1]}://{found[2].rstrip('/')}"
