"""Losses and seconds by size of the clips, of runs that train several."""

from dataclasses import dataclass
from statistics import fmean, median

from pipelines.config.methods import leading_losses
from pipelines.reporting.names import in_order, title
from pipelines.reporting.records import RunRecords, finite

_NEWEST = 25
"""Iterations of a size whose losses are averaged."""


@dataclass(frozen=True, slots=True)
class SizeRow:
    """Iterations of one size.

    Attributes:
        size: Such as `480x832x81`.
        num_iterations: Iterations that had it.
        median_s: Seconds of one of them.
        losses: Leading losses, in the order of the heading; means of its newest iterations.
    """

    size: str
    num_iterations: int
    median_s: float
    losses: tuple[float, ...]


def size_rows(run: RunRecords) -> tuple[tuple[str, ...], list[SizeRow]]:
    """Titles of the losses, and a row for each size; none where a run has one size."""
    sized = [line for line in run.metrics if line.texts.get("bucket")]
    groups = [line.groups.get("losses", {}) for line in sized]
    names = [name for name in in_order(groups) if name in leading_losses()]
    rows: list[SizeRow] = []
    for size in sorted({line.texts["bucket"] for line in sized}):
        own = [line for line in sized if line.texts["bucket"] == size]
        seconds = finite([line.number("total", "seconds") for line in own])
        newest = {
            name: finite([line.number(name, "losses") for line in own[-_NEWEST:]]) for name in names
        }
        losses = tuple(fmean(values) if values else float("nan") for values in newest.values())
        rows.append(SizeRow(size, len(own), median(seconds) if seconds else float("nan"), losses))
    return tuple(title(name) for name in names), rows
