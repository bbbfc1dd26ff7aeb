"""The feed: one stream over a folder, pulled batch by batch, from any place on.

    windows, in order -> rejects set apart, second uses of an id too -> Feed.take(n) -> Batch

A batch is cut from one stream, so neither the number of ranks nor that of micro-batches decides
which rows come. Ids and captions are Arrow columns until a batch is asked for its strings. What it
says of itself is small; embeddings stay here until a role asks for them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from numpy.typing import NDArray

from pipelines.data.making.caption_file import require_unchanged
from pipelines.data.shards.rejection import Reason, Rejection, split_reason
from pipelines.data.shards.schema import (
    LATENTS,
    REQUIRED_COLUMNS,
    SAMPLE_ID,
    TEXT_EMBEDS,
    VIDEO,
    Encoding,
    caption_schema,
    join_names,
)
from pipelines.data.shards.seen import SeenIds, digest_ids
from pipelines.data.shards.values import unpack_all_latents, unpack_text
from pipelines.data.stream.batch import Batch, BatchFeed
from pipelines.data.stream.catalogue import Catalogue
from pipelines.data.stream.plan import Cursor, ShuffleSettings
from pipelines.data.stream.quarantine import REPEATS, Tally
from pipelines.data.stream.ray_stream import RayDataReader, ReadAheadSettings
from pipelines.data.stream.source import Source
from pipelines.data.stream.stream import Planned, first_rows, plan_windows, read_in_process
from pipelines.data.stream.window import GROUP, PLACE, REASON, ROW, WHOLE_GROUP
from sgmd_core.errors import DataError
from sgmd_core.types import Latents, Text

# Arrow makes these functions while it is imported, where a type checker does not see them.
pc: Any = pyarrow.compute


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """Settings of a stream of samples: its source, order and limits.

    Attributes:
        source: The folder, and the columns to read.
        seed: Seed of the order; None: rows come as they are stored.
        shuffle: Sizes of the blocks that are shuffled.
        max_bad_fraction: Share of the rows that may be unusable; above it the stream ends with an
            error.
        ahead: Read with Ray Data, as far ahead as this says; None reads in this process.
        weight: Weight of this set among several.
        further: The other sets, with their weights; see `pipelines.data.stream.mixing`.
        ends: Rows beyond those that are announced to the feed are not even read.
        distinct: A row whose id an earlier one of its epoch has is left out.
    """

    source: Source
    seed: int | None
    shuffle: ShuffleSettings = ShuffleSettings()
    max_bad_fraction: float = 0.01
    ahead: ReadAheadSettings | None = None
    weight: float = 1.0
    further: tuple[tuple[Source, float], ...] = ()
    ends: bool = False
    distinct: bool = True

    @property
    def of_each_set(self) -> tuple[Self, ...]:
        """Settings of the stream of each set alone."""
        alone = replace(self, further=())
        return (alone, *(replace(alone, source=source) for source, _ in self.further))


@dataclass(frozen=True, slots=True)
class FeedProgress:
    """Position of a run in its data, and its knowledge of them.

    Attributes:
        cursor: The row that comes next.
        rows: Rows handed out so far.
        catalogue: Lines that the run has written down about its folder.
        rejects: What has been left out so far.
        used_ids: Ids that were handed out in the cursor's epoch.
        further: The same of other sets.
    """

    cursor: Cursor = Cursor()
    rows: int = 0
    catalogue: tuple[Mapping[str, Any], ...] = ()
    rejects: tuple[Rejection, ...] = ()
    used_ids: tuple[str, ...] = ()
    further: tuple["FeedProgress", ...] = ()

    @property
    def of_each_set(self) -> tuple["FeedProgress", ...]:
        """Progress in each set alone."""
        return replace(self, further=()), *self.further


class Feed(BatchFeed):
    """Batches of one set of shards, in a seeded order, from any position on.

    `take` returns the next rows and the position after them. With `settings.ahead`, Ray Data reads
    from now on: close the feed (or use it in `with`) before Ray is shut down.

    Args:
        settings: Source, order and limits of the stream.
        progress: Position to start from; `FeedProgress()` is the beginning.
        num_rows: Rows that the rest of the run will take. More may be taken, unless
            `settings.ends`.
    """

    def __init__(self, settings: StreamSettings, progress: FeedProgress, num_rows: int) -> None:
        source = settings.source
        place = source.open()
        require_unchanged(source.url, place.root, progress.catalogue)
        catalogue = Catalogue(
            place.filesystem,
            place.root,
            settings.shuffle.chapter_shards,
            source.s3,
            progress.catalogue,
            place.only,
        )
        source = replace(source, settled=catalogue.settle_names(place.names))
        plan = plan_windows(catalogue, settings.seed, settings.shuffle, progress.cursor)
        plan = first_rows(plan, num_rows) if settings.ends else plan
        self._windows = (
            read_in_process(plan, source, num_rows)
            if settings.ahead is None or not settings.ahead.readers
            else RayDataReader(plan, source, settings.ahead, num_rows)
        )
        self._source = source
        self._columns = [*source.columns]
        self._tally = Tally(settings.max_bad_fraction, progress.rejects)
        self._seen = SeenIds(progress.used_ids)
        self._distinct = settings.distinct
        self._epoch = progress.cursor.epoch
        passes = float(progress.cursor.epoch)
        self._open = _OpenWindow(progress.cursor, (passes, passes), 1)
        self._position = progress.rows
        self._taken = 0
        self._rejects: list[Rejection] = []
        self._notes: list[dict[str, Any]] = []
        self._payloads: dict[int, pa.Table] = {}
        self._stop: DataError | None = None
        self._usable_in_epoch = progress.cursor > Cursor(progress.cursor.epoch)

    def take(
        self, num_rows: int, columns: tuple[str, ...] | None = None, draw: int | None = None
    ) -> Batch:
        """The next `num_rows` usable rows.

        Args:
            num_rows: How many.
            columns: Columns of theirs that will be asked for; None: all that are read.
            draw: Not used: draws choose among several sets, and this feed has one.

        Raises:
            DataError: The server failed, or a whole epoch has no usable row.
        """
        if not num_rows:
            # None of a batch of several sets is of this one.
            return self._batch(caption_schema().empty_table(), {})
        parts: list[pa.Table] = []
        epochs: dict[int, int] = {}
        missing = num_rows
        while missing and self._stop is None:
            if self._open.is_empty:
                self._open_next()
                continue
            part = self._open.take(missing)
            parts.append(part)
            missing -= part.num_rows
            epochs[self._epoch] = epochs.get(self._epoch, 0) + part.num_rows
        if self._stop is not None:
            rows = caption_schema().empty_table()
            return self._batch(rows, {}, stop=tuple(map(str, self._stop.args)))
        rows = pa.concat_tables(parts)
        wanted = self._columns if columns is None else [*columns]
        if wanted:
            self._payloads[self._taken] = rows.select(wanted)
        self._position += num_rows
        return self._batch(rows.select(REQUIRED_COLUMNS), epochs)

    def close(self) -> None:
        """Ends all reading; harmless when repeated."""
        self._windows.close()

    def embeddings(self, number: int) -> Text:
        """Stored embeddings of a batch; see `BatchFeed.embeddings`."""
        stored = self._take_column(number, TEXT_EMBEDS)
        return torch.stack([unpack_text(each.as_py(), self._encoding()).float() for each in stored])

    def latents(self, number: int) -> Latents:
        """Stored latents of a batch; see `BatchFeed.latents`."""
        return unpack_all_latents(self._take_column(number, LATENTS), self._encoding())

    def pixels(self, number: int) -> NDArray[np.uint8]:
        """Decoded clips of a batch, (rows, frames, height, width, 3); frees them."""
        content = join_names(self._take_column(number, VIDEO))
        # A copy: the bytes may be a read-only view into shared memory.
        return content.copy().reshape(-1, *self._source.pixel_shape)

    def _take_column(self, number: int, name: str) -> pa.ChunkedArray:
        """A column of a batch, which is then forgotten; with its last one the batch is."""
        rows = self._payloads.pop(number)
        if rows.num_columns > 1:
            self._payloads[number] = rows.drop_columns([name])
        return rows.column(name)

    def _encoding(self) -> Encoding:
        assert self._source.encoding is not None, "this feed reads nothing encoded"
        return self._source.encoding

    def _batch(
        self, rows: pa.Table, epochs: Mapping[int, int], stop: tuple[str, ...] | None = None
    ) -> Batch:
        rejects, self._rejects = self._rejects, []
        notes, self._notes = self._notes, []
        self._taken += 1
        return Batch(
            number=self._taken - 1,
            rows=rows,
            epochs=tuple(epochs.items()),
            cursor=self._open.cursor,
            position=self._position,
            passes=self._open.passes,
            rejects=tuple(rejects),
            notes=tuple(notes),
            stop=stop,
        )

    def _open_next(self) -> None:
        """Opens the next window: sets rejects apart and keeps the good rows."""
        planned, table = next(self._windows)
        epoch = planned.window.cursor.epoch
        if epoch != self._epoch:
            if not self._usable_in_epoch:
                raise DataError(
                    "streaming the training data",
                    f"no usable row in the whole of epoch {self._epoch}",
                    "rows with an id and a caption",
                    "`sgmd check` says what is wrong with each shard",
                )
            self._seen, self._epoch, self._usable_in_epoch = SeenIds(), epoch, False
        rejects = [*planned.rejects]
        if table.column(REASON).null_count < table.num_rows:
            is_bad = table.column(REASON).is_valid()
            rejects += _rejects(planned, table.filter(is_bad))
            table = table.filter(pc.invert(is_bad))
        good, repeats = self._without_repeats(planned, table) if self._distinct else (table, [])
        rejects += repeats
        window = planned.window
        self._open = _OpenWindow(window.cursor, planned.passes, window.num_rows, good)
        self._usable_in_epoch |= good.num_rows > 0
        self._notes += planned.notes
        new = self._tally.add(rejects)
        self._rejects += new
        if new:
            self._stop = self._tally.verdict(planned.expected_rows, planned.rows_per_shard)

    def _without_repeats(
        self, planned: Planned, good: pa.Table
    ) -> tuple[pa.Table, list[Rejection]]:
        """The rows whose id comes for the first time in this epoch, and the others.

        A row that was a repetition in an earlier epoch is one for good, although another order may
        bring it first: of rows with one id, always the same one is used.
        """
        repeated = self._known_repeats(planned, good)
        fresh = np.flatnonzero(~repeated)
        digests = digest_ids(good.column(SAMPLE_ID))
        repeated[fresh[self._seen.add_digests(digests[fresh])]] = True
        if not repeated.any():
            return good, []
        rejects = list(_repeats(planned, good.filter(pa.array(repeated))))
        return good.filter(pa.array(~repeated)), rejects

    def _known_repeats(self, planned: Planned, good: pa.Table) -> NDArray[np.bool_]:
        """Marks the rows that were repetitions before."""
        repeated = np.zeros(good.num_rows, dtype=bool)
        for number, group in enumerate(planned.window.groups):
            known = self._tally.repeats(group.shard, group.index)
            if known:
                numbers, rows = (good.column(name).to_numpy() for name in (GROUP, ROW))
                repeated |= (numbers == number) & np.isin(rows, list(known))
        return repeated


@dataclass(slots=True)
class _OpenWindow:
    """The usable rows of a window, of which the first `at` are handed out.

    Attributes:
        cursor: The row that comes next.
        span: Passes over the data where the window begins and where it ends.
        num_places: Rows of the window, usable or not.
        good: The usable ones.
        at: How many of them are handed out.
    """

    cursor: Cursor
    span: tuple[float, float]
    num_places: int
    good: pa.Table | None = None
    at: int = 0

    @property
    def is_empty(self) -> bool:
        return self.good is None or self.at == self.good.num_rows

    @property
    def passes(self) -> float:
        begin, end = self.span
        return begin + (end - begin) * self.cursor.row / self.num_places

    def take(self, num_rows: int) -> pa.Table:
        assert self.good is not None
        part = self.good.slice(self.at, num_rows)
        self.at += part.num_rows
        # At its end, what is left of the window is only rows that cannot be used.
        last = part.column(PLACE)[-1].as_py()
        self.cursor = replace(self.cursor, row=self.num_places if self.is_empty else last + 1)
        return part


def _rejects(planned: Planned, lines: pa.Table) -> Iterator[Rejection]:
    names = (GROUP, ROW, SAMPLE_ID, REASON)
    for line in lines.select(names).to_pylist():
        group = planned.window.groups[line[GROUP]]
        whole = line[ROW] == WHOLE_GROUP
        yield Rejection(
            line[SAMPLE_ID] or "",
            group.shard,
            None if whole else line[ROW],
            *split_reason(line[REASON]),
            group.index,
            group.num_rows if whole else 1,
        )


def _repeats(planned: Planned, lines: pa.Table) -> Iterator[Rejection]:
    for line in lines.select((GROUP, ROW, SAMPLE_ID)).to_pylist():
        group = planned.window.groups[line[GROUP]]
        place = (line[SAMPLE_ID], group.shard, line[ROW])
        yield Rejection(*place, Reason.DUPLICATE_ID, REPEATS, group.index)
