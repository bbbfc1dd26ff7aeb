"""Checks one row group in a worker of `sgmd check`: looks at every row, decodes some of them.

Rows are read some at a time, and of each a few numbers are kept, so memory depends neither on how
long captions are nor, except for some twenty bytes a row, on how many rows a group has.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from numpy.typing import NDArray

from pipelines.data.clips.clip_decoding import ClipFacts, read_facts
from pipelines.data.clips.clip_errors import ClipError
from pipelines.data.clips.clip_format import DEFAULT_LIMITS, ClipLimits
from pipelines.data.clips.guarded_process import Died, GuardedProcess
from pipelines.data.shards.batches import Rows, read_batches
from pipelines.data.shards.columns import ColumnNames
from pipelines.data.shards.filesystem import open_folder
from pipelines.data.shards.reading import Fault
from pipelines.data.shards.rejection import Reason, Rejection, split_reason
from pipelines.data.shards.row_checks import check_rows
from pipelines.data.shards.schema import (
    LATENTS,
    REQUIRED_COLUMNS,
    TEXT_EMBEDS,
    VIDEO,
    Encoding,
    ShardKind,
    faults_in,
)
from pipelines.data.shards.seen import digest_ids
from pipelines.data.shards.values import unpack_latents, unpack_text
from sgmd_core.errors import DataError

# Arrow makes these functions while it is imported, where a type checker does not see them.
pc: Any = pyarrow.compute

NUM_EXAMPLES = 10
"""Bad rows that are named."""

CountTokens = Callable[[Sequence[str]], list[int]]


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
        tried: Rows (within the group) whose video or values are decoded, in order.
        max_caption_chars: A longer caption is bad.
        limits: What a video may ask for.
        names: Names of the set's columns.
        count_tokens: Lengths of captions in tokens; None leaves them out.
    """

    url: str
    shard: str
    num_bytes: int
    index: int
    first_row: int
    num_rows: int
    kind: ShardKind
    encoding: Encoding | None
    tried: NDArray[np.int64]
    max_caption_chars: int
    limits: ClipLimits = DEFAULT_LIMITS
    names: ColumnNames = ColumnNames()
    count_tokens: CountTokens | None = None


@dataclass(frozen=True, slots=True)
class BadRows:
    """Rows of one shard that cannot be used.

    Attributes:
        rows: Their numbers within the shard, in order.
        reasons: How many for each reason.
        examples: The first `NUM_EXAMPLES` of them.
    """

    rows: NDArray[np.int64]
    reasons: Counter[str]
    examples: tuple[Rejection, ...]


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """Content of a row group, in some numbers a row.

    Attributes:
        shard: Path of the shard.
        first_row: Number of the first row within the shard.
        ids: Digest of each id; see `digest_ids`.
        has_id: Which rows have one.
        captions: Digest of each caption, "" where there is none.
        characters: Length of each caption.
        tokens: The same in tokens; empty if not counted.
        clips: What the videos hold that were decoded.
        num_tried: Rows whose video or values were decoded.
        bad: What is wrong; a row group that cannot be read counts row by row, and has no ids.
    """

    shard: str
    first_row: int
    ids: NDArray[np.uint64]
    has_id: NDArray[np.bool_]
    captions: NDArray[np.uint64]
    characters: NDArray[np.int32]
    tokens: NDArray[np.int32]
    clips: tuple[ClipFacts, ...]
    num_tried: int
    bad: BadRows


def check_group(task: GroupTask, process: GuardedProcess | None = None) -> GroupFacts:
    """Reads a row group and checks its rows.

    Args:
        task: The row group.
        process: Decodes its videos; None: this process does.

    Raises:
        DataError: the storage failed, which is not the data's fault.
    """
    columns = [*REQUIRED_COLUMNS, *(_values(task.kind) if len(task.tried) else ())]
    filesystem, root = open_folder(task.url, probe=False)
    look = _Look(task, process)
    group = (task.shard, task.num_bytes, task.index)
    for rows in read_batches(filesystem, root, group, columns, task.names):
        if isinstance(rows, Fault):
            return nothing_read(task, Reason.UNREADABLE_ROWS, rows.reason)
        look.add(rows)
    return look.facts()


def check_group_apart(task: GroupTask, max_hang_s: float) -> GroupFacts:
    """Checks a row group as `check_group` does, and loses only rows to the decoder.

    Each video is decoded in a process that may be lost. That is slower, so it is for row groups
    whose decoding has ended a process.

    Args:
        task: The row group.
        max_hang_s: Time that one call of the decoder may take; 0: no limit.

    Raises:
        DataError: the storage failed, or the other process does not start.
    """
    with closing(GuardedProcess(max_hang_s, tries=1)) as process:
        return check_group(task, process)


def nothing_read(task: GroupTask, reason: str, detail: str) -> GroupFacts:
    """Facts of a row group of which no row can be used, for one reason."""
    rows = task.first_row + np.arange(task.num_rows)
    examples = (Rejection("", task.shard, int(row), reason, detail) for row in rows[:NUM_EXAMPLES])
    bad = BadRows(rows, Counter({str(reason): task.num_rows}), tuple(examples))
    return replace(_Look(task, None).facts(), num_tried=0, bad=bad)


def choose_rows(num_rows: int, sample: int | None, seed: int) -> NDArray[np.int64]:
    """Chooses the rows to decode: all, or as many as wanted, drawn by seed; in order."""
    if sample is None or sample >= num_rows:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(seed).choice(num_rows, size=sample, replace=False))


