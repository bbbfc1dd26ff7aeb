"""Shows a run on the console: a live line on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from cluster.said import Said
from pipelines.run.alarms import Alarm
from pipelines.run.observer import RunObserver
from pipelines.run.records import GOOD_NEWS, IterationRecord, RunEvent, ValidationRecord
from pipelines.run.stop_rule import StopRule

_BAR_COLUMNS = 20  # leaves room for the counts on a terminal of 80 columns


class _Printing(RunObserver):
    """Prints what happens beside the iterations; what has failed in red, where there are colours.

    Args:
        console: Where to.
        stop_rule: Ends the run.
        spent_s: Training time before.
        soft_wrap: Leave long lines as they are.
    """

    def __init__(
        self, console: Console, stop_rule: StopRule, spent_s: float, *, soft_wrap: bool
    ) -> None:
        self._console = console
        self._soft_wrap = soft_wrap
        self._eta = TimeLeft(stop_rule, spent_s)

    def note(self, text: str) -> None:
        """Prints it."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=self._soft_wrap)

    def validation(self, record: ValidationRecord, samples: Path) -> None:
        """Prints its leading figures."""
        self.note(f"validation at iteration {record.iteration}: {describe_validation(record)}")

    def alarm(self, alarm: Alarm) -> None:
        """Prints it in red."""
        self.warning(alarm.in_words())

    def event(self, event: RunEvent) -> None:
        """Prints it, in red where something has failed."""
        (self.note if event.kind in GOOD_NEWS else self.warning)(event.in_words())

    def warning(self, text: str) -> None:
        """Prints it in red."""
        self._console.print(Text(text, style="bold red"), soft_wrap=self._soft_wrap)

    def said(self, said: Said) -> None:
        """Prints it with its place, such as `[fake_score 1 @120]`."""
        self.warning(said.line)


class LineObserver(_Printing):
    """Plain lines, for logs and pipes.

    Args:
        console: Where the lines go.
        stop_rule: Ends the run.
        spent_s: Training time before.
        every_s: Least time between two iteration lines; the first and the last always come.
    """

    def __init__(
        self, console: Console, stop_rule: StopRule, spent_s: float = 0.0, every_s: float = 5.0
    ) -> None:
        super().__init__(console, stop_rule, spent_s, soft_wrap=True)
        self._last = stop_rule.num_iterations
        self._of = f"/{self._last}" if stop_rule.max_seconds is None else ""
        self._every_s = every_s
        self._last_s = float("-inf")

    def iteration(self, record: IterationRecord) -> None:
        """Prints it, unless a line came just before."""
        left = self._eta.after(record)
        done = record.iteration + 1
        now = time.monotonic()
        if done not in (1, self._last) and now - self._last_s < self._every_s:
            return
        self._last_s = now
        self.note(f"iteration {done}{self._of}  {describe(record)}  {left} left")


class BarAndFigures(Progress):
    """Bars, and below each one its text field `figures`, which takes no room from the bar."""

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bars' table, then one line of figures a task, cut at the terminal's edge."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields["figures"], no_wrap=True, overflow="ellipsis")


class LiveObserver(_Printing):
    """A progress bar with the latest figures under it; all else scrolls by above.

    The bar counts iterations, or seconds where the clock ends the run.

    Args:
        progress: A started rich progress display with the text fields `figures` and `left`.
        stop_rule: Ends the run.
        spent_s: Training time before.
    """

    def __init__(self, progress: Progress, stop_rule: StopRule, spent_s: float = 0.0) -> None:
        super().__init__(progress.console, stop_rule, spent_s, soft_wrap=False)
        self._progress = progress
        self._by_clock = stop_rule.max_seconds is not None
        self._task = progress.add_task(
            "distill, seconds" if self._by_clock else "distill",
            total=stop_rule.max_seconds if self._by_clock else stop_rule.num_iterations,
            figures="starting",
            left="",
        )

    def iteration(self, record: IterationRecord) -> None:
        """Moves the bar."""
        left, done = self._eta.after(record), record.iteration + 1
        figures = f"  iteration {done}  {describe(record)}"
        completed = self._eta.spent_s if self._by_clock else done
        self._progress.update(self._task, completed=completed, figures=figures, left=f"{left} left")


class TimeLeft:
    """Estimates the time to the end from a moving average of the iteration time.

    Attributes:
        spent_s: Training time so far.
    """

    def __init__(self, stop_rule: StopRule, spent_s: float = 0.0, smoothing: float = 0.9) -> None:
        self._stop_rule = stop_rule
        self._smoothing = smoothing
        self._mean_s: float | None = None
        self.spent_s = spent_s

    def after(self, record: IterationRecord) -> str:
        """Time left after this iteration, as hours, minutes and seconds."""
        self.spent_s += record.seconds_total
        if self._mean_s is None:
            self._mean_s = record.seconds_total
        else:
            self._mean_s += (1 - self._smoothing) * (record.seconds_total - self._mean_s)
        left = self._mean_s * (self._stop_rule.num_iterations - record.iteration - 1)
        if self._stop_rule.max_seconds is not None:
            left = min(left, max(0.0, self._stop_rule.max_seconds - self.spent_s))
        left_s = round(left)
        return f"{left_s // 3600}:{left_s // 60 % 60:02d}:{left_s % 60:02d}"


@contextmanager
def console_observer(
    stop_rule: StopRule, console: Console, spent_s: float = 0.0
) -> Iterator[RunObserver]:
    """Yields a live display on a terminal, and plain lines elsewhere."""
    if not console.is_terminal:
        yield LineObserver(console, stop_rule, spent_s)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(_BAR_COLUMNS),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with BarAndFigures(*columns, console=console) as progress:
        yield LiveObserver(progress, stop_rule, spent_s)


def describe(record: IterationRecord) -> str:
    """Size where it changes, losses, and where the seconds went, in one line."""
    losses = "  ".join(f"{name} {value:.4g}" for name, value in record.headline_losses.items())
    busy = sorted(record.seconds.items(), key=lambda item: -item[1])[:4]
    stages = " ".join(f"{stage} {seconds:.2f}" for stage, seconds in busy)
    size = f"{record.bucket}  " if record.bucket else ""
    return f"{size}{losses}  {record.seconds_total:.2f} s ({stages})"


def describe_validation(record: ValidationRecord) -> str:
    """The leading figures of a validation in one line; validation.jsonl has all."""
    figures = "  ".join(f"{name} {value:.3g}" for name, value in record.headline_figures.items())
    return f"{figures}  ({record.seconds:.1f} s)"
