"""The index of a folder of shards: one small file that saves a listing and thousands of footers.

    {"version": 1, "num_rows": 256,
     "shards": [{"path": "part-0.parquet", "bytes": 9120, "rows": [128, 128]}]}

Commands that write shards write it last, so its presence says that the set is whole; a folder
`_progress` without it, that the command which fills the set has not come to its end. Paths are
relative to the folder, which may be moved or mirrored. The index is trusted: after a shard was
added or taken away by hand, delete it or let `sgmd check --write-index` rewrite it. Shards
without rows, as Spark writes them, are named with no rows, and `num_empty` counts them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from fsspec import AbstractFileSystem

from cluster.files import write_whole
from pipelines.data.shards.filesystem import S3Settings, data_errors
from pipelines.data.shards.reading import fetch_file
from sgmd_core.errors import DataError

INDEX_NAME = "_index.json"
PROGRESS_NAME = "_progress"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Shard:
    """One Parquet file of a folder.

    Attributes:
        path: Relative to the folder, with forward slashes.
        num_bytes: Size of the file.
        rows: Rows of each row group; None until an index or the footer has been read.
    """

    path: str
    num_bytes: int
    rows: tuple[int, ...] | None = None

    @property
    def num_rows(self) -> int:
        """Rows of all row groups, as far as they are known."""
        return sum(self.rows or ())


def write_index(filesystem: AbstractFileSystem, root: str, shards: Sequence[Shard]) -> None:
    """Writes the index of a folder whose shards are all there; replaces an older one as a whole.

    Args:
        filesystem: The folder's file system.
        root: The folder's path in it.
        shards: Every shard, with its rows; stored in the order of their paths.

    Raises:
        DataError: A shard's rows are not known, or the store refuses it.
    """
    attempted = f"writing {root}/{INDEX_NAME}"
    unknown = [shard.path for shard in shards if shard.rows is None]
    if unknown:
        raise DataError(attempted, f"{unknown[0]} without its rows", "rows of each row group")
    ordered = sorted(shards, key=lambda shard: shard.path)
    num_empty = sum(not shard.num_rows for shard in ordered)
    content = {
        "version": _VERSION,
        "num_rows": sum(shard.num_rows for shard in ordered),
        **({"num_empty": num_empty} if num_empty else {}),
        "shards": [
            {"path": shard.path, "bytes": shard.num_bytes, "rows": list(shard.rows or ())}
            for shard in ordered
        ],
    }
    with data_errors(attempted):
        write_whole(f"{root}/{INDEX_NAME}", json.dumps(content).encode(), filesystem)


def read_index(
    filesystem: AbstractFileSystem, root: str, s3: S3Settings = S3Settings()
) -> tuple[Shard, ...] | None:
    """The shards that a folder's index names, in the order of their paths; None without an index.

    Args:
        filesystem: The folder's file system.
        root: The folder's path in it.
        s3: Requests to an S3 server.

    Raises:
        DataError: The index is there and cannot be read or makes no sense.
    """
    text = fetch_file(filesystem, f"{root}/{INDEX_NAME}", s3)
    if text is None:
        return None
    try:
        content = json.loads(text)
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']}")
        found = tuple(
            Shard(str(entry["path"]), int(entry["bytes"]), tuple(map(int, entry["rows"])))
            for entry in content["shards"]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"reading {root}/{INDEX_NAME}",
            f"{type(error).__name__}: {error}",
            f"an index of version {_VERSION}",
            "Delete the file: the folder is then listed instead",
        ) from error
    return tuple(sorted(found, key=lambda shard: shard.path))


def unfinished_in_words(filesystem: AbstractFileSystem, root: str) -> str:
    """Says that a folder is still being filled, or was left halfway; empty where it is whole.

    Args:
        filesystem: The folder's file system.
        root: The folder's path in it.

    Raises:
        DataError: The folder cannot be looked at.
    """
    with data_errors(f"looking at {root}"):
        if filesystem.exists(f"{root}/{INDEX_NAME}"):
            return ""
        if not filesystem.exists(f"{root}/{PROGRESS_NAME}"):
            return ""
    return (
        f"not whole: the command that fills {root} has not come to its end ({PROGRESS_NAME} is"
        f" there and {INDEX_NAME} is not). Run it again to go on; until then rows are missing"
    )
