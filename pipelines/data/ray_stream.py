"""Reads the windows of a plan ahead, in other processes, with Ray Data.

    plan -> a stretch of windows -> one Ray Data execution -> blocks, in order -> whole windows

Ray Data has no iterator that can resume, and one execution cannot be fed while it runs. So the plan
is cut into stretches, each four times as long as the one before and started while that one is still
being handed out: the first batch waits for few footers, and a long run is a handful of executions.

Blocks that are read and not yet taken stay within a share of the object store. A fault of ours
travels as a line and is raised here, with its own type. Every window says how many lines it has and
which number, so a block that Ray loses, repeats or moves would stop the run.
"""

import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from threading import Thread
from typing import Any, TypeVar, TypeVarTuple, cast

import numpy as np
import pyarrow as pa

from pipelines.data.parquet import RowGroupReader
from pipelines.data.plan import Window
from pipelines.data.stream import Planned
from pipelines.data.window import REASON, ROW, Source, read_window
from sgmd_core.errors import ConfigError, DataError

R = TypeVar("R")
Ts = TypeVarTuple("Ts")

_FIRST_STRETCH = 8
_STRETCH_GROWTH = 4
_LONGEST_STRETCH = 2048
_READER_CPUS = 0.25
_FAULT = -2  # `row` of a line that carries an error
_NUMBER = "window"
_SIZE = "window_lines"


@dataclass(frozen=True, slots=True)
class ReadAheadSettings:
    """How far ahead of the training data are read.

    Attributes:
        readers: Windows that are read at the same time.
        store_mb: Object store that read rows may take before reading pauses.
    """

    readers: int = 2
    store_mb: float = 256.0

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in ("readers", "store_mb"):
            value = getattr(self, name)
            if value <= 0:
                raise ConfigError(
                    "reading the settings", f"data.read_ahead.{name}: {value}", "above 0"
                )


def read_with_ray_data(
    plan: Iterator[Planned], source: Source, ahead: ReadAheadSettings, num_rows: int
) -> Iterator[tuple[Planned, pa.Table]]:
    """Hands out the plan's windows in order.

    Args:
        plan: Endless.
        source: What is wanted of each row.
        ahead: How far ahead to read.
        num_rows: Rows that will be taken, so that not many more are planned; more may be.

    Raises:
        DataError: The server failed, or Ray Data did not hand out what it was given.
    """
    rows_planned, size = 0, _FIRST_STRETCH
    coming: Future[_Stretch] | None = None
    while True:
        coming = coming or _in_background(_start, plan, source, ahead, size, num_rows)
        stretch, coming = coming.result(), None
        rows_planned += stretch.num_rows
        size = min(size * _STRETCH_GROWTH, _LONGEST_STRETCH)
        for done, pair in enumerate(stretch.windows()):
            if coming is None and 2 * done >= len(stretch.planned) and rows_planned < num_rows:
                left = num_rows - rows_planned
                coming = _in_background(_start, plan, source, ahead, size, left)
            yield pair


class _Stretch:
    """One execution of Ray Data.

    Args:
        planned: Its windows.
        blocks: What comes out of it.
    """

    def __init__(self, planned: Sequence[Planned], blocks: Iterator[pa.Table]) -> None:
        self.planned = planned
        self.num_rows = sum(each.window.num_rows for each in planned)
        self._blocks = blocks

    def windows(self) -> Iterator[tuple[Planned, pa.Table]]:
        """Its windows in order, each whole; large ones come in several blocks."""
        for number, planned in enumerate(self.planned):
            parts: list[pa.Table] = []
            lines = expected = 0
            while not parts or lines < expected:
                block = next(self._blocks, None)
                if block is None:
                    raise _lost(f"{lines} of {expected} lines of window {number}")
                _raise_fault(block)
                found = block.column(_NUMBER).unique().to_pylist()
                if found != [number]:
                    raise _lost(f"window {found} where {number} was due")
                expected = block.column(_SIZE)[0].as_py()
                lines += block.num_rows
                parts.append(block)
            if lines != expected:
                raise _lost(f"{lines} lines of window {number}, which has {expected}")
            yield planned, pa.concat_tables(parts).drop_columns([_NUMBER, _SIZE])


def _start(
    plan: Iterator[Planned], source: Source, ahead: ReadAheadSettings, size: int, num_rows: int
) -> _Stretch:
    """Plans a stretch, starts reading it and waits for its first block."""
    planned: list[Planned] = []
    rows = 0
    while len(planned) < size and rows < num_rows:
        planned.append(next(plan))
        rows += planned[-1].window.num_rows
    blocks = _execute([each.window for each in planned], source, ahead)
    first = next(blocks, None)
    return _Stretch(planned, chain([] if first is None else [first], blocks))


def _in_background(work: Callable[[*Ts], R], *args: *Ts) -> Future[R]:
    """Starts work in a thread that does not keep a process alive which has nothing else to do."""
    future: Future[R] = Future()

    def run() -> None:
        try:
            future.set_result(work(*args))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="stretch", daemon=True).start()
    return future


def _execute(
    windows: Sequence[Window], source: Source, ahead: ReadAheadSettings
) -> Iterator[pa.Table]:
    import ray.data

    tasks = [{"task": pickle.dumps((number, window))} for number, window in enumerate(windows)]
    items = ray.data.from_items(tasks, override_num_blocks=len(tasks))
    rows = items.map_batches(
        cast("Any", _read_block),  # Ray's stubs do not know functions of Arrow tables
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"source": source},
        num_cpus=_READER_CPUS,
        compute=ray.data.TaskPoolStrategy(size=ahead.readers),
    )
    options = rows.context.execution_options
    options.preserve_order = True
    # Two stretches overlap for a while, so each gets half.
    options.resource_limits = options.resource_limits.copy(
        object_store_memory=ahead.store_mb * 2**20 / 2
    )
    rows.context.enable_progress_bars = False
    return iter(rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))


def _read_block(block: pa.Table, source: Source) -> pa.Table:
    """What a reader's process does: one window in, its lines out."""
    tables = []
    for packed in block.column("task"):
        number, window = pickle.loads(packed.as_py())
        try:
            table = read_window(_reader(source), source, window)
        except DataError as error:
            table = pa.table(
                {ROW: [_FAULT], REASON: [json.dumps([str(arg) for arg in error.args])]}
            )
        size = table.num_rows
        table = table.append_column(_NUMBER, pa.array(np.full(size, number, dtype=np.int64)))
        tables.append(table.append_column(_SIZE, pa.array(np.full(size, size, dtype=np.int64))))
    return pa.concat_tables(tables)


@lru_cache(maxsize=4)
def _reader(source: Source) -> RowGroupReader:
    """One for each folder and process, so that connections and footers are kept."""
    return source.open_reader()


def _raise_fault(block: pa.Table) -> None:
    if block.column(ROW)[0].as_py() == _FAULT:
        raise DataError(*cast("list[Any]", json.loads(block.column(REASON)[0].as_py())))


def _lost(found: str) -> DataError:
    return DataError(
        "taking rows from Ray Data",
        found,
        "every window once and in order",
        "Resume the run; if it happens again, topology.mode=local reads without Ray Data",
    )
