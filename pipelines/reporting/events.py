"""Events of a run as rows of a table: what failed, why, what was done, and the seconds lost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.logs import is_number
from pipelines.reporting.names import duration, title


@dataclass(frozen=True, slots=True)
class EventRow:
    """One event.

    Attributes:
        time: ISO 8601, without fractions of a second.
        name: Its kind, for a reader.
        place: Role, rank and machine; empty where it is about no process.
        iteration: Updates made before; empty where the run had not begun.
        cause: One sentence.
        action: One sentence; empty where nothing was done.
        lost: Time lost; empty where it is not known.
        last_lines: The last log lines of the failing process.
    """

    time: str
    name: str
    place: str
    iteration: str
    cause: str
    action: str
    lost: str
    last_lines: tuple[str, ...]


def event_rows(events: Sequence[Mapping[str, Any]]) -> list[EventRow]:
    """One row an event, in the order of the log; odd values become empty."""
    return [_row(event) for event in events]


def _row(event: Mapping[str, Any]) -> EventRow:
    role, rank, node = _text(event, "role"), event.get("rank"), _text(event, "node")
    place = f"{role} rank {rank}" if role and is_number(rank) else role
    lost_s, lines = event.get("lost_s"), event.get("last_lines")
    return EventRow(
        time=_text(event, "time").partition(".")[0].replace("T", " "),
        name=title(_text(event, "kind")),
        place=" on ".join(part for part in (place, node) if part),
        iteration=str(event["iteration"]) if is_number(event.get("iteration")) else "",
        cause=_text(event, "cause"),
        action=_text(event, "action"),
        lost=duration(lost_s) if is_number(lost_s) and math.isfinite(lost_s) else "",
        last_lines=tuple(map(str, lines)) if isinstance(lines, list) else (),
    )


def _text(event: Mapping[str, Any], name: str) -> str:
    value = event.get(name)
    return value if isinstance(value, str) else ""
