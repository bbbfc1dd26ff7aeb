"""Output of the command line: a result as JSON or as a table, and progress apart from it.

standard output   the result, and nothing else
standard error    progress, notes, errors
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

_PIPE_COLUMNS = 120
_LINE_EVERY_S = 10.0
_BAR_COLUMNS = 20  # leaves room for words on a terminal of 80 columns

Counter = Callable[[str], None]
"""Tells how far a work is whose end is not known; the words replace those before."""


@contextmanager
def working() -> Iterator[Console]:
    """A console for progress; what libraries print meanwhile stays out of the result."""
    # Read when transformers is imported; its bars for each file would drown our own.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with redirect_stdout(sys.stderr):
        yield Console(stderr=True)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Shows how far each of several works is: call it with (what, done, in all).

    On a terminal a bar each; in a log a line each at its start and end, and every ten seconds.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(_BAR_COLUMNS),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with working() as console:
        if not console.is_terminal:
            yield _ProgressLines(console)
            return
        bars = Progress(*columns, console=console)
        tasks: dict[str, TaskID] = {}

        def show_progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        with bars:
            yield show_progress


class _ProgressLines:
    """Lines for a log: work, done and in all, rate, time left.

    Args:
        console: Where the lines go.
        every_s: Least time between two lines of the same work; its end always has one.
    """

    def __init__(self, console: Console, every_s: float = _LINE_EVERY_S) -> None:
        self._console = console
        self._every_s = every_s
        self._started: dict[str, tuple[float, int]] = {}
        self._shown_at: dict[str, float] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """Prints a line where one is due."""
        now = time.monotonic()
        if what not in self._started:
            self._started[what], self._shown_at[what] = (now, done), now
            self._console.print(f"{what}: {done}/{total}", highlight=False, markup=False)
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
        self._console.print(words, highlight=False, markup=False)


@contextmanager
def counting() -> Iterator[Counter]:
    """Shows the latest words about a work: in one line, or every ten seconds where there is none.

    The last words are always shown.
    """
    with working() as console:
        latest, shown_at = "", time.monotonic()
        status = console.status("") if console.is_terminal else nullcontext()
        with status as line:

            def tell(words: str) -> None:
                nonlocal latest, shown_at
                latest = words
                if line is not None:
                    line.update(words)
                elif time.monotonic() - shown_at >= _LINE_EVERY_S:
                    shown_at = time.monotonic()
                    console.print(words, highlight=False, markup=False)

            try:
                yield tell
            finally:
                if latest:
                    console.print(latest, highlight=False, markup=False)


def show(data: Mapping[str, Any] | Sequence[Any], as_json: bool, *shown: RenderableType) -> None:
    """Prints a result.

    Args:
        data: The result, as JSON can hold it.
        as_json: Print `data`; otherwise print `shown`, one after another.
        shown: The result for a reader.
    """
    if as_json:
        sys.stdout.write(json.dumps(data, indent=2, default=str) + "\n")
        return
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        # A log or a pipe has no width of its own; rich would take 80 columns.
        console.width = _PIPE_COLUMNS
    for part in shown:
        # Paths must stay whole, so that they can be copied.
        console.print(part, soft_wrap=isinstance(part, str))


def pairs(data: Mapping[str, Any]) -> Table:
    """Names and values below each other; sections are written with dots."""
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _flat(data):
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    return table


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
