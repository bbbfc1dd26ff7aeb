"""Makes the index of a folder: from what was just written, and footers for all else."""

from collections.abc import Iterable

from fsspec import AbstractFileSystem

from pipelines.data.shards.filesystem import S3Settings
from pipelines.data.shards.index import Shard, write_index
from pipelines.data.shards.listing import list_chapters
from pipelines.data.shards.parquet import Fault, read_footers
from sgmd_core.errors import DataError

_AT_ONCE = 1000  # shards whose footers are read side by side


def index_folder(
    filesystem: AbstractFileSystem,
    root: str,
    written: Iterable[Shard] = (),
    retry: S3Settings = S3Settings(),
) -> tuple[Shard, ...]:
    """Writes the index of all shards that a folder holds now.

    Args:
        filesystem: The folder's file system.
        root: The folder's path in it.
        written: Shards whose rows are known to the caller; the footers of others are read.
        retry: How patiently.

    Returns:
        What the index names.

    Raises:
        DataError: A shard has no readable footer, or the store does not let us.
    """
    known = {(shard.path, shard.num_bytes): shard for shard in written}
    shards: list[Shard] = []
    for chapter in list_chapters(filesystem, root, _AT_ONCE):
        unknown = [shard for shard in chapter if (shard.path, shard.num_bytes) not in known]
        files = [(f"{root}/{shard.path}", shard.num_bytes) for shard in unknown]
        for shard, footer in zip(unknown, read_footers(filesystem, files, retry), strict=True):
            if isinstance(footer, Fault):
                raise DataError(
                    f"indexing {filesystem.unstrip_protocol(root)}",
                    f"{shard.path}: {footer.reason}",
                    "shards that can be opened",
                    "Remove it, or write it again",
                )
            known[shard.path, shard.num_bytes] = Shard(shard.path, shard.num_bytes, footer.rows)
        shards += [known[shard.path, shard.num_bytes] for shard in chapter]
    write_index(filesystem, root, shards)
    return tuple(shards)
