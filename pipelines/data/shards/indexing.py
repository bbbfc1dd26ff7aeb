"""Makes the index of a folder: from what was just written, and footers for all else."""

from collections.abc import Iterable

from fsspec import AbstractFileSystem

from pipelines.data.shards.filesystem import S3Settings
from pipelines.data.shards.index import Shard, write_index
from pipelines.data.shards.scan import scan_folder
from sgmd_core.errors import DataError


def index_folder(
    filesystem: AbstractFileSystem,
    root: str,
    written: Iterable[Shard] = (),
    s3: S3Settings = S3Settings(),
) -> tuple[Shard, ...]:
    """Writes the index of all shards that a folder holds now, those without rows included.

    Args:
        filesystem: The folder's file system.
        root: The folder's path in it.
        written: Shards whose rows are known to the caller; the footers of others are read.
        s3: Requests to an S3 server.

    Returns:
        What the index names.

    Raises:
        DataError: A shard has no readable footer, or the store refuses it.
    """
    shards: list[Shard] = []
    for scanned in scan_folder(filesystem, root, s3, known=written):
        if scanned.is_broken:
            raise DataError(
                f"indexing {filesystem.unstrip_protocol(root)}",
                f"{scanned.shard.path}: {scanned.fault}",
                "shards that can be opened",
                "Remove it, or write it again",
            )
        shards.append(scanned.shard)
    write_index(filesystem, root, shards)
    return tuple(shards)
