"""Clips for training, read from Parquet shards with Ray Data.

    read shards -> decode mp4 -> [encode to latents] -> the worker's memory

The embedded world is small: a worker reads its part of the shards once and keeps it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import fsspec
import numpy as np
import ray.data
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.data.shards.parquet import open_parquet
from pipelines.media.video import decode_video
from pipelines.pretraining.config import WorldSettings
from sgmd_core.errors import DataError
from workers.models.wan import open_autoencoder

Batch = dict[str, NDArray[Any]]

_COLUMNS = ("sample_id", "caption", "video")
# Reading and decoding are light; whole cores are left to the training worker, which on a small
# machine holds nearly all of them.
_LIGHT_TASK_CPUS = 0.1
_DECODE_BATCH = 64


@dataclass(frozen=True, slots=True)
class MemoryClips:
    """Clips of one worker, ordered by sample id.

    Attributes:
        values: uint8 pixels (N, T, H, W, 3), or normalised latents (N, C, T, H, W).
        captions: One caption per clip.
    """

    values: Tensor
    captions: list[str]


def require_shards(folder: str) -> None:
    """Check that a folder holds readable, non-empty shards with the columns that we need.

    Raises:
        DataError: there is no shard, or one is corrupt, empty or lacks a column.
    """
    attempted = f"looking for clips in {folder}"
    filesystem, root = fsspec.core.url_to_fs(folder)
    shards = sorted(filesystem.glob(f"{root}/*.parquet"))
    if not shards:
        raise DataError(
            attempted,
            "no *.parquet file",
            "shards of captioned videos",
            "Write some with `sgmd shapes`, or correct the address",
        )
    for shard in shards:
        try:
            with filesystem.open(shard, "rb") as file:
                parquet = open_parquet(file)
                names, num_rows = parquet.schema_arrow.names, parquet.metadata.num_rows
        except (OSError, ValueError) as error:
            raise DataError(attempted, f"{shard} is not readable Parquet ({error})") from error
        missing = [name for name in _COLUMNS if name not in names]
        if missing or not num_rows:
            found = f"{shard} lacks the columns {missing}" if missing else f"{shard} has no rows"
            raise DataError(attempted, found, f"rows with the columns {list(_COLUMNS)}")


def clip_dataset(folder: str, world: WorldSettings) -> ray.data.Dataset:
    """Decoded clips: rows of sample_id, caption and pixels (T, H, W, 3)."""
    rows = _read(folder, _COLUMNS)
    if world.max_clips is not None:
        rows = rows.limit(world.max_clips)
    return rows.map_batches(
        cast("Any", DecodeClips(world)),  # Ray's stubs know functions, not callable objects
        batch_size=_DECODE_BATCH,
        num_cpus=_LIGHT_TASK_CPUS,
    )


def latent_dataset(folder: str, world: WorldSettings, vae_folder: Path) -> ray.data.Dataset:
    """Encoded clips: rows of sample_id, caption and normalised latents (C, T, H, W)."""
    return clip_dataset(folder, world).map_batches(
        EncodeClips,
        fn_constructor_kwargs={"vae_folder": str(vae_folder)},
        batch_size=_DECODE_BATCH,
        num_cpus=_LIGHT_TASK_CPUS,
        compute=ray.data.ActorPoolStrategy(size=1),
    )


def distinct_captions(folder: str) -> list[str]:
    """All captions of the shards, each once, sorted."""
    rows = _read(folder, ["caption"])
    found: set[str] = set()
    for batch in rows.iter_batches(batch_size=1024):
        found.update(batch["caption"].tolist())
    return sorted(found)


def _read(folder: str, columns: Sequence[str]) -> ray.data.Dataset:
    context = ray.data.DataContext.get_current()
    # Progress is told by events; Ray Data would log a screenful for every stage.
    context.enable_progress_bars = context.print_on_execution_start = False
    return ray.data.read_parquet(folder, num_cpus=_LIGHT_TASK_CPUS).select_columns(list(columns))


class DecodeClips:
    """Turns encoded videos into pixels.

    Args:
        world: The expected frame count and size.
    """

    def __init__(self, world: WorldSettings) -> None:
        self.world = world

    def __call__(self, batch: Batch) -> Batch:
        """Decode the column `video` of a batch.

        Raises:
            DataError: a video cannot be decoded, has another size, or its caption is empty.
        """
        pixels = [
            self._decode(sample_id, caption, video)
            for sample_id, caption, video in zip(
                batch["sample_id"], batch["caption"], batch["video"], strict=True
            )
        ]
        return {
            "sample_id": batch["sample_id"],
            "caption": batch["caption"],
            "pixels": np.stack(pixels),
        }

    def _decode(self, sample_id: str, caption: str | None, video: bytes) -> NDArray[np.uint8]:
        attempted = f"decoding the sample {sample_id}"
        if not caption:
            raise DataError(attempted, "its caption is empty", "a caption")
        pixels = decode_video(video)
        size = self.world.frame_px
        expected = (self.world.num_frames, size, size, 3)
        if pixels.shape != expected:
            raise DataError(
                attempted,
                f"a video of shape {pixels.shape}",
                f"{expected}, (frames, height, width, 3)",
                "Prepare the clips in one size, or set world.num_frames and world.frame_px",
            )
        return pixels


class EncodeClips:
    """Turns pixels into normalised latents.

    Args:
        vae_folder: Folder of the trained autoencoder.
    """

    def __init__(self, vae_folder: str) -> None:
        torch.set_num_threads(1)
        self.vae = open_autoencoder(vae_folder)

    def __call__(self, batch: Batch) -> Batch:
        """Encode the column `pixels` of a batch."""
        video = torch.from_numpy(batch["pixels"]).permute(0, 4, 1, 2, 3).float() / 255
        return {
            "sample_id": batch["sample_id"],
            "caption": batch["caption"],
            "latents": self.vae.encode(video).numpy(),
        }


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
