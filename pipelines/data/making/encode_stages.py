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
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from math import prod
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray.data

from cluster.ray.topology import require_cpus, require_gpus
from cluster.runtime import start_ray
from pipelines.data.clips.clip_decoding import ClipDecoder
from pipelines.data.clips.clip_errors import ClipError
from pipelines.data.clips.guarded_process import Died, decoding_process
from pipelines.data.clips.hang_guard import MAX_HANG_S
from pipelines.data.making.caption_file import open_set
from pipelines.data.making.encode_options import ActorPool, EncodeOptions
from pipelines.data.making.encode_plan import Part, PromptTask, SourceGroup
from pipelines.data.shards.columns import ColumnNames
from pipelines.data.shards.filesystem import S3Settings
from pipelines.data.shards.parquet import RowGroupReader
from pipelines.data.shards.reading import Fault
from pipelines.data.shards.rejection import Reason, split_reason
from pipelines.data.shards.row_checks import check_rows
from pipelines.data.shards.schema import (
    CAPTION,
    LATENTS,
    REQUIRED_COLUMNS,
    SAMPLE_ID,
    TEXT_EMBEDS,
    VIDEO,
    DTypeName,
    faults_in,
)
from pipelines.media.video import Pixels
from sgmd_core.collector import paused_collector
from sgmd_core.errors import DataError
from workers.models.families import modules_of

TASK = "task"
PART = "part"
ROW = "row"
PIXELS = "pixels"
REASON = "reason"
DETAIL = "detail"

CLIP_COLUMNS = (*REQUIRED_COLUMNS, VIDEO)
"""What is read of a source of clips."""

_BATCH_BYTES = 64 * 2**20
_MAX_BATCH = 16
# Less than an encoder's: stages of equal needs would be fused into one process, in which decoding
# and encoding wait for each other.
_DECODE_CPUS = 0.9

PROMPTS = -1
"""Number of the part whose lines are prompts, and rows of no shard."""

SERVER_FAILED = "server_failed"
"""Reason of a line that stands for no row, but for an error to be raised where it arrives."""

_DECODED = pa.schema(
    [
        (PART, pa.int64()),
        (ROW, pa.int64()),
        (SAMPLE_ID, pa.string()),
        (CAPTION, pa.string()),
        (PIXELS, pa.large_binary()),
        (REASON, pa.string()),
        (DETAIL, pa.string()),
    ]
)


