"""Which captions come next: the plan over the shards, and the reading of one row group.

    folder -> shards -> row groups -> one seeded permutation an epoch -> rows, permuted again

The plan is a pure function of (shards, seed), and a position in it is one number: the rows handed
out since the start of the run. So a run that is resumed, or that reads with other tools or on
another number of machines, meets the same captions in the same order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from sgmd_core.errors import DataError

REQUIRED_COLUMNS = ("sample_id", "caption")


@dataclass(frozen=True, slots=True)
class RowGroup:
    """One readable unit of a shard.

    Attributes:
        shard: Path of the Parquet file, with its protocol when it is remote.
        index: Number of the row group within the shard.
        num_rows: Rows it holds.
    """

    shard: str
    index: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class ReadTask:
    """A row group as one epoch reads it.

    Attributes:
        group: What to read.
        seed: Numbers that seed the order of the rows: (run seed, epoch, place in the plan).
        skip: Rows of that order which an earlier run has already handed out.
    """

    group: RowGroup
    seed: tuple[int, int, int]
    skip: int = 0


@dataclass(frozen=True, slots=True)
class CaptionRow:
    """One sample as the feed hands it out."""

    sample_id: str
    caption: str


@dataclass(frozen=True, slots=True)
class CaptionPlan:
    """All row groups of a data set in their stored order."""

    groups: tuple[RowGroup, ...]

    @property
    def num_rows(self) -> int:
        """Samples in one epoch."""
        return sum(group.num_rows for group in self.groups)

    def tasks(self, seed: int, start: int, num_rows: int) -> Iterator[ReadTask]:
        """The reads that yield rows `start` to `start + num_rows` of the endless, shuffled stream.

        Args:
            seed: The run's seed.
            start: Rows handed out before, in all epochs together.
            num_rows: Rows wanted; the last task may hold more.
        """
        epoch, skip = divmod(start, self.num_rows)
        wanted = num_rows
        while wanted > 0:
            order = np.random.default_rng((seed, epoch)).permutation(len(self.groups))
            for place in order:
                group = self.groups[place]
                if skip >= group.num_rows:
                    skip -= group.num_rows
                    continue
                yield ReadTask(group, (seed, epoch, int(place)), skip)
                wanted -= group.num_rows - skip
                skip = 0
                if wanted <= 0:
                    return
            epoch += 1


def plan_captions(folder: str) -> CaptionPlan:
    """Lists a folder's shards and reads their footers.

    Args:
        folder: Local path or `s3://bucket/prefix`; endpoint and keys come from the usual AWS
            environment variables.

    Raises:
        DataError: The folder cannot be listed or has no shard, or a shard is unreadable, empty or
            lacks a column. Named with the shard, before anything is trained.
    """
    filesystem, root = _open_folder(folder)
    shards = _list_shards(filesystem, folder, root)
    groups = [group for shard in shards for group in _row_groups(filesystem, shard)]
    return CaptionPlan(tuple(groups))


def read_rows(task: ReadTask) -> list[CaptionRow]:
    """Reads one row group's captions in the task's order.

    Raises:
        DataError: The row group is corrupt, or a caption is missing or blank; names shard, row
            group and sample.
    """
    group = task.group
    attempted = f"reading row group {group.index} of {group.shard}"
    filesystem, path = fsspec.core.url_to_fs(group.shard)
    try:
        with filesystem.open(path, "rb") as file:
            table = pq.ParquetFile(file).read_row_group(group.index, columns=[*REQUIRED_COLUMNS])
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(attempted, error) from error
    ids = table.column("sample_id").to_pylist()
    captions = table.column("caption").to_pylist()
    blank = [
        str(name) for name, text in zip(ids, captions, strict=True) if not (text or "").strip()
    ]
    if blank:
        raise DataError(
            attempted,
            f"{len(blank)} of {len(ids)} rows have no caption (first sample_id: {blank[0]})",
            "a non-empty caption in every row",
            "Remove these rows or caption them, and write the shard again",
        )
    order = np.random.default_rng(task.seed).permutation(len(ids))[task.skip :]
    return [CaptionRow(str(ids[row]), captions[row]) for row in order]


def _open_folder(folder: str) -> tuple[AbstractFileSystem, str]:
    try:
        return fsspec.core.url_to_fs(folder)
    except (ImportError, ValueError) as error:
        raise DataError(
            f"opening the data folder {folder}",
            f"{type(error).__name__}: {error}",
            "a local path or s3://bucket/prefix",
            "Correct data.train",
        ) from error


def _list_shards(filesystem: AbstractFileSystem, folder: str, root: str) -> list[str]:
    try:
        paths: list[str] = sorted(filesystem.find(root))
    except OSError as error:
        raise _unreadable(f"listing the shards of {folder}", error) from error
    shards = [path for path in paths if PurePosixPath(path).suffix == ".parquet"]
    if not shards:
        raise DataError(
            f"listing the shards of {folder}",
            f"{len(paths)} files, none of them .parquet" if paths else "no such folder, or empty",
            "Parquet shards with the columns sample_id and caption",
            "Check data.train; `sgmd shapes DST` writes a data set to try",
        )
    return [filesystem.unstrip_protocol(shard) for shard in shards]


def _row_groups(filesystem: AbstractFileSystem, shard: str) -> list[RowGroup]:
    attempted = f"reading the footer of {shard}"
    try:
        with filesystem.open(filesystem._strip_protocol(shard), "rb") as file:
            parquet = pq.ParquetFile(file)
            columns: Sequence[str] = parquet.schema_arrow.names
            metadata = parquet.metadata
            groups = [
                RowGroup(shard, index, metadata.row_group(index).num_rows)
                for index in range(metadata.num_row_groups)
            ]
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(attempted, error) from error
    missing = [name for name in REQUIRED_COLUMNS if name not in columns]
    if missing:
        raise DataError(
            attempted,
            f"columns {', '.join(columns)}; missing {', '.join(missing)}",
            f"the columns {', '.join(REQUIRED_COLUMNS)}",
            "Write the shard again with these columns",
        )
    groups = [group for group in groups if group.num_rows]
    if not groups:
        raise DataError(attempted, "a shard without rows", "at least one row", "Remove the shard")
    return groups


def _unreadable(attempted: str, error: Exception) -> DataError:
    found = str(error).splitlines()[0] if str(error) else ""
    return DataError(
        attempted,
        f"{type(error).__name__}: {found}",
        "a complete Parquet file that these credentials may read",
        "If the file was cut short, write it again; on S3, check AWS_ENDPOINT_URL and the keys",
    )
