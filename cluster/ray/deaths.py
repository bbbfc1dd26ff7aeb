"""Words for the death of a process or a machine: cause in one sentence, place, last log lines.

Ray says as much as it knows in one long paragraph. The facts in it (killed on request, out of
memory, exit code, node gone) are read, and joined with what the process itself has reported last:
its machine, its log, what lived in it.
"""

import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import ray
from ray.exceptions import RayActorError

from cluster.errors import NodeLostError, WorkerDiedError, WorkerFrozenError
from cluster.ray.processes import FATAL, ProcessLook, look_at, on_machine
from cluster.ray.progress import ProgressReport, last_report

_LOOK_TIMEOUT_S = 10.0
_LOST_AFTER_S = 20.0
"""Ray counts a machine as lost about 14 s after its raylet has ended."""
_WITHOUT_A_WORD = "End of file"
_NODE_GONE = re.compile(
    r"node has died|node was terminated|Owner's node has crashed|has been marked dead",
    re.IGNORECASE,
)
_EXIT_CODE = re.compile(r"exits? with an? exit code (-?\d+)", re.IGNORECASE)
_SIGNAL = re.compile(r"receives? a (SIG[A-Z0-9]+)|\*\*\* (SIG[A-Z0-9]+) received")
_FATAL = re.compile(rf"^{FATAL}(.+)$")
_NO_IMPORT = "failed to import on the worker"
_ERROR_LINE = re.compile(r"^(\w*Error: .+)$", re.MULTILINE)
_PID, _IP = (
    re.compile(r"^\s*pid: (\d+)$", re.MULTILINE),
    re.compile(r"^\s*ip: (\S+)$", re.MULTILINE),
)


@dataclass(frozen=True, slots=True)
class FrozenProcess:
    """A process that the watch has found frozen or stuck.

    Attributes:
        group: Group of the call that it was in.
        rank: Its rank there.
        cause: One sentence.
        report: The last that it reported.
        last_lines: The end of its log.
        dump: File with its stack and those of its partners.
    """

    group: str
    rank: int
    cause: str
    report: ProgressReport
    last_lines: tuple[str, ...]
    dump: str


FROZEN: dict[str, FrozenProcess] = {}
"""Processes that the watch has ended, by actor id: Ray only says that they were killed."""

FROZEN_MACHINES: dict[str, str] = {}
"""Reasons for which the watch has ended a machine's raylet, by Ray's id of the machine."""


def death_of(
    error: RayActorError,
    known: Mapping[str, tuple[str, int]],
    attempted: str,
    others: Mapping[str, tuple[str, int]],
) -> WorkerDiedError | None:
    """The error for a process that is gone; None where it cannot be said whose it was.

    Args:
        error: Ray's error.
        known: (group, rank) by actor id, of the processes that the failed call depends on.
        attempted: What the controller was waiting for.
        others: (group, rank) by actor id, of all processes of the run, for the list of what was on
            a lost machine.
    """
    actor, words = error.actor_id or "", str(error)
    report = last_report(actor)
    place = known.get(actor) or (_first_worker(report) if report else None)
    if lost := _lost_machine(words, report, others, attempted):
        return lost
    if place is None:
        return None
    if actor in FROZEN:
        return _frozen(FROZEN[actor], attempted)
    if report is None:
        pid, ip = _PID.search(words), _IP.search(words)
        return WorkerDiedError(
            *place,
            attempted,
            cause_of(words, (), None, 0),
            ip.group(1) if ip else "",
            int(pid.group(1)) if pid else 0,
        )
    found = _look(report)
    # A machine goes with its processes, and Ray sees these end first.
    is_lost = found is None and _is_lost_soon(report.node)
    if is_lost and (lost := _lost_machine(words, report, others, attempted)):
        return lost
    return _died(place, report, words, attempted, found)


def frozen_or_gone(actor: str, place: tuple[str, int], attempted: str) -> WorkerDiedError | None:
    """The error for a process of this machine that is gone, or one that the watch has ended.

    Returns:
        None where it lives, or is on another machine.
    """
    if actor in FROZEN:
        return _frozen(FROZEN[actor], attempted)
    report = last_report(actor)
    if report is None or report.node != ray.get_runtime_context().get_node_id():
        return None
    found = _look(report)
    if found is None or not found.is_gone:
        return None
    return _died(place, report, _WITHOUT_A_WORD, attempted, found)


