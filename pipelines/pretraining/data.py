"""Clips for training, read from a set of shards with Ray Data.

    videos   row group -> decode -> [encode to latents] -> the worker's memory
    encoded  row group -> latents -----------------------> the worker's memory

The embedded world is small: a worker reads its part of the shards once and keeps it.
"""

import pickle
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute
import ray.data
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.folders import folder_here
from pipelines.data.clips.clip_decoding import ClipDecoder
from pipelines.data.clips.clip_format import ClipFormat, FitPolicy
from pipelines.data.shards.columns import map_columns
from pipelines.data.shards.filesystem import S3Settings
from pipelines.data.shards.parquet import RowGroupReader
from pipelines.data.shards.reading import Fault
from pipelines.data.shards.scan import scan_folder
from pipelines.data.shards.schema import (
    CAPTION,
    LATENTS,
    REQUIRED_COLUMNS,
    SAMPLE_ID,
    VIDEO,
    ShardKind,
    join_names,
)
from pipelines.data.shards.values import unpack_all_latents
from pipelines.data.stream.inspect import inspect_folder
from pipelines.data.stream.plan import Cursor, RowGroup, ShuffleSettings, Window
from pipelines.data.stream.source import Source
from pipelines.data.stream.window import REASON, ROW, read_window
from pipelines.data.stream.window_decoding import decode_rows
from pipelines.pretraining.config import WorldSettings
from sgmd_core.errors import DataError

# Arrow makes these functions while it is imported, where a type checker does not see them.
pc: Any = pyarrow.compute

Batch = dict[str, NDArray[Any]]

