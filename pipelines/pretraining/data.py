"""Clips for training, read from a set of shards through the feed.

    videos   feed: row groups -> decoded -> [latents] -> the worker's memory
    encoded  feed: row groups -> latents -------------> the worker's memory

The embedded world is small: a worker reads its share of the rows once and keeps it. A share is so
many rows from a cursor on, in the order in which they are stored.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.data.clips.clip_decoding import ClipDecoder
from pipelines.data.clips.clip_format import ClipFormat, FitPolicy
from pipelines.data.shards.columns import map_columns
from pipelines.data.shards.filesystem import S3Settings
from pipelines.data.shards.index import Shard
from pipelines.data.shards.reading import Fault
from pipelines.data.shards.rejection import Rejection
from pipelines.data.shards.scan import scan_folder
from pipelines.data.shards.schema import (
    CAPTION,
    LATENTS,
    REQUIRED_COLUMNS,
    SAMPLE_ID,
    VIDEO,
    ShardKind,
)
from pipelines.data.shards.stored_buckets import read_buckets
from pipelines.data.stream.catalogue import Catalogue
from pipelines.data.stream.feed import Feed, FeedProgress, StreamSettings
from pipelines.data.stream.inspect import inspect_folder
from pipelines.data.stream.plan import ShuffleSettings
from pipelines.data.stream.ray_stream import ReadAheadSettings
from pipelines.data.stream.source import Source
from pipelines.data.stream.stream import plan_windows
from pipelines.pretraining.config import WorldSettings
from sgmd_core.errors import DataError

Batch = dict[str, NDArray[Any]]

PIXELS = "pixels"
# Of rows that are not shuffled a window is one row group: small pieces for many readers.
_WINDOWS = ShuffleSettings(row_groups=1)
_BATCH_ROWS = 64
_CAPTIONS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class MemoryClips:
    """Clips of one worker, ordered by sample id.

    Attributes:
        values: uint8 pixels (N, T, H, W, 3), or normalised latents (N, C, T, H, W).
        captions: One caption per clip.
    """

    values: Tensor
    captions: list[str]


@dataclass(frozen=True, slots=True)
class TrainingClips:
    """A set of which the end of every shard has been read.

    Attributes:
        source: Its address, and what is read: `latents` of an encoded set, otherwise `video`.
        shards: Its shards with their rows, in the order of their paths, as far as they are read.
        num_rows: Rows that are wanted: the first ones.
    """

    source: Source
    shards: tuple[Shard, ...]
    num_rows: int

    @property
    def paths(self) -> list[str]:
        """Paths of its shards, relative to its folder."""
        return [shard.path for shard in self.shards]

    def progress_at(self, row: int) -> FeedProgress:
        """Progress of a feed that begins at a row; nothing is listed or opened again."""
        lines = [[shard.path, shard.num_bytes, shard.rows] for shard in self.shards]
        known = ({"shards": lines, "last": True},)
        place = self.source.open(probe=False)
        catalogue = Catalogue(place.filesystem, place.root, len(lines), recorded=known)
        for planned in plan_windows(catalogue, None, _WINDOWS):
            if row < planned.window.num_rows:
                return FeedProgress(replace(planned.window.cursor, row=row), catalogue=known)
            row -= planned.window.num_rows
        raise AssertionError("plans have no end")


def open_clips(
    folder: str,
    world: WorldSettings,
    kinds: Collection[ShardKind] = (ShardKind.VIDEO, ShardKind.ENCODED),
) -> TrainingClips:
    """Looks a set over; its first shard decides whether videos or latents are read.

    Args:
        folder: Local folder or `s3://bucket/prefix`.
        world: Size of the clips, and how many are read at most.
        kinds: Kinds of shards that may be read.

    Raises:
        DataError: There is no shard, it is of another kind, or one is corrupt or lacks a column.
    """
    attempted = f"looking for clips in {folder}"
    # Read once: opening Arrow's client would cost more than it saves.
    source = Source(folder, S3Settings(native_reads=False))
    facts = inspect_folder(source, 0, ShuffleSettings())
    if facts.kind not in kinds:
        raise DataError(
            attempted,
            f"shards of the kind {facts.kind}",
            f"shards of the kind {' or '.join(kinds)}",
            "`sgmd shapes` and `sgmd prepare` write videos, and `sgmd encode` encodes them",
        )
    source = replace(source, settled=facts.names)
    place = source.open(probe=False)
    sizes = [each.folder for each in read_buckets(place.filesystem, place.root, source.s3)]
    if sizes:
        raise DataError(
            attempted,
            f"latents of {len(sizes)} sizes ({', '.join(sizes)})",
            "clips of one size",
            f"Give the folder of one of them, such as {folder.rstrip('/')}/{sizes[0]}",
        )
    if facts.kind is ShardKind.ENCODED:
        source = replace(source, columns=(LATENTS,), encoding=facts.encoding)
    else:
        size = (world.frame_px, world.frame_px)
        source = replace(
            source,
            columns=(VIDEO,),
            decode=ClipDecoder(ClipFormat(None, *size, policy=FitPolicy.REFUSE)),
            pixel_shape=(world.num_frames, *size, 3),
        )
    wanted = (*REQUIRED_COLUMNS, *source.columns)
    shards: list[Shard] = []
    num_rows, limit = 0, world.max_clips
    for each in scan_folder(place.filesystem, place.root, source.s3, only=place.only):
        shard, fault = each.shard, each.fault if each.is_broken else ""
        if each.footer is not None and not each.is_empty:
            columns = map_columns(each.footer.schema, facts.names, wanted)
            fault = columns.reason if isinstance(columns, Fault) else fault
        if fault:
            raise DataError(attempted, f"{shard.path}: {fault}", f"rows with the columns {wanted}")
        if shard.num_rows and (limit is None or num_rows < limit):
            shards.append(shard)
            num_rows += shard.num_rows
    return TrainingClips(source, tuple(shards), num_rows if limit is None else min(limit, num_rows))


def share_of_clips(
    clips: TrainingClips,
    rank: int = 0,
    num_workers: int = 1,
    *,
    encode: Callable[[Tensor], Tensor] | None = None,
    readers: int = 0,
) -> Iterator[Batch]:
    """Reads a worker's share of a set, in the order in which it is stored.

    Args:
        clips: The set.
        rank: Of the worker.
        num_workers: Workers that share the set, each of which gets as many rows, up to one.
        encode: Makes latents of videos (B, 3, T, H, W) in [0, 1]; None: pixels are wanted.
        readers: Processes that read and decode, with Ray Data; 0: this one does.

    Yields:
        Ids, captions, and `pixels` (T, H, W, 3) or `latents` (C, T, H, W) of some clips.

    Raises:
        DataError: A row cannot be used: its video cannot be decoded or has another size, its
            caption is empty, or its latents are of another autoencoder.
    """
    first, end = (clips.num_rows * each // num_workers for each in (rank, rank + 1))
    source = clips.source
    with _feed(clips, source, first, end - first, readers) as feed:
        for num_rows in _parts(end - first, _BATCH_ROWS):
            ids, captions, number = _taken(feed, source, num_rows)
            batch = {SAMPLE_ID: ids, CAPTION: captions}
            if source.encoding is not None:
                yield {**batch, LATENTS: feed.latents(number).float().numpy()}
            elif encode is None:
                yield {**batch, PIXELS: feed.pixels(number)}
            else:
                video = torch.from_numpy(feed.pixels(number)).permute(0, 4, 1, 2, 3)
                yield {**batch, LATENTS: encode(video.float() / 255).numpy()}


def distinct_captions(clips: TrainingClips) -> list[str]:
    """All captions of a set, each once, sorted."""
    source = replace(clips.source, columns=(), encoding=None, decode=None)
    found: set[str] = set()
    with _feed(clips, source, 0, clips.num_rows, 0) as feed:
        for num_rows in _parts(clips.num_rows, _CAPTIONS_AT_ONCE):
            found.update(_taken(feed, source, num_rows)[1])
    return sorted(found)


def _feed(clips: TrainingClips, source: Source, first: int, num_rows: int, readers: int) -> Feed:
    """A feed of some rows, of which every one can be used; two may have one id."""
    settings = StreamSettings(
        source,
        None,
        _WINDOWS,
        max_bad_fraction=0.0,
        ahead=ReadAheadSettings(readers),
        ends=True,
        distinct=False,
    )
    return Feed(settings, clips.progress_at(first) if num_rows else FeedProgress(), num_rows)


def _parts(num_rows: int, size: int) -> Iterator[int]:
    return (min(size, num_rows - done) for done in range(0, num_rows, size))


def _taken(feed: Feed, source: Source, num_rows: int) -> tuple[NDArray[Any], NDArray[Any], int]:
    """Ids and captions of the next rows, and the number of their batch."""
    batch = feed.take(num_rows)
    for bad in batch.rejects:
        raise _unusable(source, bad)
    ids, captions = (np.array(each, dtype=object) for each in (batch.sample_ids, batch.captions))
    return ids, captions, batch.number


def _unusable(source: Source, bad: Rejection) -> DataError:
    row = "all rows" if bad.row is None else f"row {bad.row}"
    return DataError(
        f"reading {bad.source} of {source.url}",
        f"{row} of row group {bad.row_group}, {bad.sample_id}: {bad.why}",
        "clips that can all be used",
        f"`sgmd check {source.url}` names broken ones; clips of another size need other"
        " values of world.num_frames and world.frame_px",
    )


def collect(batches: Iterable[Mapping[str, NDArray[Any]]], column: str) -> MemoryClips:
    """Gather batches in memory, ordered by sample id.

    A resumed run must meet the clips under the same indices wherever its shards lie.

    Raises:
        DataError: there is no clip at all.
    """
    parts = list(batches)
    if not parts:
        raise DataError(
            "gathering the training clips",
            "not a single clip for this worker",
            "at least one clip per worker",
            "Write more clips or lower ray.num_workers",
        )
    sample_ids = np.concatenate([part[SAMPLE_ID] for part in parts])
    order = np.argsort(sample_ids, kind="stable")
    values = np.concatenate([part[column] for part in parts])[order]
    captions = np.concatenate([part[CAPTION] for part in parts])[order]
    return MemoryClips(torch.from_numpy(values), [str(caption) for caption in captions])
