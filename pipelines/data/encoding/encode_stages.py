"""The stages of `sgmd encode`, as Ray Data runs them: tables of rows in, tables of rows out.

    parts -> read_and_decode (tasks) -> EncodeVideos (actors) -> EncodeCaptions (actors) -> rows

Where text embeddings are made alone, no video is read and EncodeVideos is left out.

A row that cannot be encoded goes through all stages with its reason, so that whoever counts the
rows of a part at the end knows when it is whole.
"""

import json
import logging
import os
import pickle
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from math import prod
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray.data

from cluster.ray.topology import require_cpus, require_gpus
from cluster.runtime import start_ray
from pipelines.data.encoding.encode_options import ActorPool, EncodeOptions
from pipelines.data.encoding.encode_plan import Part, PromptTask
from pipelines.data.shards.rejection import Reason, join_reason, split_reason
from pipelines.data.shards.schema import (
    CAPTION,
    LATENTS,
    SAMPLE_ID,
    TEXT_EMBEDS,
    VIDEO,
    DTypeName,
)
from pipelines.data.stream import window
from pipelines.data.stream.ray_stream import TASK, WINDOW, fault_in, lines_dataset, read_windows
from pipelines.data.stream.source import Source
from pipelines.data.stream.window_decoding import BUCKET
from sgmd_core.collector import paused_collector
from workers.models.families import modules_of

PART = "part"
ROW = "row"
PIXELS = "pixels"
REASON = "reason"
DETAIL = "detail"

_BATCH_BYTES = 64 * 2**20
_MAX_BATCH = 16
# Less than an encoder's: stages of equal needs would be fused into one process, in which decoding
# and encoding wait for each other.
_DECODE_CPUS = 0.9

PROMPTS = -1
"""Number of the part whose lines are prompts, and rows of no shard."""

SERVER_FAILED = "server_failed"
"""Reason of a line that stands for no row, except for an error to be raised where it arrives."""

_DECODED = pa.schema(
    [
        (PART, pa.int64()),
        (ROW, pa.int64()),
        (SAMPLE_ID, pa.string()),
        (CAPTION, pa.string()),
        (PIXELS, pa.large_binary()),
        (BUCKET, pa.int64()),
        (REASON, pa.string()),
        (DETAIL, pa.string()),
    ]
)


def run_encoding(
    source: Source,
    model: str,
    options: EncodeOptions,
    parts: Sequence[Part],
    prompts: Sequence[str] = (),
) -> Generator[dict[str, Any]]:
    """Encodes some parts with Ray Data; close it where it is not read to its end.

    Args:
        source: What is wanted of each row.
        model: Diffusers folder.
        options: What is made, and with how many actors.
        parts: What to encode.
        prompts: Texts to be embedded besides.

    Yields:
        The prompts as rows of the part `PROMPTS`, and every row of every part, in the plan's order,
        with `latents` and `text_embeds` (or with `text_embeds` alone), or with `reason` and
        `detail`; of several sizes with `bucket`, the number of the one that it has.

    Raises:
        ClusterError: Ray does not start, or the cluster is too small for the actors.
    """
    if not parts and not prompts:
        return
    own_cluster = options.address is None and "RAY_ADDRESS" not in os.environ
    # Every actor holds a core; one more than they do is needed, or nothing would ever be read.
    num_actors = sum(pool.size for pool in options.pools)
    needed = options.decoders + num_actors
    num_cpus = max(os.cpu_count() or 1, needed) if own_cluster else None
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    with start_ray(options.address, num_cpus=num_cpus, preload=modules_of(model)):
        # Ray Data itself would wait without end for what the cluster does not have.
        require_cpus(1 + num_actors, f"encoding {source.url}")
        require_gpus(sum(pool.size * pool.gpus for pool in options.pools), f"encoding {source.url}")
        rows = _dataset(source, model, options, parts, prompts)
        blocks = iter(rows.iter_batches(batch_size=None, batch_format="pyarrow"))
        # Ended before Ray is: what is left of it would start another Ray, or wait without end.
        with closing(cast("Generator[pa.Table]", blocks)):
            for block in blocks:
                yield from cast("pa.Table", block).to_pylist()


