"""Reads the windows of a plan ahead, in other processes, with Ray Data.

    plan -> windows -> one execution of Ray Data -> blocks, in order -> whole windows

Ray Data has no iterator that can resume, and one execution cannot be fed while it runs. So the plan
is cut into executions, each four times as long as the one before and started some windows before
that one ends: the first batch waits for few footers, and a long run is a handful of executions. The
first one starts at once, beside whatever else a run has to load.

Blocks that are read and not yet taken stay within a share of the object store. An error of
this program travels as a line and is raised here, with its own type. Every window says how many
lines it has and which number, so a block that Ray loses, repeats or moves would stop the run.
"""

import json
import pickle
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from threading import Thread
from typing import TYPE_CHECKING, Any, Self, TypeVar, TypeVarTuple, cast

import numpy as np
import pyarrow as pa

from pipelines.data.shards.parquet import RowGroupReader
from pipelines.data.stream.plan import Window
from pipelines.data.stream.source import Source
from pipelines.data.stream.stream import Planned
from pipelines.data.stream.window import REASON, ROW, lines_schema, read_window
from pipelines.data.stream.window_decoding import decode_rows
from sgmd_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    import ray.data

R = TypeVar("R")
Ts = TypeVarTuple("Ts")

TASK = "task"
WINDOW = "window"

_FIRST_EXECUTION = 8
_EXECUTION_GROWTH = 4
_LONGEST_EXECUTION = 2048
_READER_CPUS = 0.25
_CLOSE_TIMEOUT_S = 10.0
# For its first second Ray Data gives an execution one task at a time; so many windows bridge it.
_HEAD_START_WINDOWS = 64
# A step of Ray Data's loop costs about a millisecond, and one that waits for tasks up to a hundred.
_BUSY_STEP_S = 0.01
_SHORTEST_STEP_S = 0.002
_LONGEST_STEP_S = 0.05
_TASK_ROWS = 2**18
_MAX_UNDECODED_WINDOWS = 4
_MIN_TASKS = 8
_FAULT = -2  # `row` of a line that carries an error
_SIZE = "window_lines"


@dataclass(frozen=True, slots=True)
class ReadAheadSettings:
    """Distance that readers are ahead of the training.

    Attributes:
        readers: Processes that read. 0 reads in the process that hands out the rows, one window
            ahead and without Ray Data: the fastest way for captions and latents, but one that
            decodes no two videos at once.
        store_mb: Object store that read rows may take before reading pauses.
    """

    readers: int = 2
    store_mb: float = 1024.0

    def __post_init__(self) -> None:
        """Checks the values."""
        attempted = "reading the settings"
        if self.readers < 0:
            raise ConfigError(attempted, f"data.read_ahead.readers: {self.readers}", "0 or more")
        if self.store_mb <= 0:
            raise ConfigError(attempted, f"data.read_ahead.store_mb: {self.store_mb}", "above 0")


class RayDataReader:
    """Hands out a plan's windows in order; has read some of them by the time they are asked for.

    It must be closed while Ray still runs, and closes itself when the process ends. An execution
    that is merely dropped would wait, at the end of the process, for threads that are gone.

    Args:
        plan: Endless.
        source: What is wanted of each row.
        ahead: How far ahead to read.
        num_rows: Rows that will be taken, so that not many more are planned; more may be.
    """

    def __init__(
        self, plan: Iterator[Planned], source: Source, ahead: ReadAheadSettings, num_rows: int
    ) -> None:
        self._plan = plan
        self._source = source
        self._ahead = ahead
        self._rows_left = num_rows
        self._size = _FIRST_EXECUTION
        # At most the one that is handed out and the one that comes next.
        self._executions: list[Future[_Execution]] = []
        self._windows = self._hand_out()
        self.close = weakref.finalize(self, _close, self._executions)
        """Ends all reading; harmless when repeated."""
        if num_rows > 0:
            self._start_another()

    def __iter__(self) -> Self:
        """Itself."""
        return self

    def __next__(self) -> tuple[Planned, pa.Table]:
        """The next window and its rows.

        Raises:
            DataError: The server failed, or Ray Data did not hand out what it was given.
        """
        return next(self._windows)

    def _hand_out(self) -> Iterator[tuple[Planned, pa.Table]]:
        while True:
            if not self._executions:
                self._start_another()
            execution = self._executions[0].result()
            if not execution.planned:
                return  # The plan has an end.
            self._rows_left -= execution.num_rows
            for done, pair in enumerate(execution.windows()):
                is_alone = len(self._executions) == 1
                is_near_its_end = len(execution.planned) - done <= _HEAD_START_WINDOWS
                if is_alone and self._rows_left > 0 and is_near_its_end:
                    self._start_another()
                yield pair
            self._executions.pop(0)

    def _start_another(self) -> None:
        args = (self._plan, self._source, self._ahead, self._size, max(1, self._rows_left))
        self._executions.append(_in_background(_start, *args))
        self._size = min(self._size * _EXECUTION_GROWTH, _LONGEST_EXECUTION)


