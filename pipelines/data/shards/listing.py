"""The shards of a folder, listed lazily: chapter after chapter, in the order of their paths.

A chapter is a fixed number of shards (the last one fewer), whatever the server's pages hold, so its
borders depend on the paths alone. Nobody has to wait for the end of a long listing, and listing can
go on after any path.
"""

from collections.abc import Collection, Iterator
from pathlib import PurePosixPath
from typing import Any, cast

from fsspec import AbstractFileSystem
from s3fs import S3FileSystem

from pipelines.data.shards.filesystem import data_errors
from pipelines.data.shards.index import Shard
from pipelines.data.shards.schema import QUARANTINE_NAME
from sgmd_core.errors import DataError

_SUFFIX = ".parquet"


def list_chapters(
    filesystem: AbstractFileSystem,
    root: str,
    size: int,
    after: str = "",
    *,
    only: str = "",
    in_order: bool = True,
) -> Iterator[tuple[Shard, ...]]:
    """Lists the Parquet files under a folder, in any depth.

    Files and folders whose names begin with `_` or `.` are left out: they are ours or a tool's. So
    are the empty objects by which a folder is marked on S3.

    Args:
        filesystem: The folder's file system.
        root: The folder's path in it.
        size: Shards of a chapter.
        after: Begin after this path (relative to the folder); "" begins at the beginning.
        only: Name of the only file of the folder that is wanted; "" wants all.
        in_order: Trust the server to list in order, which spares waiting for the last page; False
            sorts what is listed.

    Yields:
        Chapters of `size` shards, the last one smaller; none for a folder without shards.

    Raises:
        DataError: The folder cannot be listed, or the server lists out of order.
    """
    chapter: list[Shard] = []
    last = after
    entries = _only(filesystem, root, only) if only else _entries(filesystem, root, after)
    for path, num_bytes in entries if in_order else sorted(entries):
        if not path or path.endswith("/"):
            continue  # Consoles and tools mark a folder by an empty object of its name.
        if path <= last:
            raise DataError(
                f"listing the shards of {root}",
                f"{path} after {last}",
                "paths in increasing order, as S3 lists them",
                "Give the folder an index, which is read instead: sgmd check --write-index ADDRESS",
            )
        last = path
        if is_shard(path):
            chapter.append(Shard(path, num_bytes))
        if len(chapter) == size:
            yield tuple(chapter)
            chapter = []
    if chapter:
        yield tuple(chapter)


def sizes_of(filesystem: AbstractFileSystem, root: str, paths: Collection[str]) -> dict[str, int]:
    """Bytes of some files as a listing names them now; those that are gone are left out.

    Args:
        filesystem: The folder's file system.
        root: The folder's path in it.
        paths: Relative to the folder.

    Raises:
        DataError: The folder cannot be listed.
    """
    found: dict[str, int] = {}
    entries = _entries(filesystem, root, "")
    while len(found) < len(paths) and (entry := next(entries, None)) is not None:
        if entry[0] in paths:
            found[entry[0]] = entry[1]
    return found


def list_files(filesystem: AbstractFileSystem, root: str) -> Iterator[tuple[str, int]]:
    """(path relative to the folder, bytes) of every file of a folder, in order.

    Raises:
        DataError: The folder cannot be listed.
    """
    return _entries(filesystem, root, "")


def _only(filesystem: AbstractFileSystem, root: str, name: str) -> Iterator[tuple[str, int]]:
    """The one file of a set that is a file, if it is there."""
    path = f"{root}/{name}"
    with data_errors(f"opening {filesystem.unstrip_protocol(path)}"):
        filesystem.invalidate_cache()
        if filesystem.isfile(path):
            yield name, int(filesystem.info(path)["size"])


def _entries(filesystem: AbstractFileSystem, root: str, after: str) -> Iterator[tuple[str, int]]:
    """(path relative to the folder, bytes) of every file after a path, in order."""
    attempted = f"listing the shards of {filesystem.unstrip_protocol(root)}"
    if isinstance(filesystem, S3FileSystem):
        yield from _s3_entries(filesystem, root, after, attempted)
        return
    with data_errors(attempted):
        filesystem.invalidate_cache()
        found = cast("dict[str, Any]", filesystem.find(root, detail=True))
    entries = ((path[len(root) + 1 :], entry["size"]) for path, entry in found.items())
    yield from sorted(entry for entry in entries if entry[0] > after)


def _s3_entries(
    filesystem: S3FileSystem, root: str, after: str, attempted: str
) -> Iterator[tuple[str, int]]:
    bucket, prefix, _ = filesystem.split_path(root)
    prefix = f"{prefix}/" if prefix else ""
    request = {"Bucket": bucket, "Prefix": prefix}
    if after:
        request["StartAfter"] = prefix + after
    while True:
        # s3fs itself only lists whole folders; this asks for one page at a time.
        with data_errors(attempted):
            page = cast("Any", filesystem).call_s3("list_objects_v2", **request)
        for entry in page.get("Contents", []):
            yield entry["Key"][len(prefix) :], entry["Size"]
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def other_files(filesystem: AbstractFileSystem, root: str) -> Iterator[str]:
    """Paths of a folder's files that are neither shards nor notes of this program or of a tool.

    Raises:
        DataError: The folder cannot be listed.
    """
    for path, _ in list_files(filesystem, root):
        if path and not path.endswith("/") and not is_shard(path) and not _is_note(path):
            yield path


def is_shard(path: str) -> bool:
    """Tells whether a file of a folder is read as a shard, by its path in the folder."""
    return path.lower().endswith(_SUFFIX) and not _is_note(path)


def _is_note(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return parts[-1] == QUARANTINE_NAME or any(part.startswith(("_", ".")) for part in parts)
