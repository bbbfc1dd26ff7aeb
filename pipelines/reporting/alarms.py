"""Alarms that a run has raised: marks on its curves and one line for each kind.

A line of alarms.jsonl is one alarm: {"iteration", "name", "message", "value", "limit"}.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.media.charts import Mark, number
from pipelines.reporting.names import title
from pipelines.reporting.records import Line


@dataclass(frozen=True, slots=True)
class AlarmKind:
    """All alarms of one name.

    Attributes:
        name: What went wrong, for a reader.
        count: How often.
        first: Iteration of the first one.
        last: Iteration of the last one.
        message: What the last one said.
        found: Its value against its limit; empty where it has none.
    """

    name: str
    count: int
    first: int
    last: int
    message: str
    found: str


def alarm_kinds(lines: Sequence[Line]) -> list[AlarmKind]:
    """Groups alarms by name, in the order in which each was raised first."""
    by_name: dict[str, list[Line]] = {}
    for line in lines:
        by_name.setdefault(_name(line), []).append(line)
    return [
        AlarmKind(
            name=title(name),
            count=len(found),
            first=found[0].iteration,
            last=found[-1].iteration,
            message=found[-1].texts.get("message", ""),
            found=_against(found[-1]),
        )
        for name, found in by_name.items()
    ]


def marks(lines: Sequence[Line]) -> list[Mark]:
    """A mark for each alarm at its iteration, for the curves of the report."""
    return [
        Mark(line.iteration, f"{title(_name(line))} at {line.iteration}: {_against(line)}")
        for line in lines
    ]


def _name(line: Line) -> str:
    return line.texts.get("name", "alarm")


def _against(line: Line) -> str:
    value, limit = line.number("value"), line.number("limit")
    if not math.isfinite(value):
        return ""
    return f"{number(value)}, limit {number(limit)}" if math.isfinite(limit) else number(value)
