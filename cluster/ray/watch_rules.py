"""Rules of the watch: who is silent, who is stuck, who waits for another one; without Ray.

Of ranks that run collectives among themselves, the one that has entered fewest of them is late. A
rank that has entered more waits for it, also if the late one is between two calls. Where all have
entered as many, they hang in the same one: the first is taken for stuck, and the cause says that it
is one of several.

No process is taken for stuck without evidence. A silent process whose machine does not answer, or
that waits in the kernel (for a file server, say), has as long as a first call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.ray.processes import ProcessLook
from cluster.ray.progress import ProgressReport

FRESH_S = 5.0
"""A report that is older says nothing about the present."""

_UNDECIDED = {"D": "it waits in the kernel (state D)", "t": "a debugger holds it (state t)"}


@dataclass(frozen=True, slots=True)
class WatchLimits:
    """Limits of the watch, in seconds.

    Attributes:
        watch_s: Silence of a process, and the least limit of a call.
        first_call_s: Limit of a call without earlier ones like it, and the most of any call.
        start_s: Limit of building a worker.
        unmeasured: Groups whose calls wait for others by nature, such as storage.
        first_call_of: Other limits than `first_call_s`, by group.
        slack: Multiple of the median of earlier calls.
    """

    watch_s: float
    first_call_s: float
    start_s: float
    unmeasured: frozenset[str] = frozenset()
    first_call_of: Mapping[str, float] = field(default_factory=dict)
    slack: float = 5.0

    def of(self, report: ProgressReport) -> float:
        """Limit of the call that a process is in."""
        if report.method == "build":
            return self.start_s
        is_measured = report.iteration is not None and report.group not in self.unmeasured
        most_s = self.first_call_of.get(report.group, self.first_call_s)
        if not is_measured or not report.num_earlier:
            return most_s
        return min(most_s, max(self.watch_s, self.slack * report.usual_s, 2 * report.longest_s))


@dataclass(frozen=True, slots=True)
class WatchedProcess:
    """A process under watch.

    Attributes:
        actor: Ray's handle.
        partners: What names the processes that it runs collectives with; its own where there are
            none.
        report: Its newest report.
        silent_s: How long ago that came.
        home: Group that it was made for, and its rank; of a process that has not reported its
            workers yet, which may be stopped within its first second.
    """

    actor: Any
    partners: str
    report: ProgressReport
    silent_s: float
    home: tuple[str, int] = ("a process without worker", 0)

    @property
    def name(self) -> str:
        """Group and rank of its call, or of its first worker."""
        group, rank = self.place
        return f"{group} rank {rank}"

    @property
    def place(self) -> tuple[str, int]:
        """(group, rank) of its call, or of its first worker."""
        workers = self.report.workers
        group = self.report.group or next(iter(workers), "")
        return (group, workers.get(group, 0)) if group else self.home


def silent(processes: Sequence[WatchedProcess], limits: WatchLimits) -> list[WatchedProcess]:
    """Processes that have reported nothing for too long."""
    return [one for one in processes if one.silent_s > limits.watch_s]


def cause_of_silence(one: WatchedProcess, seen: ProcessLook | None, limits: WatchLimits) -> str:
    """The accusation of a silent process, in words; empty as long as it has none.

    Args:
        one: The process, silent for more than `watch_s`.
        seen: State of the process; None where its machine does not answer.
        limits: Limits of the watch.
    """
    if seen is None:
        excuse = "its machine does not answer"
    elif seen.is_busy:
        excuse = "it uses a processor all the while"
    else:
        excuse = _UNDECIDED.get(seen.state, "")
    if excuse and one.silent_s < limits.first_call_s:
        return ""
    state = " (stopped)" if seen is not None and seen.state == "T" else ""
    words = f"it was frozen{state}: no sign of life for {one.silent_s:.0f} s, {one.report.call}"
    return f"{words}; {excuse}" if excuse else words


def has_gone_on(one: WatchedProcess, newest: ProgressReport | None, limits: WatchLimits) -> bool:
    """True if a process taken for stuck has reported, or has left the call in which it was stuck.

    Args:
        one: The process, as it was seen before.
        newest: Its report now; None where it has none any more.
        limits: Limits of the watch.
    """
    if newest is None:
        return True
    if one.silent_s > limits.watch_s:
        return newest.count != one.report.count
    # With another call, or none, the seconds would have begun again.
    return newest.seconds < one.report.seconds


def stuck(processes: Sequence[WatchedProcess], limits: WatchLimits) -> list[WatchedProcess]:
    """Processes that are alive, but whose call takes too long, and that wait for no other one."""
    if any(one.silent_s > FRESH_S for one in processes):
        return []
    return [
        one
        for one in processes
        if one.report.method
        and one.report.seconds > limits.of(one.report)
        and not _waits_for_partner(one, processes)
    ]


def cause_of_delay(
    one: WatchedProcess, accused: Sequence[WatchedProcess], limits: WatchLimits
) -> str:
    """The accusation of a stuck process, in words.

    Args:
        one: The process.
        accused: All that are stuck.
        limits: Limits of the watch.
    """
    report = one.report
    words = (
        f"it was stuck {report.call} for {report.seconds:.0f} s, longer than the limit of "
        f"{limits.of(report):.0f} s"
    )
    like = [other.name for other in accused if other is not one and other.partners == one.partners]
    # Both have entered as many collectives, or one of them would wait for the other.
    return f"{words}; so was {', '.join(like)}, as far as it" if like else words


def _waits_for_partner(own: WatchedProcess, processes: Sequence[WatchedProcess]) -> bool:
    """True if a process that runs collectives with this one has entered fewer of them."""
    return any(
        other.report.collectives < own.report.collectives
        for other in processes
        if other is not own and other.partners == own.partners
    )


class StoppedRaylets:
    """Since when the raylets of machines are stopped.

    A machine is named by Ray's id of it: two machines may have raylets of one process id.
    """

    def __init__(self) -> None:
        self._since_s: dict[str, float] = {}

    def stopped_s(self, node: str, state: str, now_s: float) -> float:
        """Seconds for which the raylet of a machine has been stopped by now.

        Args:
            node: Ray's id of the machine.
            state: State of its raylet in one letter.
            now_s: Monotonic time.
        """
        if state != "T":
            self._since_s.pop(node, None)
            return 0.0
        return now_s - self._since_s.setdefault(node, now_s)

    def forgive(self, seconds: float) -> None:
        """Leaves out a time in which no report could be received."""
        self._since_s = {node: since_s + seconds for node, since_s in self._since_s.items()}
