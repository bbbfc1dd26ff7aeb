"""Watchdog over the processes of a run: finds what Ray cannot see, because nothing has ended.

    silent   no report for `silence_s`; a process that computes in native code without letting its
             reporter run is not silent but busy
    stuck    it reports, but its call takes longer than its limit
    stopped raylet   for half of `silence_s`: its machine counts as lost

Limits of a call: until a method has run twice in a process, `first_call_s` (`start_s` for
building); then `slack` times its median, at least `silence_s` and twice the longest so far. A call
that is part of no iteration, or of a group that waits for storage, has `first_call_s` always.

A process that waits is not accused. A call whose arguments have not arrived is not running at all;
of ranks that run collectives among themselves, the one that has entered fewest of them is late; and
nobody counts as stuck while another process is silent. The stacks of the accused and of its
partners are written before it is ended (`ray.kill`, and SIGKILL: a stopped process follows no
request). The calls that wait for it then fail, with `WorkerFrozenError`.

The watch runs in a thread of the controller's process. It waits when that process was itself
stopped, or when the control service does not answer: silence then says nothing.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray

from cluster.procfs import process_state, raylet_of
from cluster.ray.deaths import FROZEN, FROZEN_MACHINES, FrozenProcess
from cluster.ray.group import RayWorkerGroup
from cluster.ray.processes import end_process, look_at, on_machine, stacks_of
from cluster.ray.progress import (
    REPORT_EVERY_S,
    ProgressReport,
    forget_report,
    order_end_of_raylet,
    read_report,
)

_log = logging.getLogger(__name__)

_TIMEOUT_S = 10.0
_QUIET_S = 5.0
_MAX_PARTNERS = 7


@dataclass(frozen=True, slots=True)
class WatchLimits:
    """Limits of the watch, in seconds.

    Attributes:
        silence_s: Silence of a process, and the least limit of a call.
        first_call_s: Limit of a call without earlier ones like it.
        start_s: Limit of building a worker.
        unmeasured: Groups whose calls wait for others by nature, such as storage.
        first_call_of: Other limits than `first_call_s`, by group.
        slack: Multiple of the median of earlier calls.
    """

    silence_s: float
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
        if not is_measured or not report.num_earlier:
            return self.first_call_of.get(report.group, self.first_call_s)
        return max(self.silence_s, self.slack * report.usual_s, 2 * report.longest_s)


@dataclass(frozen=True, slots=True)
class WatchedProcess:
    """A process under watch.

    Attributes:
        actor: Ray's handle.
        partners: What names the processes that it runs collectives with; its own where there are
            none.
        report: Its newest report.
        silent_s: How long ago that came.
    """

    actor: Any
    partners: str
    report: ProgressReport
    silent_s: float

    @property
    def name(self) -> str:
        """Group and rank of its call, or of its first worker."""
        group, rank = self.place
        return f"{group} rank {rank}"

    @property
    def place(self) -> tuple[str, int]:
        """(group, rank) of its call, or of its first worker."""
        workers = self.report.workers
        group = self.report.group or next(iter(workers), "a process without worker")
        return group, workers.get(group, 0)


def silent(processes: Sequence[WatchedProcess], limits: WatchLimits) -> list[WatchedProcess]:
    """Processes that have reported nothing for too long."""
    return [one for one in processes if one.silent_s > limits.silence_s]


def stuck(processes: Sequence[WatchedProcess], limits: WatchLimits) -> list[WatchedProcess]:
    """Processes that are alive, but whose call takes too long, and that wait for no other one."""
    if any(one.silent_s > _QUIET_S for one in processes):
        return []
    return [
        one
        for one in processes
        if one.report.method
        and one.report.seconds > limits.of(one.report)
        and not _waits_for_partner(one, processes)
    ]


def _waits_for_partner(own: WatchedProcess, processes: Sequence[WatchedProcess]) -> bool:
    """True if a process that runs collectives with this one has entered fewer of them."""
    for other in processes:
        if other is own or other.partners != own.partners:
            continue
        if other.report.collectives < own.report.collectives:
            return True
    return False


@contextmanager
def watch_processes(
    groups: Callable[[], Sequence[RayWorkerGroup[Any]]],
    limits: WatchLimits,
    folder: Path,
    on_frozen: Callable[[FrozenProcess], None],
    on_machine_frozen: Callable[[str, str, tuple[str, ...]], None],
) -> Iterator[None]:
    """Watches the processes of a run.

    Args:
        groups: Returns the groups of the run; their processes may change.
        limits: When a process counts as frozen.
        folder: Where stacks are written to.
        on_frozen: Called from the watch's thread before a frozen process is ended.
        on_machine_frozen: Called from there with the address, the cause and the workers of a
            machine before its frozen raylet is ended.
    """
    watch = _Watch(groups, limits, folder, on_frozen, on_machine_frozen)
    thread = threading.Thread(target=watch.run, name="watch-processes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        watch.over.set()
        thread.join(_TIMEOUT_S)


class _Watch:
    def __init__(
        self,
        groups: Callable[[], Sequence[RayWorkerGroup[Any]]],
        limits: WatchLimits,
        folder: Path,
        on_frozen: Callable[[FrozenProcess], None],
        on_machine_frozen: Callable[[str, str, tuple[str, ...]], None],
    ) -> None:
        self.over = threading.Event()
        self._groups = groups
        self._limits = limits
        self._folder = folder
        self._on_frozen = on_frozen
        self._on_machine_frozen = on_machine_frozen
        self._heard: dict[str, tuple[ProgressReport, float]] = {}
        self._ended: set[str] = set()
        self._stopped_raylets: dict[int, float] = {}
        self._own_node = ray.get_runtime_context().get_node_id()
        self._own_raylet = raylet_of(self._own_node)
        self._pause_s = 0.0

    def run(self) -> None:
        """Looks once a second until it is over."""
        last_s = time.monotonic()
        while not self.over.wait(REPORT_EVERY_S):
            now_s = time.monotonic()
            late_s, last_s = now_s - last_s - REPORT_EVERY_S, now_s
            if late_s > _QUIET_S:
                # This process was stopped itself, perhaps with its machine: nobody is accused.
                self._forgive(late_s)
            try:
                self._look()
            except Exception as error:
                if self.over.is_set() or not ray.is_initialized():
                    return
                _log.debug("the watch could not look: %s", error)
                self._forgive(time.monotonic() - now_s + REPORT_EVERY_S)
            last_s = time.monotonic()

    def _forgive(self, seconds: float) -> None:
        """Moves everything that was heard forward by a time in which nothing could be heard."""
        self._heard = {
            actor: (report, heard_s + seconds) for actor, (report, heard_s) in self._heard.items()
        }

    def _look(self) -> None:
        self._look_at_own_raylet()
        processes = self._processes()
        for one in processes:
            self._look_at_raylet(one.report.node, one.report.raylet, one.report.raylet_state)
        for one in silent(processes, self._limits):
            self._judge_silent(one, processes)
        for one in stuck(processes, self._limits):
            self._end(
                one,
                processes,
                f"it was stuck {one.report.call} for {one.report.seconds:.0f} s, longer than the "
                f"limit of {self._limits.of(one.report):.0f} s",
            )

    def _processes(self) -> list[WatchedProcess]:
        """Every process that has reported, with its newest report."""
        found: list[WatchedProcess] = []
        seen: dict[str, tuple[ProgressReport, float]] = {}
        for actor, partners in _actors(self._groups()):
            key = actor._actor_id.hex()
            if key in seen or key in self._ended:
                continue
            report = read_report(key)
            if report is None:
                continue
            now_s = time.monotonic()
            before = self._heard.get(key)
            is_new = before is None or before[0].count != report.count
            heard_s = now_s if is_new or before is None else before[1]
            seen[key] = (report, heard_s)
            found.append(WatchedProcess(actor, partners or key, report, now_s - heard_s))
        for key in self._heard.keys() - seen.keys():
            with suppress(Exception):
                forget_report(key) if key not in self._ended else None
        self._heard = seen
        return found

    def _judge_silent(self, one: WatchedProcess, processes: Sequence[WatchedProcess]) -> None:
        report = one.report
        seen = on_machine(
            report.node, _TIMEOUT_S, look_at, report.pid, report.born, report.log, is_busy=True
        )
        if seen is not None and not seen.state:
            # It is dead; Ray says so to those who wait for it.
            self._ended.add(one.actor._actor_id.hex())
            return
        if seen is not None and seen.is_busy and one.silent_s < self._limits.first_call_s:
            return
        state = " (stopped)" if seen and seen.state == "T" else ""
        self._end(
            one,
            processes,
            f"it was frozen{state}: no sign of life for {one.silent_s:.0f} s, {report.call}",
        )

    def _end(self, one: WatchedProcess, processes: Sequence[WatchedProcess], cause: str) -> None:
        """Writes stacks, reports, and ends a process."""
        report, key = one.report, one.actor._actor_id.hex()
        self._ended.add(key)
        group, rank = one.place
        dump = self._write_stacks(one, processes, cause)
        seen = on_machine(report.node, _TIMEOUT_S, look_at, report.pid, report.born, report.log)
        lines = seen.last_lines if seen else ()
        frozen = FrozenProcess(group, rank, cause, report, lines, dump)
        FROZEN[key] = frozen
        try:
            self._on_frozen(frozen)
        finally:
            # A stopped process holds its GPU until it is killed; Ray does so seconds later.
            on_machine(report.node, _TIMEOUT_S, end_process, report.pid, report.born)
            ray.kill(one.actor)

    def _write_stacks(
        self, one: WatchedProcess, processes: Sequence[WatchedProcess], cause: str
    ) -> str:
        """Writes the stacks of a process and of its partners to one file; returns its path."""
        partners = [
            other
            for other in processes
            if other is not one
            and (other.partners == one.partners or one.report.group in other.report.workers)
        ]
        parts = [f"{one.name}: {cause}\n"]
        for each in [one, *partners[:_MAX_PARTNERS]]:
            report = each.report
            stacks = on_machine(
                report.node, _TIMEOUT_S, stacks_of, report.pid, report.born, report.stacks
            )
            head = f"{each.name} (pid {report.pid} on {report.address}), {report.call}"
            parts.append(f"\n== {head}\n{stacks or 'Its machine does not answer.'}\n")
        group, rank = one.place
        path = self._folder / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{group}-{rank}.txt"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(parts))
        except OSError as error:
            _log.warning("the stacks of %s were not written: %s", one.name, error)
            return ""
        return str(path)

    def _look_at_own_raylet(self) -> None:
        if self._own_raylet:
            state = process_state(self._own_raylet)
            self._look_at_raylet(self._own_node, self._own_raylet, state)

    def _look_at_raylet(self, node: str, raylet: int, state: str) -> None:
        """Ends a raylet that has been stopped for too long: its machine then counts as lost."""
        if state != "T":
            self._stopped_raylets.pop(raylet, None)
            return
        since_s = self._stopped_raylets.setdefault(raylet, time.monotonic())
        for_s = time.monotonic() - since_s
        # Ray then takes 14 s more to see that it has ended.
        if for_s < self._limits.silence_s / 2 or node in FROZEN_MACHINES:
            return
        cause = f"its raylet was frozen (stopped) for {for_s:.0f} s"
        FROZEN_MACHINES[node] = cause
        there = [report for report, _ in self._heard.values() if report.node == node]
        workers = tuple(
            f"{group} rank {rank}" for one in there for group, rank in one.workers.items()
        )
        try:
            self._on_machine_frozen(there[0].address if there else "", cause, workers)
        finally:
            if node == self._own_node:
                with suppress(OSError):
                    os.kill(raylet, signal.SIGKILL)
            else:
                order_end_of_raylet(node, raylet)


def _actors(groups: Sequence[RayWorkerGroup[Any]]) -> Iterator[tuple[Any, str]]:
    """Each process of the groups, and what names those that it runs collectives with."""
    for group in groups:
        yield from group.processes()