def _close(executions: Sequence["Future[_Execution]"]) -> None:
    for coming in executions:
        # What still waits for its first row cannot be stopped, and ends with the process.
        with suppress(DataError, FutureTimeoutError):
            coming.result(_CLOSE_TIMEOUT_S).close()


class _Execution:
    """One execution of Ray Data, as far as its first block.

    Args:
        planned: Its windows.
        blocks: What comes out of it.
    """

    def __init__(self, planned: Sequence[Planned], blocks: Generator[pa.Table]) -> None:
        self.planned = planned
        self.num_rows = sum(each.window.num_wanted for each in planned)
        first = next(blocks, None)
        self._blocks = by_window(chain([] if first is None else [first], blocks))
        self.close = blocks.close

    def windows(self) -> Iterator[tuple[Planned, pa.Table]]:
        """Its windows in order, each whole; large ones come in several blocks."""
        for number, planned in enumerate(self.planned):
            parts: list[pa.Table] = []
            lines = expected = 0
            while not parts or lines < expected:
                block = next(self._blocks, None)
                if block is None:
                    raise _lost(f"{lines} of {expected} lines of window {number}")
                raise_fault(block)
                found = block.column(WINDOW).unique().to_pylist()
                if found != [number]:
                    raise _lost(f"window {found} where {number} was due")
                expected = block.column(_SIZE)[0].as_py()
                lines += block.num_rows
                parts.append(block)
            if lines != expected:
                raise _lost(f"{lines} lines of window {number}, which has {expected}")
            yield planned, pa.concat_tables(parts).drop_columns([WINDOW, _SIZE])


def by_window(blocks: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Blocks, cut where a window ends: Ray Data joins small ones."""
    for block in blocks:
        numbers = block.column(WINDOW).to_numpy()
        borders = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), block.num_rows]
        for start, stop in pairwise(borders):
            yield block.slice(start, stop - start)


def _start(
    plan: Iterator[Planned], source: Source, ahead: ReadAheadSettings, size: int, num_rows: int
) -> _Execution:
    """Plans an execution, starts reading it and waits for its first block."""
    planned: list[Planned] = []
    rows = 0
    for each in plan:
        planned.append(each)
        rows += each.window.num_wanted
        if len(planned) == size or rows >= num_rows:
            break
    return _Execution(planned, _execute([each.window for each in planned], source, ahead))


def _in_background(work: Callable[[*Ts], R], *args: *Ts) -> Future[R]:
    """Starts work in a thread that does not keep a process alive which has nothing else to do."""
    future: Future[R] = Future()

    def run() -> None:
        try:
            future.set_result(work(*args))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="execution", daemon=True).start()
    return future


def _execute(
    windows: Sequence[Window], source: Source, ahead: ReadAheadSettings
) -> Generator[pa.Table]:
    if not windows:
        return
    tasks = tasks_of(windows, source)
    rows = lines_dataset(tasks, read_block, source, ahead.readers, _READER_CPUS)
    options = rows.context.execution_options
    # Two executions overlap for a while, so each gets half.
    options.resource_limits = options.resource_limits.copy(
        object_store_memory=ahead.store_mb * 2**20 / 2
    )
    others = [*rows.context.custom_execution_callback_classes]
    rows.context.custom_execution_callback_classes = [*others, cast("Any", IdleBackoff)]
    # What is fetched ahead here would be taken from what the readers may hold.
    blocks = rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    yield from cast("Generator[pa.Table]", iter(blocks))


def lines_dataset(
    tasks: Sequence[object],
    read: Callable[[pa.Table, Source], Iterator[pa.Table]],
    source: Source,
    readers: int,
    num_cpus: float,
) -> "ray.data.Dataset":
    """Lines of a source on their way, in the order of the tasks; nothing runs yet.

    Args:
        tasks: What is read together, pickled in the column `TASK` of the table that `read` gets.
        read: Turns it into lines.
        source: What is wanted.
        readers: Tasks that read at the same time.
        num_cpus: Cores of each.
    """
    import ray.data

    packed = [{TASK: pickle.dumps(task)} for task in tasks]
    lines = ray.data.from_items(packed, override_num_blocks=len(packed)).map_batches(
        cast("Any", read),  # Ray's stubs do not know functions of Arrow tables
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"source": source},
        num_cpus=num_cpus,
        compute=ray.data.TaskPoolStrategy(size=readers),
    )
    lines.context.execution_options.preserve_order = True
    lines.context.enable_progress_bars = False
    return lines


class IdleBackoff:
    """Lets an execution rest while it has nothing to do; a callback of Ray Data's.

    An execution that has read as far ahead as it may has no task to wait for. Ray Data's loop then
    turns as fast as it can, and takes a whole core and the interpreter from whoever takes the rows.
    A step that waits for tasks takes longer than the pauses here and ends them.
    """

    def __init__(self) -> None:
        self._last = 0.0
        self._pause_s = _SHORTEST_STEP_S

    def before_execution_starts(self, executor: object) -> None:
        """Part of Ray Data's interface."""

    def on_execution_step(self, executor: object) -> None:
        """Waits where the step before has not."""
        if time.monotonic() - self._last > _BUSY_STEP_S:
            self._pause_s = _SHORTEST_STEP_S
        else:
            time.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, _LONGEST_STEP_S)
        self._last = time.monotonic()

    def after_execution_succeeds(self, executor: object) -> None:
        """Part of Ray Data's interface."""

    def after_execution_fails(self, executor: object, error: Exception) -> None:
        """Part of Ray Data's interface."""


