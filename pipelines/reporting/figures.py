"""Figures of an evaluation, whatever they are called, with their intervals and ratios.

A row of evaluation.json is one way of sampling. A figure in it is a number, or an object

    {"value": 0.31, "error": 0.02}                               error: one standard error
    {"value": 0.31, "low": 0.27, "high": 0.35, "ratio": ...}     ratio: to the teacher

where `ratio` is again a figure. What has no `value` is a group, whose figures are taken out of it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from cluster.logs import is_number
from pipelines.evaluation.result import GENERATOR, decimals_for
from pipelines.media.charts import number
from workers.samplings import FLOOR, REFERENCE

_SECONDS = "seconds_per_clip"
_FACTS = ("num_steps", "guidance_scale", "seed")
# These fields of a row are the ratios of other fields to the reference row's.
_RATIO_FIELDS = {"speed_ratio": "mean_speed_px_per_frame"}


@dataclass(frozen=True, slots=True)
class ShownFigure:
    """A figure and how sure it is.

    Attributes:
        value: The figure.
        low: Lower end of its interval, where there is one.
        high: Upper end.
        error: Its standard error, where there is one.
    """

    value: float
    low: float | None = None
    high: float | None = None
    error: float | None = None

    @property
    def text(self) -> str:
        """The value, with as many decimals as its error allows."""
        if not self.error:
            return number(self.value)
        return f"{self.value:.{decimals_for(self.error)}f}"

    @property
    def spread(self) -> str:
        """Interval or standard error; empty where nothing is known, or nothing can vary."""
        if self.low is not None and self.high is not None:
            if self.low == self.high:
                return ""
            return f"[{number(self.low)}, {number(self.high)}]"
        return f"± {self.error:.{decimals_for(self.error)}f}" if self.error else ""

    @property
    def ends(self) -> tuple[float, float] | None:
        """Ends of the interval; a standard error counts twice to either side."""
        if self.low is not None and self.high is not None:
            return self.low, self.high
        if self.error:
            return self.value - 2 * self.error, self.value + 2 * self.error
        return None


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One way of sampling, measured.

    Attributes:
        name: As `sgmd evaluate` calls it.
        label: The same for a reader.
        facts: Steps, guidance and seed.
        figures: What was measured, by name.
        ratios: To the reference: as recorded, or else of the two values.
    """

    name: str
    label: str
    facts: Mapping[str, float]
    figures: Mapping[str, ShownFigure]
    ratios: Mapping[str, ShownFigure]


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """All ways of sampling that one evaluation compares."""

    rows: Sequence[SamplingRow]

    @property
    def generator(self) -> SamplingRow | None:
        """The row of the generator."""
        return self.named(GENERATOR)

    @property
    def reference(self) -> SamplingRow | None:
        """The row that the others are compared with."""
        return self.named(REFERENCE)

    @property
    def others(self) -> list[SamplingRow]:
        """All but the generator's."""
        return [row for row in self.rows if row.name != GENERATOR]

    @property
    def figure_names(self) -> list[str]:
        """Every figure that some row has, in the order of the record."""
        return list(dict.fromkeys(name for row in self.rows for name in row.figures))

    def named(self, name: str) -> SamplingRow | None:
        """The row of that name, or None."""
        return next((row for row in self.rows if row.name == name), None)


def read_rows(evaluation: Mapping[str, Any]) -> SamplingRows:
    """Reads the rows of an evaluation; entries that are not rows are passed over."""
    found = evaluation.get("rows")
    entries = [
        entry
        for entry in (found if isinstance(found, Sequence) else ())
        if isinstance(entry, Mapping) and isinstance(entry.get("name"), str)
    ]
    measured = {entry["name"]: _figures(entry) for entry in entries}
    reference = measured.get(REFERENCE, ({}, {}))[0]
    # Clips that were remembered were timed by another command, perhaps on another machine.
    earlier = {entry["name"] for entry in entries if entry.get("remembered") is True}
    incomparable = {REFERENCE, FLOOR} & earlier
    return SamplingRows(
        [
            SamplingRow(
                name=entry["name"],
                label=str(entry.get("label", entry["name"])),
                facts={name: entry[name] for name in _FACTS if is_number(entry.get(name))},
                figures=measured[entry["name"]][0],
                ratios={
                    name: ratio
                    for name, ratio in _ratios(*measured[entry["name"]], reference).items()
                    if name != _SECONDS or not (incomparable or entry["name"] in earlier)
                },
            )
            for entry in entries
        ]
    )


def _figures(entry: Mapping[str, Any]) -> tuple[dict[str, ShownFigure], dict[str, ShownFigure]]:
    """Figures of a row or of a group in it, and the ratios recorded beside them."""
    figures: dict[str, ShownFigure] = {}
    ratios: dict[str, ShownFigure] = {}
    for name, value in entry.items():
        if name in _FACTS:
            continue
        figure = _figure(value)
        if figure is None and isinstance(value, Mapping):
            inner_figures, inner_ratios = _figures(value)
            figures |= inner_figures
            ratios |= inner_ratios
        elif figure is not None and name in _RATIO_FIELDS:
            ratios[_RATIO_FIELDS[name]] = figure
        elif figure is not None:
            figures[name] = figure
            ratio = _figure(value.get("ratio")) if isinstance(value, Mapping) else None
            if ratio is not None:
                ratios[name] = ratio
    return figures, ratios


def _figure(value: object) -> ShownFigure | None:
    if isinstance(value, Mapping):
        if not _is_finite(value.get("value")):
            return None
        ends = {
            name: float(value[name])
            for name in ("low", "high", "error")
            if _is_finite(value.get(name))
        }
        return ShownFigure(float(value["value"]), **ends)
    return ShownFigure(float(value)) if _is_finite(value) else None


def _is_finite(value: object) -> TypeGuard[int | float]:
    return is_number(value) and math.isfinite(value)


def _ratios(
    figures: Mapping[str, ShownFigure],
    recorded: Mapping[str, ShownFigure],
    reference: Mapping[str, ShownFigure],
) -> dict[str, ShownFigure]:
    plain = {
        name: ShownFigure(figure.value / reference[name].value)
        for name, figure in figures.items()
        if name in reference and reference[name].value
    }
    return {**plain, **recorded}
