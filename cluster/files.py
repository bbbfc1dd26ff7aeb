"""Files and folders that are written whole or not at all, on a local disk or an object store.

    write_whole(path, data)    one file from bytes
    whole_file(path)           one local file that a library writes
    whole_folder(path)         one local folder that a library fills

A draft is written in the same folder under a hidden name, flushed to the disk (fsync), and renamed
over the target; then the parent folder is flushed, so that the new name survives a power loss. A
folder is exchanged with the one it replaces and the old one is deleted afterwards: at every moment
one whole version stands under the name. An object store replaces an object as a whole by itself.

Errors of the file system pass through as they are, for `storage_errors` to word; a draft that
failed is deleted.
"""

import ctypes
import errno
import hashlib
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from cluster.errors import StorageError
from cluster.paths import kind_of_path
from cluster.stores import open_store

# An object of twice this size or more is sent in parts, each tried again by itself.
_PART_BYTES = 16 * 2**20
_DRAFT = ".draft"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# A file system without RENAME_EXCHANGE (NFS, some overlays) answers with one of these.
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)

_CHUNK_BYTES = 4 * 2**20


def open_in_place(path: Path, flags: int) -> int:
    """Opens a local file that is changed where it stands; returns its descriptor.

    Args:
        path: The file; it is made where it is missing.
        flags: Of `os.open`, besides those that make it.

    Raises:
        StorageError: It is a link, or has a second name: another file would be changed with it.
    """
    attempted, remedy = f"writing to {path}", "Remove the link"
    try:
        handle = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP or not path.is_symlink():
            raise
        found = f"{path} is a link to {path.readlink()}"
        expected = "a file, or none: what a link leads to would be overwritten"
        raise StorageError(attempted, found, expected, remedy) from None
    if (num_names := os.fstat(handle).st_nlink) > 1:
        os.close(handle)
        found = f"{path} is one of {num_names} names of a file (hard links)"
        expected = "a file of its own, or none: under its other names it would be overwritten too"
        raise StorageError(attempted, found, expected, f"{remedy}, or put a copy in its place")
    return handle


def sha256_of(path: str | Path, files: Any = None) -> str:  # noqa: ANN401
    """SHA-256 of a file's content as hexadecimal digits, read as a stream.

    Args:
        path: As in `write_whole`.
        files: As in `write_whole`.
    """
    digest = hashlib.sha256()
    with Path(path).open("rb") if files is None else files.open(str(path), "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_whole(path: str | Path, data: bytes, files: Any = None) -> None:  # noqa: ANN401
    """Writes a file so that a reader sees all of the old bytes or all of the new ones.

    Args:
        path: A local path or a URL that fsspec takes; with `files`, a path in it. Missing local
            folders are made.
        data: The whole content.
        files: The fsspec file system that `path` belongs to; None: the one that `path` names.
    """
    if files is None:
        files, path = open_store(path)
    if isinstance(files, LocalFileSystem):
        with whole_file(path) as draft:
            draft.write_bytes(data)
    elif len(data) < 2 * _PART_BYTES:
        files.pipe_file(str(path), data)
    else:
        files.pipe_file(str(path), data, chunksize=_PART_BYTES)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields the path of a draft; on a normal exit it is flushed and takes the place of `path`.

    Args:
        path: The local file to write. Missing folders are made.
    """
    target = _target(path)
    if (kind := kind_of_path(target)) not in ("", "a file"):
        # A rename would put a file in the place of a pipe or a device.
        raise OSError(errno.EINVAL, f"{kind} is there, not a file", str(target))
    draft = _draft_of(target)
    try:
        yield draft
        sync_file(draft)
        draft.replace(target)
    except BaseException:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty draft folder; on a normal exit it takes the place of `path`.

    Everything in the draft is flushed first. A folder that stands under the name is exchanged for
    the draft in one step and deleted afterwards.

    Args:
        path: The local folder to write. Missing parents are made.
    """
    target = _target(path)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
    _delete_orphans(target)
    draft = _draft_of(target)
    draft.mkdir()
    try:
        yield draft
        sync_tree(draft)
        _swap(draft, target)
    finally:
        # After an exchange, the draft's name holds what was replaced.
        shutil.rmtree(draft, ignore_errors=True)


def sync_tree(folder: str | Path) -> None:
    """Flushes every file and folder below a local folder, and the folder itself, to the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(root) / name)
        sync_folder(root)


def sync_folder(folder: str | Path) -> None:
    """Flushes a local folder's names to the disk; passes where the system cannot."""
    try:
        sync_file(Path(folder))
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def delete_folder(folder: str | Path) -> None:
    """Deletes a local folder with all that is in it, as far as the system permits."""
    shutil.rmtree(folder, ignore_errors=True)


def cache_folder(kind: str) -> Path:
    """Folder in the user's cache for files that can be made again; it may not be there."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sgmd" / kind


def _target(path: str | Path) -> Path:
    """Returns the path that is written in the end: a link stays, and its target is replaced."""
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def sync_file(path: str | Path) -> None:
    """Flushes a local file to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(draft: Path, target: Path) -> None:
    """Puts the draft folder under the target's name."""
    if not target.exists():
        draft.rename(target)
    elif not _exchange(draft, target):
        # Without an exchange there is an instant between two renames; both versions are whole.
        old = _draft_of(target)
        target.rename(old)
        draft.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    sync_folder(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step; False where the system has no such call."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not (sys.platform == "linux" and hasattr(libc, "renameat2")):
        return False
    names = (os.fsencode(one), os.fsencode(other))
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _draft_of(target: Path) -> Path:
    """A hidden name beside the target that names its writer, and that nobody else takes."""
    writer = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    return target.with_name(f".{target.name}.{writer}{_DRAFT}")


def _delete_orphans(target: Path) -> None:
    """Deletes drafts of the target whose writer, on this machine, no longer runs."""
    prefix = f".{target.name}.{socket.gethostname()}-"
    for found in target.parent.iterdir():
        if found.name.startswith(prefix) and found.name.endswith(_DRAFT):
            process = found.name.removeprefix(prefix).partition("-")[0]
            if process.isdigit() and not Path(f"/proc/{process}").exists():
                shutil.rmtree(found, ignore_errors=True)
