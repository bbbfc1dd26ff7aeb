"""Output of the command line: a result as JSON or as a table, and progress apart from it.

standard output   the result, and nothing else
standard error    progress, notes, errors
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from threading import Event, Lock, Thread
from typing import Any, Self, TextIO

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from cluster.redaction import printable
from pipelines.dotted import dotted_items

_PIPE_COLUMNS = 120
_LINE_EVERY_S = 10.0
_STILL_EVERY_S = 30.0
_RESULTS_TO: list[TextIO] = []
_BAR_COLUMNS = 20  # leaves room for words on a terminal of 80 columns

Counter = Callable[[str], None]
"""Tells how far a work is whose end is not known; the words replace those before."""


class PrintableConsole(Console):
    """A console on which text of foreign data, such as a column's name, gives no commands."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Segments of what is shown; only those of rich's own have control characters."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


@contextmanager
def working() -> Iterator[Console]:
    """A console for progress; what libraries print meanwhile stays out of the result.

    `show` prints results where they belong, in the block and after it.
    """
    # Read when transformers is imported; its bars for each file would drown our own.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _RESULTS_TO.append(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield PrintableConsole(stderr=True)
    finally:
        _RESULTS_TO.pop()


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Shows how far each of several works is: call it with (what, done, in all).

    On a terminal a bar each; in a log a line each at its start and end, and every ten seconds;
    without any progress, as during the many steps of a large batch, a line every 30 seconds.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(_BAR_COLUMNS),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with working() as console:
        if not console.is_terminal:
            with ProgressLines(console) as lines:
                yield lines
            return
        bars = Progress(*columns, console=console)
        tasks: dict[str, TaskID] = {}

        def show_progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        with bars:
            yield show_progress


class _Heartbeat:
    """Repeats the latest line while no progress is reported; a context.

    Args:
        say: Shows a line.
        every_s: Longest time without a line.
    """

    def __init__(self, say: Callable[[str], None], every_s: float) -> None:
        self._lock = Lock()
        self._say = say
        self._still_every_s = every_s
        self._latest = ""
        self._heard_at = self._said_at = time.monotonic()
        self._ended = Event()
        self._thread = Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _hear(self, words: str) -> None:
        """Takes in the latest words; hold the lock."""
        self._heard_at, self._latest = time.monotonic(), words

    def _show(self, words: str) -> None:
        """Shows a line; hold the lock."""
        self._said_at = time.monotonic()
        self._say(words)

    def _repeat(self) -> None:
        while not self._ended.wait(self._still_every_s):
            with self._lock:
                now = time.monotonic()
                if now - max(self._heard_at, self._said_at) >= self._still_every_s:
                    since = timedelta(seconds=round(now - self._heard_at))
                    latest = self._latest or "starting"
                    self._show(f"{latest}, at work on the next for {since}")


class ProgressLines(_Heartbeat):
    """Lines for a log: work, done and in all, rate, time left.

    As a context it also says what is under way while no progress is reported.

    Args:
        console: Where the lines go.
        every_s: Least time between two lines of the same work; its end always has one.
        still_every_s: Longest time without a line.
    """

    def __init__(
        self,
        console: Console,
        every_s: float = _LINE_EVERY_S,
        still_every_s: float = _STILL_EVERY_S,
    ) -> None:
        super().__init__(plain_printer(console), still_every_s)
        self._every_s = every_s
        self._started: dict[str, tuple[float, int]] = {}
        self._shown_at: dict[str, float] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """Prints a line where one is due."""
        with self._lock:
            self._hear(f"{what}: {done}/{total}" if total else what)
            self._tell(what, done, total)

    def _tell(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what not in self._started:
            self._started[what], self._shown_at[what] = (now, done), now
            self._show(f"{what}: {done}/{total}")
            return
        if done < total and now - self._shown_at[what] < self._every_s:
            return
        self._shown_at[what] = now
        began_at, before = self._started[what]
        rate = (done - before) / max(now - began_at, 1e-3)
        words = f"{what}: {done}/{total}"
        if rate > 0:
            left = str(timedelta(seconds=round((total - done) / rate)))
            pace = f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.3g} s each"
            words += f", {pace}" + (f", {left} left" if done < total else "")
        self._show(words)


