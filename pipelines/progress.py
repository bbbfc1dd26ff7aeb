"""What a run tells while it works: a live line on a terminal, plain lines otherwise."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from pipelines.alarms import Alarm
from pipelines.records import IterationRecord, ValidationRecord


class Listener(Protocol):
    """Hears what happens in a run."""

    def note(self, text: str) -> None:
        """One line about a phase: starting, loading, saving."""
        ...

    def iteration(self, record: IterationRecord) -> None:
        """An iteration has been committed."""
        ...

    def validation(self, record: ValidationRecord) -> None:
        """A validation has come back."""
        ...

    def alarm(self, alarm: Alarm) -> None:
        """A limit has been crossed."""
        ...


class SilentListener:
    """Says nothing; for sweeps and tests."""

    def note(self, text: str) -> None:
        """Ignores it."""

    def iteration(self, record: IterationRecord) -> None:
        """Ignores it."""

    def validation(self, record: ValidationRecord) -> None:
        """Ignores it."""

    def alarm(self, alarm: Alarm) -> None:
        """Ignores it."""


class LineListener:
    """Plain lines, for logs and pipes.

    Args:
        console: Where the lines go.
        num_iterations: Length of the run.
        every_s: Least time between two iteration lines; the first and the last always come.
    """

    def __init__(self, console: Console, num_iterations: int, every_s: float = 5.0) -> None:
        self._console = console
        self._num_iterations = num_iterations
        self._every_s = every_s
        self._eta = TimeLeft(num_iterations)
        self._last_s = float("-inf")

    def note(self, text: str) -> None:
        """Prints it."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def iteration(self, record: IterationRecord) -> None:
        """Prints it, unless a line came just before."""
        left = self._eta.after(record)
        done = record.iteration + 1
        now = time.monotonic()
        if done not in (1, self._num_iterations) and now - self._last_s < self._every_s:
            return
        self._last_s = now
        self.note(f"iteration {done}/{self._num_iterations}  {describe(record)}  {left} left")

    def validation(self, record: ValidationRecord) -> None:
        """Prints it."""
        self.note(f"validation at iteration {record.iteration}: {describe_validation(record)}")

    def alarm(self, alarm: Alarm) -> None:
        """Prints it in red, where there are colours."""
        self._console.print(Text(alarm.in_words(), style="bold red"), soft_wrap=True)


class LiveListener:
    """A progress bar with the latest figures under it; notes scroll by above.

    Args:
        progress: A started rich progress display with one text field, `figures`.
        num_iterations: Length of the run.
    """

    def __init__(self, progress: Progress, num_iterations: int) -> None:
        self._progress = progress
        self._eta = TimeLeft(num_iterations)
        self._task = progress.add_task("distill", total=num_iterations, figures="starting")

    def note(self, text: str) -> None:
        """Prints it above the bar."""
        self._progress.console.print(text, highlight=False, markup=False)

    def iteration(self, record: IterationRecord) -> None:
        """Moves the bar."""
        figures = f"{self._eta.after(record)} left\n  {describe(record)}"
        self._progress.update(self._task, completed=record.iteration + 1, figures=figures)

    def validation(self, record: ValidationRecord) -> None:
        """Prints it above the bar."""
        self.note(f"validation at iteration {record.iteration}: {describe_validation(record)}")

    def alarm(self, alarm: Alarm) -> None:
        """Prints it above the bar."""
        self._progress.console.print(Text(alarm.in_words(), style="bold red"))


class TimeLeft:
    """Estimates the time to the end from a moving average of the iteration time."""

    def __init__(self, num_iterations: int, smoothing: float = 0.9) -> None:
        self._num_iterations = num_iterations
        self._smoothing = smoothing
        self._mean_s: float | None = None

    def after(self, record: IterationRecord) -> str:
        """Time left after this iteration, as minutes and seconds."""
        if self._mean_s is None:
            self._mean_s = record.seconds_total
        else:
            self._mean_s += (1 - self._smoothing) * (record.seconds_total - self._mean_s)
        left_s = round(self._mean_s * (self._num_iterations - record.iteration - 1))
        return f"{left_s // 3600}:{left_s // 60 % 60:02d}:{left_s % 60:02d}"


@contextmanager
def console_listener(num_iterations: int, console: Console) -> Iterator[Listener]:
    """The listener that fits where the output goes."""
    if not console.is_terminal:
        yield LineListener(console, num_iterations)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield LiveListener(progress, num_iterations)


def describe(record: IterationRecord) -> str:
    """Losses, gradient norms and where the seconds went, in one line."""
    losses = "  ".join(f"{name} {value:.4g}" for name, value in record.headline_losses.items())
    busy = sorted(record.seconds.items(), key=lambda item: -item[1])[:4]
    stages = " ".join(f"{stage} {seconds:.2f}" for stage, seconds in busy)
    return f"{losses}  {record.seconds_total:.2f} s ({stages})"


def describe_validation(record: ValidationRecord) -> str:
    """The leading figures of a validation in one line; validation.jsonl has all."""
    figures = "  ".join(f"{name} {value:.3g}" for name, value in record.headline_figures.items())
    return f"{figures}  ({record.seconds:.1f} s)"
