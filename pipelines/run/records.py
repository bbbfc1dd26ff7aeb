"""Records that a run writes, line by line."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.config.methods import leading_losses
from workers.measures import MEASURES

FIGURES = tuple(
    name
    for measure in MEASURES
    if measure.ranks
    for name in (measure.name, *([f"{measure.name}_ratio"] if measure.has_ratio else ()))
)
"""Names of the figures of a validation."""

SHAPE_FIGURES = tuple(
    name
    for measure in MEASURES
    if measure.needs_shapes
    for name in (measure.name, *([f"{measure.name}_ratio"] if measure.has_ratio else ()))
)
"""Figures that are read from captions of the world `shapes` only."""

HEADLINE_FIGURES = tuple(
    f"{measure.name}_ratio" if measure.leads == "ratio" else measure.name
    for measure in MEASURES
    if measure.leads
)
"""Figures of a progress line."""


@dataclass(frozen=True, slots=True)
class IterationRecord:
    """One line of metrics.jsonl.

    Attributes:
        iteration: Generator updates made before this one.
        losses: Loss terms, means over the samples.
        grad_norms: Global gradient norm by role, before clipping.
        seconds: Busy seconds by `role.stage`; stages of different roles overlap. Where iterations
            overlap, those that were heard of since the iteration before.
        seconds_total: Wall-clock seconds of the iteration.
        data_wait_s: Of these, seconds spent waiting for captions.
        samples_seen: Captions taken from the stream so far.
        epoch: Passes over the data, as a fraction; only whole ones as long as the folder has not
            been listed to its end.
        cursor: The row of the data that comes next; `pipelines.data.stream.plan.Cursor`.
        rejected: Rows, row groups and shards that were newly left out on the way.
        exit_steps: The rollout step that learnt, one a micro-batch.
        stale_calls: Calls that did not wait for all updates of the iteration before to end; 0
            unless the recipe allows it.
    """

    iteration: int
    losses: Mapping[str, float]
    grad_norms: Mapping[str, float]
    seconds: Mapping[str, float]
    seconds_total: float
    data_wait_s: float
    samples_seen: int
    epoch: float
    cursor: Mapping[str, int]
    rejected: int
    exit_steps: tuple[int, ...]
    stale_calls: int = 0

    @property
    def headline_losses(self) -> dict[str, float]:
        """Leading terms of the objective's losses."""
        return {name: self.losses[name] for name in leading_losses() if name in self.losses}

    def to_json(self) -> dict[str, Any]:
        """As metrics.jsonl holds it."""
        record = asdict(self)
        record["seconds"] = {"total": record.pop("seconds_total"), **record["seconds"]}
        return record


@dataclass(frozen=True, slots=True)
class ValidationRecord:
    """One line of validation.jsonl.

    Attributes:
        iteration: Updates the validated weights had seen.
        figures: Measured on the generator's clips; their names are explained in
            `workers.validation_evaluator`.
        seconds: How long it took, off the critical path.
        sheet: File name of the contact sheet under samples/.
        intervals: Ends of the 95 % intervals of those figures that have one.
        seconds_per_clip: Sampling one clip, beside the training: compare it within a run only.
        influences: Influence of each clip on the figures that rank; see `pipelines.run.ranking`.
    """

    iteration: int
    figures: Mapping[str, float]
    seconds: float
    sheet: str
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    seconds_per_clip: float | None = None
    influences: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def headline_figures(self) -> dict[str, float]:
        """The figures that fit on one line, of those that were measured."""
        return {name: self.figures[name] for name in HEADLINE_FIGURES if name in self.figures}

    def to_json(self) -> dict[str, Any]:
        """As validation.jsonl holds it."""
        return asdict(self)
