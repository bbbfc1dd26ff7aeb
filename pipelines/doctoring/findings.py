"""Findings of the checks, several machines' findings in one line, and what a run will need."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

GIB = 2**30
_MOST_SHOWN = 4


class Status(StrEnum):
    """Outcome of a check."""

    GOOD = "good"
    LIMITED = "limited"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Wanted:
    """Things that a run will need on every machine.

    Attributes:
        storage: Folders and addresses that it writes to.
        models: Folders and addresses of models that it reads.
    """

    storage: tuple[str, ...] = ()
    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of a check.

    Attributes:
        name: What was looked at.
        status: `LIMITED` slows down or narrows what can be done; `MISSING` makes runs fail.
        found: What is there, with figures.
        remedy: What to do about it, where something is to be done.
        machine: Machine of a cluster that it is about; empty: this one, or all of them together.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""
    machine: str = ""


def gib(num_bytes: float) -> str:
    """A number of bytes in GiB."""
    return f"{num_bytes / GIB:.1f} GiB"


def summarize_machines(findings: Sequence[Finding]) -> list[Finding]:
    """Findings for a reader: those that machines have in common stand in one line.

    Args:
        findings: Of one machine or of many, in the order of the checks.

    Returns:
        The lines, in the order in which their checks come first.
    """
    checks: dict[tuple[str, Status, str], list[Finding]] = {}
    for finding in findings:
        key = (finding.name, finding.status, finding.remedy)
        checks.setdefault(key, []).append(finding)
    return [_in_one_line(same) for same in checks.values()]


def _in_one_line(same: Sequence[Finding]) -> Finding:
    """One finding for several of the same check, status and remedy."""
    first = same[0]
    texts: dict[str, list[str]] = {}
    for finding in same:
        texts.setdefault(finding.found, []).append(finding.machine)
    if not first.machine:
        return replace(first, found="; ".join(texts))
    shown = [f"{_machines(machines)}: {text}" for text, machines in texts.items()]
    if len(shown) > _MOST_SHOWN:
        shown = [*shown[:_MOST_SHOWN], f"and {len(shown) - _MOST_SHOWN} more"]
    return replace(first, found="; ".join(shown), machine="")


def _machines(names: Sequence[str]) -> str:
    if len(names) <= _MOST_SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[:_MOST_SHOWN])} and {len(names) - _MOST_SHOWN} more"
