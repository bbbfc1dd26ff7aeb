"""Write a file from pieces as they come, and check what an object store has kept of it.

    local disk      a draft, flushed and renamed (`cluster.files.whole_file`)
    object store    parts of 64 MiB, then the size and the digest of the object are compared

No copy of the whole file is made, in memory or on a disk: the pieces may be views of tensors.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from cluster.errors import StorageError
from cluster.files import sha256_of, whole_file
from cluster.stores import open_store

PART_BYTES = 64 * 2**20
"""Size of a part of an upload; S3 takes at most 10,000 of them, so a file of 640 GiB."""

_WRITE_BYTES = 4 * 2**20
_MD5_ETAG = re.compile(r"[0-9a-f]{32}(-\d+)?")

Piece = bytes | memoryview


def write_stream(
    path: str | Path, pieces: Iterable[Piece], files: AbstractFileSystem | None = None
) -> str:
    """Writes a file so that a reader sees all of it or nothing; see the top of this file.

    Args:
        path: A local path or a URL that fsspec takes; with `files`, a path in it.
        pieces: The content, in order; views of bytes.
        files: The fsspec file system that `path` belongs to; None: the one that `path` names.

    Returns:
        SHA-256 of the content as hexadecimal digits.

    Raises:
        StorageError: The store has kept something else than was sent.
        OSError: The file system does not take it; nothing stands under the name then.
    """
    if files is None:
        files, path = open_store(path)
    if not isinstance(files, LocalFileSystem):
        return _upload(files, str(path), pieces)
    digest = hashlib.sha256()
    with whole_file(path) as draft, draft.open("wb") as file:
        for piece in _cut(pieces, _WRITE_BYTES):
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def _upload(files: AbstractFileSystem, path: str, pieces: Iterable[Piece]) -> str:
    """Sends a file in parts, gives it up as a whole if one fails, and checks what is there."""
    digest, part, parts, size = hashlib.sha256(), md5(), b"", 0
    file: Any = files.open(path, "wb", block_size=PART_BYTES)
    try:
        # No write crosses the end of a part, so the parts are those that the store counts.
        for piece in _cut(pieces, PART_BYTES):
            digest.update(piece)
            part.update(piece)
            file.write(piece)
            size += len(piece)
            if size % PART_BYTES == 0:
                parts, part = parts + part.digest(), md5()
        file.close()
    except BaseException:
        # Closing it would make an object of what was sent so far.
        with suppress(Exception):
            file.discard()
        file.closed = True
        raise
    if size < PART_BYTES:
        etag = part.hexdigest()
    else:
        parts += part.digest() if size % PART_BYTES else b""
        etag = f"{md5(parts).hexdigest()}-{-(-size // PART_BYTES)}"
    _require_kept(files, path, size, etag, digest.hexdigest())
    return digest.hexdigest()


def _require_kept(files: AbstractFileSystem, path: str, size: int, etag: str, sha256: str) -> None:
    """Checks an object against what was sent.

    An S3 server that does not encrypt with keys of its own names an object by the MD5 of what it
    has received; where it names it otherwise, the bytes are read back before they are refused.
    """
    files.invalidate_cache()
    found = files.info(path)
    kept = str(found.get("ETag", "")).strip('"')
    wrong = ""
    if found["size"] != size:
        wrong = f"{found['size']} bytes are there, and {size} were sent"
    elif _MD5_ETAG.fullmatch(kept) and kept != etag and sha256_of(path, files) != sha256:
        wrong = f"other bytes are there than were sent (ETag {kept}, expected {etag})"
    if wrong:
        raise StorageError(
            f"checking {path} after its upload",
            wrong,
            "an object store that keeps what it takes",
            "Save again; if it happens again, look at the store and at what lies before it",
        )


def _cut(pieces: Iterable[Piece], length: int) -> Iterator[memoryview]:
    """Cuts pieces so that none crosses a multiple of `length` bytes from the beginning."""
    filled = 0
    for piece in pieces:
        left = memoryview(piece)
        while len(left):
            taken = min(len(left), length - filled)
            yield left[:taken]
            left, filled = left[taken:], (filled + taken) % length


def md5(data: bytes = b"") -> Any:  # noqa: ANN401  (hashlib's type has no public name)
    """The digest by which a store names an object."""
    return hashlib.md5(data, usedforsecurity=False)