@contextmanager
def counting() -> Iterator[Counter]:
    """Shows the latest progress of a job: in one line of a terminal, or else every ten seconds.

    While none is reported, as during a clip that takes long, a line every 30 seconds. The last
    one is always shown.
    """
    with working() as console:
        status = console.status("") if console.is_terminal else nullcontext()
        with status as line, CountLines(console, None if line is None else line.update) as count:
            yield count


class CountLines(_Heartbeat):
    """Words about a work whose end is not known; a context.

    Args:
        console: Where the last words go, and all others where there is no line.
        update: Replaces the words of a line that stays; None prints them.
        every_s: Least time between two printed lines.
        still_every_s: Longest time without a line.
    """

    def __init__(
        self,
        console: Console,
        update: Callable[[str], None] | None = None,
        every_s: float = _LINE_EVERY_S,
        still_every_s: float = _STILL_EVERY_S,
    ) -> None:
        self._print = plain_printer(console)
        super().__init__(update or self._print, still_every_s)
        self._every_s = 0.0 if update else every_s
        self._shown_at = time.monotonic()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if self._latest:
            self._print(self._latest)

    def __call__(self, words: str) -> None:
        """Takes in the latest words, and shows them where a line is due."""
        with self._lock:
            self._hear(words)
            now = time.monotonic()
            if now - self._shown_at >= self._every_s:
                self._shown_at = now
                self._show(words)


def plain_printer(console: Console) -> Callable[[str], None]:
    """Prints lines as they are: whole, without colours or markup."""
    return partial(console.print, highlight=False, markup=False, soft_wrap=True)


def show(data: Mapping[str, Any] | Sequence[Any], as_json: bool, *shown: RenderableType) -> None:
    """Prints a result.

    Args:
        data: The result, as JSON can hold it.
        as_json: Print `data`; otherwise print `shown`, one after another.
        shown: The result for a reader.
    """
    stream = _RESULTS_TO[0] if _RESULTS_TO else sys.stdout
    if as_json:
        stream.write(json.dumps(data, indent=2, default=str) + "\n")
        return
    console = PrintableConsole(file=stream, highlight=False, markup=False)
    if not console.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        # A log or a pipe has no width of its own; rich would take 80 columns.
        console.width = _PIPE_COLUMNS
    for part in shown:
        # Paths must stay whole, so that they can be copied.
        console.print(part, soft_wrap=isinstance(part, str))


@dataclass(frozen=True, slots=True)
class FittingTable:
    """A table that leaves out its last columns where a terminal is too narrow, and names them.

    Attributes:
        headings: Headings of the columns.
        rows: Cells of each row.
        num_kept: Columns that are always shown; they are folded where even they do not fit.
        num_words: Of these, the first ones are words and stand at the left.
        title: Title above the table.
        elsewhere: Where the columns that are left out can be found.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_kept: int
    num_words: int = 1
    title: str | None = None
    elsewhere: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yields the table of as many columns as fit, and the names of the others."""
        num_shown = len(self.headings)
        unbounded = options.update(width=10_000)
        while num_shown > self.num_kept:
            width = Measurement.get(console, unbounded, self._table(num_shown)).maximum
            if width <= options.max_width:
                break
            num_shown -= 1
        yield self._table(num_shown)
        if num_shown < len(self.headings):
            yield Text(f"also in {self.elsewhere}: {', '.join(self.headings[num_shown:])}")

    def _table(self, num_shown: int) -> Table:
        table = Table(title=self.title, title_justify="left")
        for place, heading in enumerate(self.headings[:num_shown]):
            justify = "left" if place < self.num_words else "right"
            table.add_column(heading, justify=justify, overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(printable(cell)) for cell in row[:num_shown]))
        return table


def pairs(data: Mapping[str, Any]) -> Table:
    """Names and values below each other; sections are written with dots."""
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in dotted_items(data):
        if value == {}:
            continue
        # Escapes are counted in the width of a cell.
        table.add_row(Text(printable(name)), Text(printable(_in_words(value))))
    return table


def _in_words(value: object) -> str:
    """A value for a reader: no brackets, quotes or names of Python."""
    match value:
        case bool():
            return "yes" if value else "no"
        case None:
            return "none"
        case float():
            return f"{value:.4g}"
        case list() | tuple():
            return ", ".join(map(_in_words, value)) or "none"
        case _:
            return str(value)
