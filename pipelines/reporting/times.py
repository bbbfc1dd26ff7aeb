"""Time of a run: seconds by role and stage, busy share of each rank, critical path.

Utilisation is taken as recorded, where `utilisation` in summary.json names roles, or ranks of
them, with their `busy`, `waiting` and `transferring` (shares or seconds). Otherwise a role was busy
for the seconds its stages took, moving tensors in and out included, and waited for the rest of the
run.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from pipelines.reporting.records import RunRecords, finite, numbers

_TOTAL = "total"
_STATES = ("busy", "transferring", "waiting")


@dataclass(frozen=True, slots=True)
class StageTime:
    """Seconds of one stage of one role.

    Attributes:
        role: The role.
        stage: What it did.
        seconds: In the whole run.
        median_s: In an iteration that has this stage.
        share: Of the run's wall-clock time; roles work side by side, so shares may exceed 1.
    """

    role: str
    stage: str
    seconds: float
    median_s: float
    share: float


@dataclass(frozen=True, slots=True)
class Utilisation:
    """Time of one role in a run; shares that add up to 1."""

    role: str
    busy: float
    transferring: float
    waiting: float


def stage_times(run: RunRecords) -> list[StageTime]:
    """Seconds by role and stage, roles by what they cost, the dearest first."""
    found: dict[str, list[float]] = {}
    for line in run.metrics:
        for name, seconds in line.groups.get("seconds", {}).items():
            if name != _TOTAL and math.isfinite(seconds):
                found.setdefault(name, []).append(seconds)
    waits = finite([line.number("data_wait_s") for line in run.metrics])
    times = [_stage_time(name, seconds, run.seconds) for name, seconds in found.items()]
    by_role: dict[str, float] = {}
    for time in times:
        by_role[time.role] = by_role.get(time.role, 0.0) + time.seconds
    times.sort(key=lambda time: (-by_role[time.role], time.role, -time.seconds))
    if waits:
        times.append(_stage_time("data.waiting for captions", waits, run.seconds))
    return times


def utilisation(run: RunRecords) -> tuple[list[Utilisation], bool]:
    """Returns the utilisation of each role, and whether the run has recorded it as such."""
    recorded = run.summary.get("utilisation")
    if isinstance(recorded, Mapping):
        found = [_recorded(str(role), numbers(entry)) for role, entry in recorded.items()]
        known = [entry for entry in found if entry is not None]
        if known:
            return known, True
    if not run.seconds:
        return [], False
    busy: dict[str, float] = {}
    for time in stage_times(run):
        if time.role != "data":
            busy[time.role] = busy.get(time.role, 0.0) + time.seconds
    return [_derived(run, role, seconds) for role, seconds in busy.items()], False


def critical_path(run: RunRecords) -> list[tuple[str, float]]:
    """Stages on the iterations' critical paths, with their share of its length, largest first.

    What is faster elsewhere changes nothing: only these stages decide how long an iteration takes.
    Empty for a run that has not recorded it.
    """
    recorded = run.summary.get("critical_path_s")
    if not isinstance(recorded, Mapping):
        return []
    seconds = {name: spent for name, spent in numbers(recorded).items() if spent > 0}
    total = sum(seconds.values())
    shares = [(name.replace(".", " ").replace("_", " "), s / total) for name, s in seconds.items()]
    return sorted(shares, key=lambda one: -one[1])


def role_seconds(runs: Sequence[RunRecords]) -> list[tuple[str, list[float]]]:
    """Median seconds an iteration of every `role.stage`, one a run; NaN where a run has none."""
    by_run = [{f"{t.role}.{t.stage}": t.median_s for t in stage_times(run)} for run in runs]
    names = dict.fromkeys(name for found in by_run for name in found)
    return [(name, [found.get(name, math.nan) for found in by_run]) for name in names]


def _stage_time(name: str, seconds: Sequence[float], total_s: float) -> StageTime:
    role, _, stage = name.partition(".")
    spent = sum(seconds)
    return StageTime(
        role=role.replace("_", " "),
        stage=stage.replace("_", " "),
        seconds=spent,
        median_s=median(seconds),
        share=spent / total_s if total_s else math.nan,
    )


def _recorded(role: str, entry: Mapping[str, float]) -> Utilisation | None:
    """Shares of what was recorded; names may say their unit, as in `busy_s`."""
    spent = {state: entry.get(state, entry.get(f"{state}_s", 0.0)) for state in _STATES}
    total = sum(spent.values())
    if not total > 0:
        return None
    return Utilisation(role.replace("_", " "), **{state: spent[state] / total for state in _STATES})


def _derived(run: RunRecords, role: str, seconds: float) -> Utilisation:
    key = role.replace(" ", "_")
    counts = [run.setting("topology", key, name) for name in ("replicas", "ranks")]
    processes = math.prod(count for count in counts if isinstance(count, int))
    busy = min(1.0, seconds / run.seconds / max(1, processes))
    return Utilisation(role, busy=busy, transferring=0.0, waiting=1 - busy)
