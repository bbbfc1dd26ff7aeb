"""The one place where a folder of data is opened, here or on S3.

    /disk/set            the local file system
    s3://bucket/prefix   s3fs; endpoint and keys from the usual AWS variables, never from settings

A folder on S3 is asked for one key as soon as it is opened, so that wrong keys, a missing bucket or
a server that is down are reported before anything starts. No error shows a key.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import fsspec
import pyarrow as pa
from aiohttp import ClientError
from botocore import exceptions as boto
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from s3fs import S3FileSystem

from cluster.paths import kind_of_path, real_path
from cluster.redaction import has_user, without_secrets
from cluster.s3.filesystem import open_s3
from cluster.s3.refusals import refusal_remedy
from cluster.s3.settings import S3Settings
from cluster.storage_errors import disk_remedy, with_room
from sgmd_core.errors import DataError

_LOCAL = ("file", "local")
_WEB = ("http://", "https://")
_ONE_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_STORAGE_ERRORS = (
    OSError,
    boto.BotoCoreError,
    boto.ClientError,
    ClientError,
    pa.ArrowException,
)


def open_folder(
    url: str, s3: S3Settings = S3Settings(), *, probe: bool = True, from_web: bool = False
) -> tuple[AbstractFileSystem, str]:
    """Opens a folder of data.

    Args:
        url: Local path or `s3://bucket/prefix`.
        s3: How to speak to the server, where there is one.
        probe: Ask the server for one key of the folder. Leave it out where many processes open the
            same folder.
        from_web: Take http:// and https:// too, of single files; no folder can be listed there.

    Returns:
        The file system and the folder's path in it, without a protocol or a slash at the end.

    Raises:
        DataError: The address is not valid, or the server refuses it; says which of the keys,
            the bucket and the endpoint is wrong.
    """
    attempted = f"opening the data folder {without_secrets(url)}"
    if fault := _fault_of_address(url):
        expected = "a local path or s3://bucket/prefix, of a file or folder"
        raise DataError(attempted, fault, expected, "Correct the address")
    if not from_web and url.startswith(_WEB):
        raise DataError(
            attempted,
            "an address of the web, which is read for single videos that a manifest names",
            "a local path or s3://bucket/prefix",
            "Download it; of an S3 server, name it in AWS_ENDPOINT_URL and give s3://bucket/prefix",
        )
    try:
        filesystem, root = _open(url, s3)
    except (ImportError, ValueError, OSError) as error:
        raise DataError(
            attempted,
            without_secrets(f"{type(error).__name__}: {error}"),
            "a local path or s3://bucket/prefix",
            "Correct the address",
        ) from error
    root = root.rstrip("/")
    if probe and isinstance(filesystem, S3FileSystem):
        with data_errors(attempted):
            bucket, prefix, _ = filesystem.split_path(root)
            cast("Any", filesystem).call_s3(
                "list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1
            )
    return filesystem, root


def _fault_of_address(url: str) -> str:
    """Says what is wrong with an address, without asking any server; empty where it is right."""
    protocol, separator, path = url.partition("://")
    if separator and has_user(url):
        return "a user or a key in it; keys come from the environment"
    if not separator:
        named = _ONE_SLASH.match(url)
        if named and not os.path.lexists(url):
            return f"{named[1]}: with one slash after it"
        path = url
    elif protocol in ("s3", "s3a"):
        return "" if path.strip("/") else "no bucket"
    elif protocol not in _LOCAL:
        # Files of a manifest may be anywhere that fsspec reads by http.
        return "" if protocol in ("http", "https") else f"the protocol {protocol}"
    if not path:
        return "an empty address"
    kind = kind_of_path(os.path.expanduser(path))  # noqa: PTH111 (leaves an unknown user)
    return "" if kind in ("", "a file", "a folder") else kind


def _open(url: str, s3: S3Settings) -> tuple[AbstractFileSystem, str]:
    """File system and path of an address, in which `::`, `#`, `?` and `%` are characters."""
    protocol, separator, path = url.partition("://")
    if not separator or protocol in _LOCAL:
        return LocalFileSystem(), str(LocalFileSystem._strip_protocol(url))
    if protocol not in ("s3", "s3a"):
        return fsspec.core.url_to_fs(url)
    return open_s3(s3), path


def canonical_address(url: str) -> str:
    """The one address of a folder or file that has several spellings.

    `videos/`, `./videos` and a link to it become the absolute path, `s3a://b/p/` becomes `s3://b/p`.
    A link to a file keeps its name, because relative paths in a manifest start where the link is.
    """
    filesystem, path = open_folder(url, probe=False)
    if not isinstance(filesystem, LocalFileSystem):
        return filesystem.unstrip_protocol(path)
    # As the system reads it: ".." after a link leads out of the folder that the link names.
    spelled = Path(path if "://" in url else url).expanduser()
    is_file = spelled.is_file()
    return str(real_path(spelled.parent) / spelled.name if is_file else real_path(spelled))


@contextmanager
def data_errors(attempted: str) -> Iterator[None]:
    """Words whatever a file system raises as our error, and says what is wrong where it can.

    Raises:
        DataError: Instead of any OSError, error of the SDK or Arrow error inside the block.
    """
    try:
        yield
    except _STORAGE_ERRORS as error:
        raise data_error(attempted, error) from error


def data_error(attempted: str, error: BaseException) -> DataError:
    """The error of a file system in our words; never shows a key.

    Args:
        attempted: What we were doing, and to which file or folder.
        error: What the file system raised.
    """
    text = str(error).strip()
    found = without_secrets(f"{type(error).__name__}: {text.splitlines()[0] if text else ''}")
    if isinstance(error, FileNotFoundError) and error.filename:
        found = without_secrets(f"no such file or folder: {error.filename}")
    if refused := refusal_remedy(error) or disk_remedy(error):
        return DataError(attempted, with_room(found, error, attempted), *refused)
    for is_it, expected, remedy in _diagnoses(error, text):
        if is_it:
            return DataError(attempted, found, expected, remedy)
    return DataError(
        attempted,
        found,
        "a file or folder that can be read whole",
        "If a file was cut short or damaged, write it again",
    )


def _diagnoses(error: BaseException, text: str) -> Iterator[tuple[bool, str, str]]:
    """(is it this?, what was expected, what to do); the first that fits is reported."""
    number = error.errno if isinstance(error, OSError) else None
    yield (
        isinstance(error, boto.HTTPClientError | boto.BotoCoreError) and "checksum" in text,
        "checksums that agree",
        "Some S3 servers do not know the newer checksums: set AWS_REQUEST_CHECKSUM_CALCULATION and "
        "AWS_RESPONSE_CHECKSUM_VALIDATION to when_required",
    )
    yield (
        isinstance(error, boto.ProfileNotFound),
        "a profile that ~/.aws/config has",
        "Unset AWS_PROFILE, or set it to one that is there",
    )
    # s3fs raises it without a number; a local path may have the word in its name.
    yield (
        isinstance(error, FileNotFoundError) and number is None and "bucket" in text.lower(),
        "a bucket of that name on this server",
        "Check the address, AWS_ENDPOINT_URL, and make the bucket if it is yours to make",
    )
    yield (
        isinstance(error, FileNotFoundError | NotADirectoryError),
        "a file or folder that is there",
        "Check the address",
    )
    # s3fs raises PermissionError without a number.
    yield (
        isinstance(error, PermissionError) and number is not None,
        "a file or folder that this user may use",
        "Check its owner and its permissions",
    )
    missing = (boto.NoCredentialsError, boto.PartialCredentialsError)
    yield (
        isinstance(error, (PermissionError, *missing)),
        "keys that the server knows and that may list and read here",
        "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN) and their rights",
    )
    answers = "a server that answers"
    yield isinstance(error, ClientError), answers, "Check the address and the network"
    # A network mount that hangs raises TimeoutError too; the system's has a number.
    is_late = isinstance(error, TimeoutError) and number is None
    unreached = (boto.ConnectionError, boto.HTTPClientError, ConnectionError)
    yield is_late or isinstance(error, unreached), answers, "Check AWS_ENDPOINT_URL and the network"
    yield (
        number in (errno.EBUSY, errno.EREMOTEIO),
        "a server that is not overloaded or failing",
        "Try again later, or have fewer processes read at once",
    )