PIXELS = "pixels"
_TASK = "task"
# Reading and decoding are light; whole cores are left to the training worker, which on a small
# machine holds nearly all of them.
_LIGHT_TASK_CPUS = 0.1
_ENCODE_BATCH = 64


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
        groups: Its row groups with the rows that are wanted of each, in the order of their paths.
    """

    source: Source
    groups: tuple[tuple[RowGroup, int], ...]

    @property
    def shards(self) -> list[str]:
        """Paths of its shards, relative to its folder."""
        return list(dict.fromkeys(group.shard for group, _ in self.groups))

    @property
    def num_rows(self) -> int:
        """Rows that are wanted."""
        return sum(num_rows for _, num_rows in self.groups)


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
    # A reader a task: opening Arrow's client would cost more than it saves.
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
    place = source.open(probe=False)
    wanted = (*REQUIRED_COLUMNS, *source.columns)
    groups: list[tuple[RowGroup, int]] = []
    room = world.max_clips
    for each in scan_folder(place.filesystem, place.root, source.s3, only=place.only):
        shard, fault = each.shard, each.fault if each.is_broken else ""
        if each.footer is not None and not each.is_empty:
            columns = map_columns(each.footer.schema, facts.names, wanted)
            fault = columns.reason if isinstance(columns, Fault) else fault
        if fault:
            raise DataError(attempted, f"{shard.path}: {fault}", f"rows with the columns {wanted}")
        for index, num_rows in enumerate(shard.rows or ()):
            num_wanted = num_rows if room is None else min(num_rows, room)
            room = None if room is None else room - num_wanted
            if num_wanted:
                group = RowGroup(shard.path, shard.num_bytes, index, num_rows)
                groups.append((group, num_wanted))
    return TrainingClips(source, tuple(groups))


def clip_dataset(clips: TrainingClips) -> ray.data.Dataset:
    """Rows of sample_id, caption, and pixels (T, H, W, 3) or stored latents (C, T, H, W)."""
    context = ray.data.DataContext.get_current()
    # Progress is told by events; Ray Data would log a screenful for every stage.
    context.enable_progress_bars = context.print_on_execution_start = False
    tasks = [{_TASK: pickle.dumps(each)} for each in clips.groups]
    return ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        cast("Any", ReadClips(clips.source)),  # Ray's stubs know functions, not callable objects
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=_LIGHT_TASK_CPUS,
    )


def latent_dataset(clips: TrainingClips, vae_folder: str) -> ray.data.Dataset:
    """Rows of sample_id, caption and normalised latents (C, T, H, W)."""
    if clips.source.encoding is not None:
        return clip_dataset(clips)
    return clip_dataset(clips).map_batches(
        EncodeClips,
        fn_constructor_kwargs={"vae_folder": vae_folder},
        batch_size=_ENCODE_BATCH,
        num_cpus=_LIGHT_TASK_CPUS,
        compute=ray.data.ActorPoolStrategy(size=1),
    )


def distinct_captions(clips: TrainingClips) -> list[str]:
    """All captions of a set, each once, sorted."""
    source = replace(clips.source, columns=(), encoding=None, decode=None)
    reader = source.open_reader()
    found: set[str] = set()
    for group, num_rows in clips.groups:
        for part in _read_group(reader, source, group, num_rows):
            found.update(part[CAPTION].to_pylist())
    return sorted(found)


def _read_group(
    reader: RowGroupReader, source: Source, group: RowGroup, num_rows: int
) -> Iterator[pa.Table]:
    """The first rows of a row group, in parts of bounded size.

    Raises:
        DataError: A row cannot be used, or the server failed.
    """
    table = read_window(reader, source, Window(Cursor(), (group,), (0,)))
    table = table.filter(pc.less(table[ROW], num_rows))
    for part in [table] if source.decode is None else decode_rows(source, table):
        for line in part.filter(part[REASON].is_valid()).slice(0, 1).to_pylist():
            raise DataError(
                f"reading {group.shard} of {source.url}",
                f"row {line[ROW]} of row group {group.index}, {line[SAMPLE_ID]}: {line[REASON]}",
                "clips that can all be used",
                f"`sgmd check {source.url}` names broken ones; clips of another size need other"
                " values of world.num_frames and world.frame_px",
            )
        yield part


class ReadClips:
    """Row groups to their clips.

    Args:
        source: The set, and what is read of it.
    """

    def __init__(self, source: Source) -> None:
        self.source = source

    def __call__(self, tasks: pa.Table) -> Iterator[Batch]:
        """Read row groups, each in parts of bounded size.

        Raises:
            DataError: A row cannot be used: its video cannot be decoded or has another size, its
                caption is empty, or its latents are of another autoencoder.
        """
        source = self.source
        reader = source.open_reader()
        for task in tasks[_TASK].to_pylist():
            for part in _read_group(reader, source, *pickle.loads(task)):
                names = {
                    name: np.array(part[name].to_pylist(), dtype=object)
                    for name in REQUIRED_COLUMNS
                }
                if source.encoding is None:
                    pixels = join_names(part[VIDEO]).reshape(-1, *source.pixel_shape)
                    yield {**names, PIXELS: pixels}
                else:
                    latents = unpack_all_latents(part[LATENTS], source.encoding)
                    yield {**names, LATENTS: latents.float().numpy()}


class EncodeClips:
    """Turns pixels into normalised latents.

    Args:
        vae_folder: Folder of the trained autoencoder: a path or an address.
    """

    def __init__(self, vae_folder: str) -> None:
        # The processes that read and decode import this file too, and need no networks.
        from workers.models.wan import open_autoencoder

        torch.set_num_threads(1)
        with folder_here(vae_folder) as folder:
            self.vae = open_autoencoder(folder)

    def __call__(self, batch: Batch) -> Batch:
        """Encode the column `pixels` of a batch."""
        video = torch.from_numpy(batch.pop(PIXELS)).permute(0, 4, 1, 2, 3).float() / 255
        return {**batch, LATENTS: self.vae.encode(video).numpy()}


def collect(batches: Iterable[Mapping[str, NDArray[Any]]], column: str) -> MemoryClips:
    """Gather batches in memory, ordered by sample id.

    Ray Data promises no order, but a resumed run must meet the clips under the same indices.

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
    sample_ids = np.concatenate([part["sample_id"] for part in parts])
    order = np.argsort(sample_ids)
    values = np.concatenate([part[column] for part in parts])[order]
    captions = np.concatenate([part["caption"] for part in parts])[order]
    return MemoryClips(torch.from_numpy(values), [str(caption) for caption in captions])