def run_encoding(
    src: str,
    model: str,
    options: EncodeOptions,
    parts: Sequence[Part],
    prompts: Sequence[str] = (),
) -> Generator[dict[str, Any]]:
    """Encodes some parts with Ray Data; close it where it is not read to its end.

    Args:
        src: Address of the source.
        model: Diffusers folder.
        options: What is made, and with how many actors.
        parts: What to encode.
        prompts: Texts to be embedded besides.

    Yields:
        The prompts as rows of the part `PROMPTS`, and every row of every part, in the plan's order,
        with `latents` and `text_embeds` (or with `text_embeds` alone), or with `reason` and
        `detail`.

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
        require_cpus(1 + num_actors, f"encoding {src}")
        require_gpus(sum(pool.size * pool.gpus for pool in options.pools), f"encoding {src}")
        rows = _dataset(src, model, options, parts, prompts)
        blocks = iter(rows.iter_batches(batch_size=None, batch_format="pyarrow"))
        # Ended before Ray is: what is left of it would start another Ray, or wait without end.
        with closing(cast("Generator[pa.Table]", blocks)):
            for block in blocks:
                yield from cast("pa.Table", block).to_pylist()


def _dataset(
    src: str, model: str, options: EncodeOptions, parts: Sequence[Part], prompts: Sequence[str]
) -> ray.data.Dataset:
    """The prompts and the parts on their way through the stages; nothing runs yet."""
    asked = [PromptTask(tuple(prompts))] if prompts else []
    tasks = [{TASK: pickle.dumps(task)} for task in (*asked, *parts)]
    stages: list[tuple[type, ActorPool, dict[str, Any]]] = []
    batch_size = _MAX_BATCH
    if not options.text_only:
        pixel_shape = options.pixel_shape
        batch_size = max(1, min(_MAX_BATCH, _BATCH_BYTES // prod(pixel_shape)))
        stages.append((EncodeVideos, options.videos, {"pixel_shape": pixel_shape}))
    stages.append((EncodeCaptions, options.captions, {"text_length": options.text_length}))
    rows = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        cast("Any", read_and_decode),  # Ray's stubs know no further arguments
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={
            "url": src,
            "decode": None if options.text_only else ClipDecoder(options.wanted, options.limits),
            "max_caption_chars": options.max_caption_chars,
            "names": options.names,
            "settled": options.settled,
            "max_hang_s": options.max_hang_s,
        },
        num_cpus=_DECODE_CPUS,
        compute=ray.data.TaskPoolStrategy(size=options.decoders),
    )
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
    rows.context.execution_options.preserve_order = True
    rows.context.enable_progress_bars = False
    return rows


def read_and_decode(
    tasks: pa.Table,
    url: str,
    decode: ClipDecoder | None,
    max_caption_chars: int,
    names: ColumnNames = ColumnNames(),
    settled: ColumnNames | None = None,
    max_hang_s: float = MAX_HANG_S,
) -> Iterator[pa.Table]:
    """Reads parts row group by row group, and decodes clip by clip.

    Args:
        tasks: Pickled parts, and prompts, in the column `task`.
        url: Address of the source; a file of captions becomes shards on this machine too.
        decode: Decodes the videos; None reads captions and no videos.
        max_caption_chars: A longer caption is bad.
        names: Names that the caller gives for the source's columns.
        settled: Names that its first shards have.
        max_hang_s: Time that one call of the decoder may take; 0: no limit.

    Yields:
        One line a row: with `pixels` if clips are wanted, or with `reason` and `detail`.
    """
    place = open_set(url, names=names, probe=False)
    # A reader a task: opening Arrow's client would cost more than it saves.
    reader = RowGroupReader(
        place.filesystem, place.root, S3Settings(native_reads=False), settled or place.names
    )
    columns = REQUIRED_COLUMNS if decode is None else CLIP_COLUMNS
    apply = decode
    if decode is not None and max_hang_s:
        apply = partial(decoding_process(max_hang_s).apply, decode)
    for packed in tasks.column(TASK):
        part: Part | PromptTask = pickle.loads(packed.as_py())
        if isinstance(part, PromptTask):
            yield from (_line(PROMPTS, row, None, text) for row, text in enumerate(part.texts))
            continue
        for group in part.groups:
            try:
                where = (part.shard, part.num_bytes, group.index)
                table = reader.read([where], columns)[0]
                yield from _decoded(part, group, table, apply, max_caption_chars)
            except DataError as error:
                words = json.dumps([str(argument) for argument in error.args])
                yield _line(part.number, -1, None, None, reason=SERVER_FAILED, detail=words)
                return


def _decoded(
    part: Part,
    group: SourceGroup,
    table: pa.Table | Fault,
    decode: Callable[[bytes], Pixels | Died[bytes]] | None,
    max_caption_chars: int,
) -> Iterator[pa.Table]:
    """The lines of one row group; always as many as the plan promises."""
    rows = range(group.first_row, group.first_row + group.num_rows)
    if not isinstance(table, Fault) and table.num_rows != group.num_rows:
        table = Fault(f"{table.num_rows} rows instead of {group.num_rows}")
    if isinstance(table, Fault):
        for row in rows:
            yield _line(
                part.number, row, None, None, reason=Reason.UNREADABLE_ROWS, detail=table.reason
            )
        return
    texts = {name: table[name].cast(pa.string()) for name in REQUIRED_COLUMNS}
    known = faults_in(table.schema, group.index)
    texts, reasons = check_rows(texts, max_caption_chars, known)
    for place, row in enumerate(rows):
        name, caption = (texts[column][place].as_py() for column in REQUIRED_COLUMNS)
        if place in reasons:
            reason, detail = split_reason(reasons[place])
            name = None if reason == Reason.NO_ID else name
            yield _line(part.number, row, name, caption or "", reason=reason, detail=detail)
        elif decode is None:
            yield _line(part.number, row, name, caption)
        elif not (video := table[VIDEO][place].as_py()):
            yield _line(part.number, row, name, caption, reason=Reason.MISSING_VIDEO)
        else:
            try:
                found = decode(video)
            except ClipError as error:
                reason, detail = error.fault, error.in_short
                yield _line(part.number, row, name, caption, reason=reason, detail=detail)
                continue
            if isinstance(found, Died):
                words = found.in_words
                yield _line(part.number, row, name, caption, reason=found.reason, detail=words)
            else:
                yield _line(part.number, row, name, caption, pixels=found.tobytes())


def _line(
    part: int,
    row: int,
    sample_id: str | None,
    caption: str | None,
    *,
    pixels: bytes | None = None,
    reason: str | None = None,
    detail: str = "",
) -> pa.Table:
    line = {
        PART: part,
        ROW: row,
        SAMPLE_ID: sample_id,
        CAPTION: caption,
        PIXELS: pixels,
        REASON: None if reason is None else str(reason),
        DETAIL: detail,
    }
    return pa.Table.from_pylist([line], schema=_DECODED)


class EncodeVideos:
    """Pixels to latents, in an actor that holds the autoencoder.

    Args:
        model: Diffusers folder.
        pixel_shape: (frames, height, width, 3) of every clip.
        dtype: Type in which latents are stored.
        num_threads: Threads of the network on a CPU.
    """

    def __init__(
        self, model: str, pixel_shape: tuple[int, int, int, int], dtype: DTypeName, num_threads: int
    ) -> None:
        # Processes that decode import this file too, and have no room for networks.
        with paused_collector():
            from workers.build import build_video_encoder

        self._encoder = build_video_encoder(model, num_threads)
        self._shape = pixel_shape
        self._dtype: DTypeName = dtype

    def __call__(self, lines: pa.Table) -> pa.Table:
        """Puts the column `latents` in the place of `pixels`."""
        latents = [self._encode(pixels.as_buffer()) for pixels in lines.column(PIXELS)]
        return lines.drop_columns([PIXELS]).append_column(LATENTS, pa.array(latents, pa.binary()))

    def _encode(self, pixels: pa.Buffer | None) -> bytes | None:
        from pipelines.data.shards.values import pack

        if pixels is None:
            return None
        clip = np.frombuffer(pixels, dtype=np.uint8).reshape(self._shape)
        return pack(self._encoder.encode(clip), self._dtype)


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
