"""Checks one row group in a worker of `sgmd check`: looks at every row, decodes some of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.data.clips.clip_decoding import ClipFacts, read_facts
from pipelines.data.clips.clip_errors import ClipError
from pipelines.data.clips.clip_format import DEFAULT_LIMITS, ClipLimits
from pipelines.data.making.caption_rule import caption_faults, split_reason
from pipelines.data.making.rejections import Reason, Rejection
from pipelines.data.shards.filesystem import S3Settings, open_folder
from pipelines.data.shards.parquet import Fault, RowGroupReader
from pipelines.data.shards.schema import (
    CAPTION,
    LATENTS,
    REQUIRED_COLUMNS,
    SAMPLE_ID,
    TEXT_EMBEDS,
    VIDEO,
    Encoding,
    ShardKind,
    faults_in,
)
from pipelines.data.shards.text import decode_utf8
from pipelines.data.shards.values import unpack_latents, unpack_text
from sgmd_core.errors import DataError


@dataclass(frozen=True, slots=True)
class GroupTask:
    """A row group to be looked at.

    Attributes:
        url: The folder.
        shard: Path of the shard in it.
        num_bytes: Size of the shard.
        index: Number of the row group.
        first_row: Number of its first row within the shard.
        num_rows: Rows that the footer promises.
        kind: What the shard holds.
        encoding: How its values are to be read, in an encoded shard.
        tried: Rows (within the group) whose video or values are decoded.
        max_caption_chars: A longer caption is bad.
        limits: What a video may ask for.
    """

    url: str
    shard: str
    num_bytes: int
    index: int
    first_row: int
    num_rows: int
    kind: ShardKind
    encoding: Encoding | None
    tried: tuple[int, ...]
    max_caption_chars: int
    limits: ClipLimits = DEFAULT_LIMITS


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """Content of a row group.

    Attributes:
        shard: Path of the shard.
        rows: Number of each row that could be read, within the shard.
        sample_ids: Their ids; "" where there is none.
        captions: Their captions; "" where there is none.
        clips: What the videos hold that were decoded.
        num_tried: Rows whose video or values were decoded.
        rejections: What is wrong; a row group that cannot be read counts row by row.
    """

    shard: str
    rows: tuple[int, ...]
    sample_ids: tuple[str, ...]
    captions: tuple[str, ...]
    clips: tuple[ClipFacts, ...]
    num_tried: int
    rejections: tuple[Rejection, ...]


def check_group(task: GroupTask) -> GroupFacts:
    """Reads a row group and checks its rows.

    Raises:
        DataError: the storage failed, which is not the data's fault.
    """
    columns = [*REQUIRED_COLUMNS, *(_values(task.kind) if task.tried else ())]
    filesystem, root = open_folder(task.url, probe=False)
    # A reader a row group, because the folder may change between two checks.
    reader = RowGroupReader(filesystem, root, S3Settings(native_reads=False))
    table = reader.read([(task.shard, task.num_bytes, task.index)], columns)[0]
    if isinstance(table, Fault):
        unreadable = (
            Rejection("", task.shard, task.first_row + row, Reason.UNREADABLE_ROWS, table.reason)
            for row in range(task.num_rows)
        )
        return GroupFacts(task.shard, (), (), (), (), 0, tuple(unreadable))
    named, unreadable_ids = decode_utf8(table[SAMPLE_ID])
    told, bad_captions = caption_faults(table[CAPTION], task.max_caption_chars)
    ids, captions = ([text or "" for text in column.to_pylist()] for column in (named, told))
    rejections: dict[int, Rejection] = {}
    clips: list[ClipFacts] = []

    def reject(row: int, reason: str, detail: str) -> None:
        place = task.first_row + row
        rejections.setdefault(row, Rejection(ids[row], task.shard, place, reason, detail))

    for row, fault in faults_in(table.schema, task.index).items():
        reject(row, *split_reason(fault))
    for row, name in enumerate(ids):
        if not name or unreadable_ids[row].as_py():
            reject(row, Reason.NO_ID, "no UTF-8" if name else "")
        if row in bad_captions:
            reject(row, *bad_captions[row])
    for row in task.tried:
        values = [table[name][row].as_py() for name in _values(task.kind)]
        try:
            if task.kind is ShardKind.VIDEO:
                clips.append(read_facts(values[0] or b"", task.limits))
            elif task.encoding is not None:
                _try_values(values[0], values[1], task.encoding)
        except ClipError as error:
            reject(row, error.fault, error.found)
        except DataError as error:
            reject(row, Reason.BAD_ENCODING, f"{error.found}; expected {error.expected}")
    rows = range(task.first_row, task.first_row + len(ids))
    return GroupFacts(
        task.shard,
        tuple(rows),
        tuple(ids),
        tuple(captions),
        tuple(clips),
        len(task.tried),
        tuple(rejections[row] for row in sorted(rejections)),
    )


def choose_rows(num_rows: int, sample: int | None, seed: int) -> NDArray[np.int64]:
    """Chooses the rows to decode: all, or as many as wanted, drawn by seed; in order."""
    if sample is None or sample >= num_rows:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(seed).choice(num_rows, size=sample, replace=False))


def _values(kind: ShardKind) -> tuple[str, ...]:
    """The columns whose bytes are decoded."""
    columns = {
        ShardKind.VIDEO: (VIDEO,),
        ShardKind.ENCODED: (LATENTS, TEXT_EMBEDS),
        ShardKind.CAPTIONS: (),
    }
    return columns[kind]


def _try_values(latents: Any, text: Any, encoding: Encoding) -> None:  # noqa: ANN401 - of a file
    """Checks shapes and that all numbers are finite."""
    for name, values in (
        (LATENTS, unpack_latents(latents or b"", encoding)),
        (TEXT_EMBEDS, unpack_text(text or b"", encoding)),
    ):
        if not torch.isfinite(values).all():
            raise DataError(
                f"reading {name}", f"{name} with numbers that are not finite", "numbers"
            )
