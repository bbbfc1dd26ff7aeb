"""The stream of a run's windows: planned lazily, handed out in the plan's order.

    catalogue -> windows (endless) -> read, in this process or by Ray Data -> tables, in order

The plan holds the position; reading only executes it, so where and how far ahead windows are read
changes the waiting and not the rows.
"""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pyarrow as pa

from pipelines.data.shards.index import Shard
from pipelines.data.shards.reading import Fault
from pipelines.data.shards.rejection import Rejection
from pipelines.data.stream.catalogue import Catalogue
from pipelines.data.stream.plan import (
    Cursor,
    ShuffleSettings,
    Window,
    chapter_order,
    sections_of,
    windows_of,
)
from pipelines.data.stream.quarantine import summarize_rejects
from pipelines.data.stream.source import Source
from pipelines.data.stream.window import fetch_groups, put_in_order
from pipelines.data.stream.window_decoding import decode_rows
from sgmd_core.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Planned:
    """A window as it comes out of the plan.

    Attributes:
        window: What to read.
        rejects: Shards that turned out to be unusable on the way to it.
        notes: What was learnt about the folder on the way to it; see `Catalogue.take_notes`.
        passes: Passes over the data where it begins and where it ends; whole numbers as long as
            the folder has not been listed to its end.
        expected_rows: Rows of the folder, as far as known by now.
        rows_per_shard: Their mean over the shards.
    """

    window: Window
    rejects: tuple[Rejection, ...]
    notes: tuple[dict[str, Any], ...]
    passes: tuple[float, float]
    expected_rows: float
    rows_per_shard: float


def plan_windows(
    catalogue: Catalogue, seed: int | None, shuffle: ShuffleSettings, start: Cursor = Cursor()
) -> Iterator[Planned]:
    """The endless order of windows from a place on.

    Args:
        catalogue: The folder; asked for no more than is needed.
        seed: The run's seed; None: as stored.
        shuffle: How well rows are mixed.
        start: The row that comes first.

    Raises:
        DataError: The folder cannot be listed or read, or an epoch has no row group to offer.
    """
    epoch = start.epoch
    rejects: list[Rejection] = []
    while True:
        num_windows = 0
        for section in _sections(catalogue, seed, shuffle, epoch, start):
            groups, unusable = catalogue.row_groups(section.shards)
            rejects += unusable
            cut = windows_of(seed, epoch, section.chapter, section.cursor.section, groups, shuffle)
            for place, (chosen, numbers) in enumerate(cut):
                begin = replace(section.cursor, window=place)
                window = Window(max(begin, start), chosen, numbers)
                num_windows += 1
                if replace(begin, row=window.num_rows) <= start:
                    continue
                yield Planned(
                    window,
                    tuple(rejects),
                    tuple(catalogue.take_notes()),
                    section.passes(place, len(cut)),
                    catalogue.expected_rows,
                    catalogue.rows_per_shard,
                )
                rejects.clear()
        # A run that goes on at the end of an epoch may find nothing left of it.
        if not num_windows and start <= Cursor(epoch=epoch):
            raise DataError(
                "streaming the training data",
                f"no usable row group; {summarize_rejects(rejects)}",
                "shards that can be read",
                "`sgmd check` says what is wrong with each shard",
            )
        epoch += 1


def first_rows(plan: Iterator[Planned], num_rows: int) -> Iterator[Planned]:
    """The beginning of a plan, which ends with the last of so many rows."""
    for planned in plan:
        window = planned.window
        if num_rows <= window.num_wanted:
            stop = window.cursor.row + num_rows
            yield replace(planned, window=replace(window, stop=stop))
            return
        num_rows -= window.num_wanted
        yield planned


def read_in_process(
    plan: Iterator[Planned], source: Source, num_rows: int
) -> Generator[tuple[Planned, pa.Table]]:
    """Reads window after window in this process, ahead of the one that is handed out.

    While a window is handed out, the next one is read. Of captions, which take as long to check as
    to fetch, the one after it is fetched meanwhile: the server answers while we compute.

    Args:
        plan: Endless.
        source: What is wanted of each row.
        num_rows: Rows that will be taken; beyond them a window is read when it is asked for.

    Raises:
        DataError: The server failed; what is broken in the data comes as rows.
    """
    reader = source.open_reader()

    def lines(planned: Planned, groups: Sequence[pa.Table | Fault]) -> pa.Table:
        rows = put_in_order(source, planned.window, groups)
        return rows if source.decode is None else pa.concat_tables(decode_rows(source, rows))

    fetched = ((each, fetch_groups(reader, source, each.window)) for each in plan)
    if not source.columns:
        fetched = _one_ahead(fetched, num_rows)
    return _one_ahead(((each, lines(each, groups)) for each, groups in fetched), num_rows)


def _one_ahead(windows: Iterator[tuple[Planned, T]], num_rows: int) -> Generator[tuple[Planned, T]]:
    """Hands out windows while a thread makes the next one, as far as `num_rows` reach."""
    # Not a daemon: Python waits at its end for a thread that may be inside of Arrow.
    pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    try:
        coming = None
        while True:
            planned, content = (coming or pool.submit(next, windows)).result()
            num_rows -= planned.window.num_wanted
            coming = pool.submit(next, windows) if num_rows > 0 else None
            yield planned, content
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class _Section:
    """Shards whose row groups are permuted together.

    Attributes:
        cursor: Where it begins.
        chapter: Number of its chapter as listed.
        shards: In the epoch's order.
        done: Passes over the data before it.
        share: Passes over the data that it is.
    """

    cursor: Cursor
    chapter: int
    shards: tuple[Shard, ...]
    done: float
    share: float

    def passes(self, window: int, num_windows: int) -> tuple[float, float]:
        """Passes before and after one of its windows."""
        return (
            self.done + self.share * window / num_windows,
            self.done + self.share * (window + 1) / num_windows,
        )


def _sections(
    catalogue: Catalogue, seed: int | None, shuffle: ShuffleSettings, epoch: int, start: Cursor
) -> Iterator[_Section]:
    """The sections of an epoch, from the one on in which `start` lies."""
    chapters = chapter_order(seed, epoch, catalogue.num_chapters()) if epoch else None
    place = shards_before = 0
    while chapters is None or place < len(chapters):
        number = place if chapters is None else chapters[place]
        shards = catalogue.chapter(number)
        if shards is None:
            return
        for index, section in enumerate(sections_of(seed, epoch, number, shards, shuffle.shards)):
            cursor = Cursor(epoch, place, index)
            if cursor >= Cursor(start.epoch, start.chapter, start.section):
                total = catalogue.num_shards if catalogue.is_complete else None
                done = epoch + (shards_before / total if total else 0)
                yield _Section(
                    cursor, number, section, done, len(section) / total if total else 0.0
                )
            shards_before += len(section)
        place += 1
