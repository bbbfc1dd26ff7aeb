"""Folders that are written at once, on a local disk or an object store.

    whole_folder_at(place, last=...)    all files of a folder, or the ones that were there before
    files_at(place)                     some files of a folder that holds others as well
    copy_folder_at(source, place)       all files of a folder, from or to an object store
    folder_here(place)                  the folder, or a copy of it for as long as a block runs

For an object store they are made in a temporary folder of this machine's disk (TMPDIR), and each is
compared after its upload with what was sent. A store cannot exchange folders: the files in `last`
make a folder count for its readers, go first when it is replaced, and come when all else is there.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.errors import StorageError
from cluster.files import whole_folder
from cluster.storage_errors import full_disk_errors, storage_errors
from cluster.stores import open_store, store_address
from cluster.streams import write_stream

_PIECE_BYTES = 4 * 2**20
_AT_ONCE = 4
_AGAIN_S = 2.0


@contextmanager
def whole_folder_at(place: str | Path, last: Sequence[str] = ()) -> Iterator[Path]:
    """Yields an empty local folder; on a normal exit its files take the place of `place`.

    Args:
        place: The folder: a path or an address.
        last: Names of the files without which a reader takes no folder for one.

    Raises:
        StorageError: The disk is full, or an object store does not take the files, or has kept
            something else.
    """
    address = store_address(place)
    if not address:
        with full_disk_errors(f"writing to {place}"), whole_folder(place) as draft:
            yield draft
        return
    with tempfile.TemporaryDirectory(prefix="sgmd-") as scratch:
        with full_disk_errors(f"writing to {scratch}, on the way to {address}"):
            yield Path(scratch)
        with storage_errors(f"writing {address}"):
            _replace(Path(scratch), address, last)


@contextmanager
def files_at(place: str | Path, patience_s: float = 0.0) -> Iterator[Path]:
    """Yields a local folder; on a normal exit what was written to it is in `place`.

    Args:
        place: The folder: a path, which is made where it is missing, or an address.
        patience_s: Seconds for which an object store that fails is tried again.

    Raises:
        StorageError: An object store does not take the files, or has kept something else.
    """
    address = store_address(place)
    if not address:
        Path(place).mkdir(parents=True, exist_ok=True)
        yield Path(place)
        return
    with tempfile.TemporaryDirectory(prefix="sgmd-") as scratch:
        yield Path(scratch)
        deadline_s = time.monotonic() + patience_s
        while True:
            try:
                with storage_errors(f"writing to {address}"):
                    files, root = open_store(address)
                    _send(files, root, Path(scratch), _names_in(Path(scratch)))
                return
            except StorageError:
                if time.monotonic() >= deadline_s:
                    raise
            time.sleep(_AGAIN_S)


@contextmanager
def folder_here(place: str | Path) -> Iterator[Path]:
    """Yields a folder of this machine with the files of a place; a copy goes with the block.

    Args:
        place: The folder: a path, which is yielded as it is, or an address.

    Raises:
        StorageError: The object store cannot be read.
    """
    address = store_address(place)
    if not address:
        yield Path(place)
        return
    with tempfile.TemporaryDirectory(prefix="sgmd-") as scratch:
        # Networks find their parts by the names of folders.
        folder = Path(scratch) / address.rpartition("/")[2]
        _take(address, folder)
        yield folder


def copy_folder_at(source: str | Path, place: str | Path, last: Sequence[str] = ()) -> None:
    """Copies the files of a folder, of which one or the other lies at an object store.

    A store copies its own objects by itself: they do not pass through this process.

    Args:
        source: The folder: a path or an address.
        place: Where to: a path or an address, with nothing there.
        last: As in `whole_folder_at`.

    Raises:
        StorageError: A store cannot be read, or does not take the files.
    """
    start, end = store_address(source), store_address(place)
    if start and not end:
        with whole_folder(place) as draft:
            _take(start, draft)
    elif start.partition("://")[0] == end.partition("://")[0]:
        with storage_errors(f"copying {start} to {end}"):
            _copy_objects(start, end, last)
    elif start:
        with tempfile.TemporaryDirectory(prefix="sgmd-") as scratch:
            _take(start, Path(scratch))
            copy_folder_at(scratch, end, last)
    else:
        with storage_errors(f"writing {end}"):
            _send_in_order(Path(source), end, last)


def upload_file(file: Path, path: str, files: Any = None) -> str:  # noqa: ANN401
    """Copies a local file to an object store, and checks what is there; returns its SHA-256.

    Args:
        file: The local file.
        path: As in `cluster.streams.write_stream`.
        files: As in `cluster.streams.write_stream`.

    Raises:
        StorageError: The store has kept something else than was sent.
        OSError: The file cannot be read, or the store does not take it.
    """
    return write_stream(path, _pieces(file), files)


def _pieces(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while piece := opened.read(_PIECE_BYTES):
            yield piece


def _replace(folder: Path, address: str, last: Sequence[str]) -> None:
    """Puts the files of a local folder in the place of those at an address."""
    files: Any
    files, root = open_store(address)
    there = set(_names_at(files, root))
    for name in last:
        if name in there:
            files.rm_file(f"{root}/{name}")
    names = _names_in(folder)
    _send(files, root, folder, [name for name in names if name not in last])
    for name in sorted(there - {*names, *last}):
        files.rm_file(f"{root}/{name}")
    _send(files, root, folder, [name for name in last if name in names])


def _take(address: str, folder: Path) -> None:
    """Brings the files at an address to a local folder."""
    with storage_errors(f"reading {address}"):
        files: Any
        files, root = open_store(address)
        for name in _names_at(files, root):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            files.get_file(f"{root}/{name}", str(folder / name))


def _copy_objects(source: str, target: str, last: Sequence[str]) -> None:
    files: Any
    (files, start), (_, end) = open_store(source), open_store(target)
    names = _names_at(files, start)
    for name in _in_order(names, last):
        files.cp_file(f"{start}/{name}", f"{end}/{name}")
        found, sent = (files.info(f"{root}/{name}")["size"] for root in (end, start))
        if found != sent:
            raise StorageError(
                f"copying {source}/{name} to {target}",
                f"{found} bytes there, of {sent}",
                "the same object",
                "Look at the store, then run it again",
            )


def _send_in_order(folder: Path, address: str, last: Sequence[str]) -> None:
    files: Any
    files, root = open_store(address)
    for name in _in_order(_names_in(folder), last):
        upload_file(folder / name, f"{root}/{name}", files)


def _in_order(names: Sequence[str], last: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda name: (name in last, name))


def _names_at(files: Any, root: str) -> list[str]:  # noqa: ANN401
    files.invalidate_cache()
    return sorted(name.removeprefix(f"{root}/") for name in files.find(root))


def _send(files: Any, root: str, folder: Path, names: Sequence[str]) -> None:  # noqa: ANN401
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda name: upload_file(folder / name, f"{root}/{name}", files), names))


def _names_in(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in found)