def _is_lost_soon(node: str) -> bool:
    """True if Ray says of a machine that does not answer that it is lost, within its own limits."""
    deadline_s = time.monotonic() + _LOST_AFTER_S
    while time.monotonic() < deadline_s:
        if node in lost_machines():
            return True
        time.sleep(0.5)
    return False


def lost_machines() -> set[str]:
    """Ray's ids of the machines that it has lost; empty where it does not answer."""
    with suppress(Exception):
        return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
    return set()


def lost_machine(others: Mapping[str, tuple[str, int]], attempted: str) -> NodeLostError | None:
    """The error for a machine that Ray has lost and that had processes of these actors."""
    return _lost_machine("node has died", None, others, attempted)


def _lost_machine(
    words: str,
    report: ProgressReport | None,
    others: Mapping[str, tuple[str, int]],
    attempted: str,
) -> NodeLostError | None:
    """The error for a machine that is gone, with everything that was on it."""
    gone = lost_machines() | set(FROZEN_MACHINES)
    is_gone = bool(_NODE_GONE.search(words)) or (report is not None and report.node in gone)
    if not is_gone:
        return None
    reports = {actor: found for actor in others if (found := last_report(actor))}
    node = (
        report.node
        if report
        else next((one.node for one in reports.values() if one.node in gone), None)
    )
    if node is None:
        return None
    there = {actor: one for actor, one in reports.items() if one.node == node}
    # A process that has just been built may not have reported its workers yet.
    lost = tuple(
        dict.fromkeys(
            place
            for actor, one in there.items()
            for place in (one.workers.items() if one.workers else (others[actor],))
        )
    )
    if not lost:
        return None
    cause = FROZEN_MACHINES.get(
        node, "its raylet has ended, or Ray's head cannot reach it any more"
    )
    return NodeLostError(*lost[0], attempted, cause, next(iter(there.values())).address, lost)


def _frozen(frozen: FrozenProcess, attempted: str) -> WorkerFrozenError:
    last = frozen.report
    return WorkerFrozenError(
        frozen.group,
        frozen.rank,
        attempted,
        frozen.cause,
        last.address,
        last.pid,
        frozen.last_lines,
        frozen.dump,
    )


def _died(
    place: tuple[str, int],
    report: ProgressReport,
    words: str,
    attempted: str,
    found: ProcessLook | None,
) -> WorkerDiedError:
    """The error for a process that has reported once."""
    lines = found.last_lines if found else ()
    more_kills = found.oom_kills - report.oom_kills if found else 0
    cause = cause_of(words, lines, report, more_kills)
    return WorkerDiedError(*place, attempted, cause, report.address, report.pid, lines)


def _look(report: ProgressReport) -> ProcessLook | None:
    return on_machine(report.node, _LOOK_TIMEOUT_S, look_at, report.pid, report.born, report.log)


def cause_of(
    words: str, lines: Iterable[str], report: ProgressReport | None, more_kills: int
) -> str:
    """One sentence about how a process ended."""
    doing = f", {report.call}" if report else ""
    size = f" with {report.rss_bytes / 2**30:.2g} GiB of main memory" if report else ""
    if "NODE_OUT_OF_MEMORY" in words or "running low on memory" in words:
        return f"Ray ended it because its machine ran low on memory{doing}{size}"
    if "killed by `ray.kill`" in words:
        return f"it was ended by its own run{doing}"
    if _NO_IMPORT in words:
        errors = _ERROR_LINE.findall(words) or [words.strip().splitlines()[-1]]
        return f"its machine lacks something that the process imports: {errors[-1][:200]}"
    if "creation task" in words:
        return f"its process could not be started: {words.strip().splitlines()[-1][:200]}"
    fatal = next((found.group(1) for line in lines if (found := _FATAL.match(line))), None)
    if fatal:
        return f"it crashed with a {fatal[0].lower()}{fatal[1:]}{doing}"
    name = next((found.group(1) or found.group(2) for found in _SIGNAL.finditer(words)), None)
    if name:
        return f"it was ended by {name}{doing}"
    if found := _EXIT_CODE.search(words):
        return f"it ended itself with exit code {found.group(1)}{doing}"
    if more_kills > 0:
        return f"the system ended it because main memory ran out{doing}{size}"
    if _WITHOUT_A_WORD in words:
        return f"it ended without a word, as after SIGKILL{doing}{size}"
    return f"Ray does not say how{doing}"


def _first_worker(report: ProgressReport) -> tuple[str, int] | None:
    if report.group in report.workers:
        return report.group, report.workers[report.group]
    return next(iter(report.workers.items()), None)