def tasks_of(windows: Sequence[Window], source: Source) -> list[list[tuple[int, Window]]]:
    """Numbered windows, as tasks read them: several each, unless videos are decoded.

    Ray Data looks after its tasks ten times a second, and windows are read faster than that.
    """
    limit = 1 if source.decode else _MAX_UNDECODED_WINDOWS if source.columns else len(windows)
    most = max(1, min(limit, len(windows) // _MIN_TASKS))
    tasks: list[list[tuple[int, Window]]] = []
    room = 0
    for number, window in enumerate(windows):
        if not tasks or len(tasks[-1]) == most or window.num_rows > room:
            tasks.append([])
            room = _TASK_ROWS
        tasks[-1].append((number, window))
        room -= window.num_rows
    return tasks


def read_block(block: pa.Table, source: Source) -> Iterator[pa.Table]:
    """Reads windows in a reader's process and returns their lines, each in one part or several."""
    windows = [pair for packed in block.column(TASK) for pair in pickle.loads(packed.as_py())]
    yield from read_windows(_reader(source), source, windows)


def read_windows(
    reader: RowGroupReader, source: Source, windows: Iterable[tuple[int, Window]]
) -> Iterator[pa.Table]:
    """Reads numbered windows, and decodes their videos where the source says how.

    Yields:
        The lines of `read_window`, each window in one part or several, with the window's number in
        the column `WINDOW`. An error comes as a line too and is the last one; see `raise_fault`.
    """
    for number, window in windows:
        try:
            table = read_window(reader, source, window)
            for part in [table] if source.decode is None else decode_rows(source, table):
                for name, value in ((WINDOW, number), (_SIZE, table.num_rows)):
                    values = pa.array(np.full(part.num_rows, value, dtype=np.int64))
                    part = part.append_column(name, values)
                yield part
        except DataError as error:
            yield fault_line(number, error, source)
            return


@lru_cache(maxsize=4)
def _reader(source: Source) -> RowGroupReader:
    """One for each folder and process, so that connections and footers are kept."""
    return source.open_reader()


def fault_line(number: int, error: DataError, source: Source) -> pa.Table:
    """An error in the place of a window's lines; `raise_fault` raises it where it arrives."""
    words = json.dumps([str(argument) for argument in error.args])
    line = {ROW: _FAULT, REASON: words, WINDOW: number, _SIZE: 1}
    schema = lines_schema(source).append(pa.field(WINDOW, pa.int64()))
    return pa.Table.from_pylist([line], schema=schema.append(pa.field(_SIZE, pa.int64())))


def raise_fault(block: pa.Table) -> None:
    """Raises what a reader's process could not.

    Raises:
        DataError: The block stands for one.
    """
    error = fault_in(block)
    if error is not None:
        raise error


def fault_in(block: pa.Table) -> DataError | None:
    """The error that a block stands for, if it is not lines."""
    if not block.num_rows or block.column(ROW)[0].as_py() != _FAULT:
        return None
    return DataError(*cast("list[Any]", json.loads(block.column(REASON)[0].as_py())))


def _lost(found: str) -> DataError:
    return DataError(
        "taking rows from Ray Data",
        found,
        "every window once and in order",
        "Resume the run; if it happens again, topology.mode=local reads without Ray Data",
    )