@dataclass(slots=True)
class _Look:
    """Adds up what batches of a row group hold; videos are decoded in the process, if any."""

    task: GroupTask
    process: GuardedProcess | None
    ids: list[NDArray[np.uint64]] = field(default_factory=list)
    has_id: list[NDArray[np.bool_]] = field(default_factory=list)
    captions: list[NDArray[np.uint64]] = field(default_factory=list)
    characters: list[NDArray[np.int32]] = field(default_factory=list)
    tokens: list[NDArray[np.int32]] = field(default_factory=list)
    clips: list[ClipFacts] = field(default_factory=list)
    bad: list[NDArray[np.int64]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[Rejection] = field(default_factory=list)

    def add(self, rows: Rows) -> None:
        task, table = self.task, rows.table
        faults_of_set = faults_in(table.schema, task.index)
        known = {row - rows.first: why for row, why in faults_of_set.items() if row >= rows.first}
        columns = {name: table[name].cast(pa.string()) for name in REQUIRED_COLUMNS}
        columns, reasons = check_rows(columns, task.max_caption_chars, known)
        named, texts = (pc.fill_null(columns[name], "") for name in REQUIRED_COLUMNS)
        has_id = np.asarray(pc.not_equal(named, ""))
        faults = {row: split_reason(reason) for row, reason in reasons.items()}
        for row, fault in self._try_rows(rows, faults):
            faults.setdefault(row, fault)
        self.ids.append(digest_ids(named))
        self.has_id.append(has_id)
        self.captions.append(digest_ids(texts))
        self.characters.append(np.asarray(pc.utf8_length(texts), dtype=np.int32))
        if task.count_tokens is not None:
            lengths = task.count_tokens(texts.to_pylist()) if len(texts) else []
            self.tokens.append(np.asarray(lengths, dtype=np.int32))
        self._reject(rows, faults, named)

    def facts(self) -> GroupFacts:
        return GroupFacts(
            self.task.shard,
            self.task.first_row,
            ids=np.concatenate([np.zeros(0, np.uint64), *self.ids]),
            has_id=np.concatenate([np.zeros(0, np.bool_), *self.has_id]),
            captions=np.concatenate([np.zeros(0, np.uint64), *self.captions]),
            characters=np.concatenate([np.zeros(0, np.int32), *self.characters]),
            tokens=np.concatenate([np.zeros(0, np.int32), *self.tokens]),
            clips=tuple(self.clips),
            num_tried=len(self.task.tried),
            bad=BadRows(
                np.concatenate([np.zeros(0, np.int64), *self.bad]),
                self.reasons,
                tuple(self.examples),
            ),
        )

    def _try_rows(
        self, rows: Rows, faults: Mapping[int, tuple[str, str]]
    ) -> Iterator[tuple[int, tuple[str, str]]]:
        """Decodes the chosen rows of a batch that have a video; what is wrong with them."""
        task, table = self.task, rows.table
        start, stop = np.searchsorted(task.tried, (rows.first, rows.first + table.num_rows))
        for row in (task.tried[start:stop] - rows.first).tolist():
            if faults.get(row, ("",))[0] == Reason.MISSING_VIDEO:
                continue
            values = {name: table[name][row].as_py() for name in _values(task.kind)}
            if task.kind is ShardKind.VIDEO and not values[VIDEO]:
                yield row, (Reason.MISSING_VIDEO, "")
                continue
            try:
                if task.kind is ShardKind.VIDEO:
                    found = self._read(values[VIDEO])
                    if isinstance(found, Died):
                        yield row, (found.reason, found.in_words)
                    else:
                        self.clips.append(found)
                elif task.encoding is not None:
                    _try_values(values, task.encoding)
            except ClipError as error:
                yield row, (error.fault, error.found)
            except DataError as error:
                yield row, (Reason.BAD_ENCODING, f"{error.found}; expected {error.expected}")

    def _read(self, video: bytes) -> ClipFacts | Died[bytes]:
        if self.process is None:
            return read_facts(video, self.task.limits)
        return self.process.apply(read_facts, video, self.task.limits)

    def _reject(
        self, rows: Rows, faults: Mapping[int, tuple[str, str]], ids: pa.ChunkedArray
    ) -> None:
        first = self.task.first_row + rows.first
        bad = sorted(faults)
        self.bad.append(first + np.asarray(bad, dtype=np.int64))
        self.reasons.update(str(reason) for reason, _ in faults.values())
        for row in bad[: NUM_EXAMPLES - len(self.examples)]:
            name = ids[row].as_py()
            self.examples.append(Rejection(name, self.task.shard, first + row, *faults[row]))


def _values(kind: ShardKind) -> tuple[str, ...]:
    """The columns whose bytes are decoded."""
    columns = {
        ShardKind.VIDEO: (VIDEO,),
        ShardKind.ENCODED: (LATENTS, TEXT_EMBEDS),
        ShardKind.TEXT: (TEXT_EMBEDS,),
        ShardKind.CAPTIONS: (),
    }
    return columns[kind]


def _try_values(stored: Mapping[str, Any], encoding: Encoding) -> None:
    """Checks shapes and that all numbers are finite."""
    for name, content in stored.items():
        unpack = unpack_latents if name == LATENTS else unpack_text
        if not torch.isfinite(unpack(content or b"", encoding)).all():
            raise DataError(
                f"reading {name}", f"{name} with numbers that are not finite", "numbers"
            )
