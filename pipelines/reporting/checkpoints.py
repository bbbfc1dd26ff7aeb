"""The validated states of a run, the best first, with the figures that tell them apart."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.logs import is_number
from pipelines.config.figures import HEADLINE_FIGURES
from pipelines.media.charts import number
from pipelines.reporting.names import title
from pipelines.reporting.records import RunRecords

_MAX_SHOWN = 10


@dataclass(frozen=True, slots=True)
class RankedCheckpoint:
    """One row of the table.

    Attributes:
        iteration: Updates of the generator.
        is_kept: Whether its checkpoint is still there.
        figures: In the order of the headings.
    """

    iteration: int
    is_kept: bool
    figures: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RankingTable:
    """The table.

    Attributes:
        score: What ranks, for a reader.
        better: `small` or `large`.
        headings: The score first, then other leading figures.
        rows: The best first, at most ten.
        num_more: Rows that are left out.
        note: Which states may be as good as the best one; may be empty.
    """

    score: str
    better: str
    headings: tuple[str, ...]
    rows: tuple[RankedCheckpoint, ...]
    num_more: int
    note: str


def ranked_checkpoints(run: RunRecords) -> RankingTable | None:
    """The ranking of a run; None where there is none."""
    found = run.ranking.get("states")
    states = [
        state
        for state in (found if isinstance(found, list) else [])
        if isinstance(state, Mapping)
        and isinstance(state.get("iteration"), int)
        and is_number(state.get("score"))
    ]
    score = run.ranking.get("score")
    if not states or not isinstance(score, str):
        return None
    by_iteration = {line.iteration: line.groups.get("figures", {}) for line in run.validations}
    measured = [by_iteration.get(state["iteration"], {}) for state in states]
    others = [
        name
        for name in HEADLINE_FIGURES
        if name != score and any(name in figures for figures in measured)
    ]
    rows = [_row(state, figures, others) for state, figures in zip(states, measured, strict=True)]
    return RankingTable(
        score=title(score),
        better="small" if run.ranking.get("mode") == "min" else "large",
        headings=tuple(title(name) for name in (score, *others)),
        rows=tuple(rows[:_MAX_SHOWN]),
        num_more=max(0, len(rows) - _MAX_SHOWN),
        note=str(run.ranking.get("note", "")),
    )


def _row(
    state: Mapping[str, Any], figures: Mapping[str, float], others: list[str]
) -> RankedCheckpoint:
    shown = [number(figures[name]) if name in figures else "" for name in others]
    return RankedCheckpoint(
        iteration=state["iteration"],
        is_kept=bool(state.get("checkpoint")),
        figures=(number(state["score"]), *shown),
    )
