"""Watchdog over the processes of a run: finds what Ray cannot see, because nothing has ended.

    silent   no report for `watch_s`; a process that computes in native code without letting its
             reporter run is not silent but busy
    stuck    it reports, but its call takes longer than its limit
    stopped raylet   for half of `watch_s`: its machine counts as lost

Limits of a call: until a method has run twice in a process, `first_call_s` (`start_s` for
building); then `slack` times its median, at least `watch_s` and twice the longest so far. A call
that is part of no iteration, or of a group that waits for storage, has `first_call_s` always.

A process that waits does not count as stuck: a call whose arguments have not arrived is not
running, no process counts as stuck while another one is silent, and for the rest see
`cluster.ray.watch_rules`. Of ranks that run collectives among themselves one is taken for stuck;
the others cannot go on without it, and are replaced with it. The stacks of this process and of its
partners are written before it is ended (`ray.kill`, and SIGKILL: a stopped process follows no
request). The calls that wait for it then fail, with `WorkerFrozenError`.

The watch runs in a thread of the controller's process. It waits when that process was itself
stopped, or when the control service does not answer, or answers late: silence then says nothing. A
look may take as long as its machine was paused, so the report is read again before a process is
ended: whoever has gone on meanwhile is let off.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import ray

from cluster.procfs import process_state, raylet_of
from cluster.ray.deaths import FROZEN, FROZEN_MACHINES, FrozenProcess, lost_machines
from cluster.ray.group import RayWorkerGroup
from cluster.ray.processes import end_process, look_at, on_machine, stacks_of
from cluster.ray.progress import (
    REPORT_EVERY_S,
    ProgressReport,
    forget_report,
    order_end_of_raylet,
    read_report,
)
from cluster.ray.watch_rules import (
    FRESH_S,
    StoppedRaylets,
    WatchedProcess,
    WatchLimits,
    cause_of_delay,
    cause_of_silence,
    has_gone_on,
    silent,
    stuck,
)
from cluster.said import Hearing, Said

_log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

_TIMEOUT_S = 10.0
_MAX_PARTNERS = 7


@contextmanager
def watch_processes(
    groups: Callable[[], Sequence[RayWorkerGroup[Any]]],
    limits: WatchLimits,
    folder: Path,
    on_frozen: Callable[[FrozenProcess], None],
    on_machine_frozen: Callable[[str, str, tuple[str, ...]], None],
    on_said: Callable[[Said], None] = lambda said: None,
) -> Iterator[None]:
    """Watches the processes of a run.

    Args:
        groups: Returns the groups of the run; their processes may change.
        limits: When a process counts as frozen.
        folder: Where stacks are written to.
        on_frozen: Called from the watch's thread before a frozen process is ended.
        on_machine_frozen: Called from there with the address, the cause and the workers of a
            machine before its frozen raylet is ended.
        on_said: Called from there with each line that a process has logged.
    """
    watch = _Watch(groups, limits, folder, on_frozen, on_machine_frozen, on_said)
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
        on_said: Callable[[Said], None],
    ) -> None:
        self.over = threading.Event()
        self._hearing = Hearing(on_said)
        self._groups = groups
        self._limits = limits
        self._folder = folder
        self._on_frozen = on_frozen
        self._on_machine_frozen = on_machine_frozen
        self._received: dict[str, tuple[ProgressReport, float]] = {}
        self._ended: set[str] = set()
        self._broken: set[str] = set()
        """Groups of partners, one of which has been ended."""
        self._deaf: set[str] = set()
        """Machines that have not answered in this round; each look waits long for them."""
        self._raylets = StoppedRaylets()
        self._own_node = ray.get_runtime_context().get_node_id()
        self._own_raylet = raylet_of(self._own_node)

    def run(self) -> None:
        """Looks once a second until it is over."""
        last_s = time.monotonic()
        while not self.over.wait(REPORT_EVERY_S):
            now_s = time.monotonic()
            late_s, last_s = now_s - last_s - REPORT_EVERY_S, now_s
            if late_s > FRESH_S:
                # This process was stopped itself, perhaps with its machine: no other is to blame.
                self._forgive(late_s)
            try:
                self._look()
            except Exception as error:
                if self.over.is_set() or not ray.is_initialized():
                    return
                _log.debug("the watch could not look: %s", error)
                self._forgive(time.monotonic() - now_s + REPORT_EVERY_S)
            last_s = time.monotonic()
        with suppress(Exception):  # Ray may be gone; what was said last is then lost.
            self._processes()

    def _forgive(self, seconds: float) -> None:
        """Moves all reports forward by a time in which none could be received."""
        now_s = time.monotonic()
        self._received = {
            actor: (report, min(received_s + seconds, now_s))
            for actor, (report, received_s) in self._received.items()
        }
        self._raylets.forgive(seconds)

    def _look(self) -> None:
        self._look_at_own_raylet()
        processes = self._processes()
        for one in processes:
            if one.silent_s <= FRESH_S:
                self._look_at_raylet(one.report.node, one.report.raylet, one.report.raylet_state)
        self._deaf.clear()
        for one in silent(processes, self._limits):
            if one.partners not in self._broken:
                self._judge_silent(one, processes)
        accused = stuck(processes, self._limits)
        for one in accused:
            if one.partners not in self._broken:
                self._end(one, processes, cause_of_delay(one, accused, self._limits))

    def _processes(self) -> list[WatchedProcess]:
        """Every process that has reported, with its newest report."""
        began_s = time.monotonic()
        found: list[tuple[Any, str, str, tuple[str, int]]] = []
        seen: dict[str, tuple[ProgressReport, float]] = {}
        for actor, partners, home in _actors(self._groups()):
            key = actor._actor_id.hex()
            if key in seen or key in self._ended:
                continue
            report = read_report(key)
            if report is None:
                continue
            self._hearing.hear(key, report.said)
            now_s = time.monotonic()
            before = self._received.get(key)
            is_new = before is None or before[0].count != report.count
            received_s = now_s if is_new or before is None else before[1]
            seen[key] = (report, received_s)
            found.append((actor, partners, key, home))
        for key in self._received.keys() - seen.keys():
            with suppress(Exception):
                forget_report(key) if key not in self._ended else None
        self._received = seen
        now_s = time.monotonic()
        if now_s - began_s > FRESH_S:
            # The control service stood still, and has what was reported to it only now.
            self._forgive(now_s - began_s)
        return [
            WatchedProcess(actor, partners or key, report, now_s - received_s, home)
            for actor, partners, key, home in found
            for report, received_s in [self._received[key]]
        ]

    def _judge_silent(self, one: WatchedProcess, processes: Sequence[WatchedProcess]) -> None:
        report = one.report
        seen = self._ask(report.node, look_at, report.pid, report.born, report.log, is_busy=True)
        is_gone = seen.is_gone if seen else report.node in lost_machines()
        if is_gone:
            # Ray says so to those who wait for it.
            self._ended.add(one.actor._actor_id.hex())
        elif cause := cause_of_silence(one, seen, self._limits):
            self._end(one, processes, cause)

    def _ask(
        self, node: str, function: Callable[P, R], /, *args: P.args, **keywords: P.kwargs
    ) -> R | None:
        """Calls a function on a machine, unless that has left a call of this round unanswered."""
        if node in self._deaf:
            return None
        answer = on_machine(node, _TIMEOUT_S, function, *args, **keywords)
        if answer is None:
            self._deaf.add(node)
        return answer

    def _end(self, one: WatchedProcess, processes: Sequence[WatchedProcess], cause: str) -> None:
        """Writes stacks, reports, and ends a process, unless it has gone on meanwhile."""
        report, key = one.report, one.actor._actor_id.hex()
        if has_gone_on(one, read_report(key), self._limits):
            return
        dump = self._write_stacks(one, processes, cause)
        seen = self._ask(report.node, look_at, report.pid, report.born, report.log)
        lines = seen.last_lines if seen else ()
        # The stacks may have taken long, too.
        if has_gone_on(one, read_report(key), self._limits):
            with suppress(OSError):
                Path(dump).unlink() if dump else None
            return
        self._ended.add(key)
        self._broken.add(one.partners)
        group, rank = one.place
        frozen = FrozenProcess(group, rank, cause, report, lines, dump)
        FROZEN[key] = frozen
        try:
            self._on_frozen(frozen)
        finally:
            # A stopped process holds its GPU until it is killed; Ray does so seconds later.
            self._ask(report.node, end_process, report.pid, report.born)
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
            stacks = self._ask(report.node, stacks_of, report.pid, report.born, report.stacks)
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
        for_s = self._raylets.stopped_s(node, state, time.monotonic())
        # Ray then takes 14 s more to see that it has ended.
        if for_s < self._limits.watch_s / 2 or node in FROZEN_MACHINES:
            return
        cause = f"its raylet was frozen (stopped) for {for_s:.0f} s"
        FROZEN_MACHINES[node] = cause
        there = [report for report, _ in self._received.values() if report.node == node]
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


def _actors(
    groups: Sequence[RayWorkerGroup[Any]],
) -> Iterator[tuple[Any, str, tuple[str, int]]]:
    """Each process of the groups, what names its partners in collectives, group and rank."""
    for group in groups:
        for rank, (actor, partners) in enumerate(group.processes()):
            yield actor, partners, (group.name, rank)