def _dataset(
    source: Source,
    model: str,
    options: EncodeOptions,
    parts: Sequence[Part],
    prompts: Sequence[str],
) -> ray.data.Dataset:
    """The prompts and the parts on their way through the stages; nothing runs yet."""
    asked = [PromptTask(tuple(prompts))] if prompts else []
    stages: list[tuple[type, ActorPool, dict[str, Any]]] = []
    batch_size = _MAX_BATCH
    if not options.text_only:
        shapes = options.pixel_shapes
        batch_size = max(1, min(_MAX_BATCH, _BATCH_BYTES // max(map(prod, shapes))))
        stages.append((EncodeVideos, options.videos, {"pixel_shapes": shapes}))
    stages.append((EncodeCaptions, options.captions, {"text_length": options.text_length}))
    tasks = [*asked, *parts]
    rows = lines_dataset(tasks, read_and_decode, source, options.decoders, _DECODE_CPUS)
    for stage, pool, arguments in stages:
        rows = rows.map_batches(
            stage,
            batch_size=batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=pool.size),
            fn_constructor_kwargs={
                "model": model,
                "dtype": options.dtype,
                "num_threads": 1,
                **arguments,
            },
            num_cpus=1,
            num_gpus=pool.gpus or None,
        )
    return rows


def read_and_decode(tasks: pa.Table, source: Source) -> Iterator[pa.Table]:
    """Reads parts row group by row group, and decodes their videos if clips are wanted.

    Args:
        tasks: Pickled parts, and prompts, in the column `task`.
        source: What is wanted of each row.

    Yields:
        Lines of rows: with `pixels` if clips are wanted, or with `reason` and `detail`.
    """
    # A reader a task: what a shard's end says may change from one command to the next.
    reader = source.open_reader()
    for packed in tasks.column(TASK):
        task: Part | PromptTask = pickle.loads(packed.as_py())
        if isinstance(task, PromptTask):
            rows = [{PART: PROMPTS, ROW: row, CAPTION: text} for row, text in enumerate(task.texts)]
            yield pa.Table.from_pylist(rows, schema=_DECODED)
            continue
        for lines in read_windows(reader, source, enumerate(task.windows)):
            yield _of_part(task, lines)


def _of_part(part: Part, lines: pa.Table) -> pa.Table:
    """Lines of one row group as rows of a part; always as many as the plan promises."""
    error = fault_in(lines)
    if error is not None:
        words = json.dumps([str(argument) for argument in error.args])
        row = {PART: part.number, ROW: -1, REASON: SERVER_FAILED, DETAIL: words}
        return pa.Table.from_pylist([row], schema=_DECODED)
    group = part.groups[lines.column(WINDOW)[0].as_py()]
    reasons = lines.column(REASON).to_pylist()
    rows = (lines.column(window.ROW).to_numpy() + group.first_row).tolist()
    if lines.column(window.ROW)[0].as_py() == window.WHOLE_GROUP:
        rows = range(group.first_row, group.first_row + group.num_rows)
        lines = lines.take([0] * group.num_rows)
        reasons = [join_reason(Reason.UNREADABLE_ROWS, reasons[0])] * group.num_rows
    split = [(None, "") if reason is None else split_reason(reason) for reason in reasons]
    ids = zip(lines.column(SAMPLE_ID).to_pylist(), split, strict=True)
    size = lines.num_rows
    has_pixels = VIDEO in lines.column_names
    columns = {
        PART: [part.number] * size,
        ROW: rows,
        SAMPLE_ID: [None if reason == Reason.NO_ID else name for name, (reason, _) in ids],
        CAPTION: lines.column(CAPTION),
        PIXELS: lines.column(VIDEO).cast(pa.large_binary()) if has_pixels else pa.nulls(size),
        BUCKET: lines.column(BUCKET) if BUCKET in lines.column_names else [0] * size,
        REASON: [reason for reason, _ in split],
        DETAIL: [detail for _, detail in split],
    }
    return pa.table(columns).cast(_DECODED)


class EncodeVideos:
    """Pixels to latents, in an actor that holds the autoencoder.

    Args:
        model: Diffusers folder.
        pixel_shapes: (frames, height, width, 3) of the clips of each bucket.
        dtype: Type in which latents are stored.
        num_threads: Threads of the network on a CPU.
    """

    def __init__(
        self,
        model: str,
        pixel_shapes: Sequence[tuple[int, int, int, int]],
        dtype: DTypeName,
        num_threads: int,
    ) -> None:
        # Processes that decode import this file too, and have no room for networks.
        with paused_collector():
            from workers.build import build_video_encoder

        self._encoder = build_video_encoder(model, num_threads)
        self._shapes = pixel_shapes
        self._dtype: DTypeName = dtype

    def __call__(self, lines: pa.Table) -> pa.Table:
        """Puts the column `latents` in the place of `pixels`."""
        pixels, buckets = lines.column(PIXELS), lines.column(BUCKET).to_pylist()
        latents = [
            self._encode(clip.as_buffer(), bucket)
            for clip, bucket in zip(pixels, buckets, strict=True)
        ]
        return lines.drop_columns([PIXELS]).append_column(LATENTS, pa.array(latents, pa.binary()))

    def _encode(self, pixels: pa.Buffer | None, bucket: int) -> bytes | None:
        from pipelines.data.shards.values import pack_tensor

        if pixels is None:
            return None
        clip = np.frombuffer(pixels, dtype=np.uint8).reshape(self._shapes[bucket])
        return pack_tensor(self._encoder.encode(clip), self._dtype)


class EncodeCaptions:
    """Captions to embeddings, in an actor that holds the text encoder.

    Args:
        model: Diffusers folder.
        text_length: Text positions; longer captions are cut.
        dtype: Type in which embeddings are stored.
        num_threads: Threads of the network on a CPU.
    """

    def __init__(self, model: str, text_length: int, dtype: DTypeName, num_threads: int) -> None:
        with paused_collector():
            from workers.build import build_text_encoder, encoder_dtype
            from workers.settings import ModelSettings

        settings = ModelSettings(model, text_length, encoder_dtype=encoder_dtype())
        self._encoder = build_text_encoder(settings, num_threads)
        self._dtype: DTypeName = dtype

    def __call__(self, lines: pa.Table) -> pa.Table:
        """Adds the column `text_embeds`."""
        captions, reasons = (lines.column(name).to_pylist() for name in (CAPTION, REASON))
        embeds = [
            self._embed(caption) if reason is None else None
            for caption, reason in zip(captions, reasons, strict=True)
        ]
        return lines.append_column(TEXT_EMBEDS, pa.array(embeds, pa.binary()))

    def _embed(self, caption: str) -> bytes:
        from pipelines.data.shards.values import pack_text

        return pack_text(self._encoder.encode([caption], [0]).text[0], self._dtype)
