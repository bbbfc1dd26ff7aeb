"""Times of a run, gathered from every role and rank, iteration by iteration.

    seconds by role and stage   each iteration's, for metrics.jsonl
    utilisation                 busy, transferring, waiting by role and rank, of the whole run
    critical path               which calls decided how long the iterations took
    trace.json                  every call of the last iterations, for ui.perfetto.dev

All times are put on one clock. Processes of one machine share its monotonic clock; each machine is
given one offset to the time of the day when it is first seen, so between machines times compare as
well as their clocks agree.
"""

import json
import os
import time
from collections import defaultdict, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.chrome_trace import trace_events
from cluster.local import OWN_MACHINE
from cluster.measured import (
    MeasuredUsage,
    Rank,
    key_of_call,
    key_of_work,
    measured_timeline,
    path_seconds,
)
from cluster.schedule.execution import IssuedCall
from cluster.schedule.program import Process
from cluster.schedule.simulate import Timeline
from cluster.spans import Work
from cluster.storage import write_text
from cluster.worker_group import Future, WorkerGroup


@dataclass(frozen=True, slots=True)
class _Iteration:
    """An iteration whose calls are all known."""

    issued: tuple[IssuedCall, ...]
    works: tuple[Work, ...]


class RunTrace:
    """Gathers what the ranks have noted.

    Args:
        groups: Whose work is asked for after every iteration.
        beside: Groups that may be busy with other things for long; asked at the end alone.
        keep_iterations: Of which every call is kept for trace.json.
        timeout_s: How long to wait for an answer.
        waits: Whether the ranks are idle between iterations, so that asking them costs no time;
            otherwise the answers are collected one iteration later.
    """

    def __init__(
        self,
        groups: Sequence[WorkerGroup[Any]],
        beside: Sequence[WorkerGroup[Any]],
        keep_iterations: int,
        timeout_s: float,
        *,
        waits: bool,
    ) -> None:
        self._groups = groups
        self._beside = beside
        self._timeout_s = timeout_s
        self._waits = waits
        self._keep_iterations = keep_iterations
        self._offsets: dict[Rank, float] = {}
        self._processes: dict[Rank, Process] = {}
        self._own_offset_s = time.time() - time.monotonic()
        self._machines: dict[str, float] = {}
        self._read_clocks((*groups, *beside))
        self._answers: list[tuple[WorkerGroup[Any], list[Future[list[Work]]]]] = []
        self._open: dict[int, tuple[IssuedCall, ...]] = {}
        self._works: dict[int, list[Work]] = defaultdict(list)
        self._kept: deque[_Iteration] = deque(maxlen=keep_iterations)
        self._others: deque[Work] = deque(maxlen=10_000)
        self._usage: dict[Rank, MeasuredUsage] = defaultdict(MeasuredUsage)
        self._free_s: dict[Process, float] = {}
        self._num_complete = 0
        self._path_s = defaultdict[str, float](float)
        self._began_s: float | None = None
        self._ended_s = 0.0

    def add(self, iteration: int, issued: Sequence[IssuedCall]) -> dict[str, float]:
        """Takes in an iteration that is over.

        Returns:
            Busy seconds by `role.stage` since the last iteration, moving values included.
        """
        own = tuple(replace(one, issued_s=one.issued_s + self._own_offset_s) for one in issued)
        if self._began_s is None:
            self._began_s = own[0].issued_s
        self._open[iteration] = own
        if self._waits:
            self._ask(self._groups)
        seconds = self._hear()
        if not self._waits:
            self._ask(self._groups)
        return seconds

    def rewind(self, iteration: int, replaced: Collection[str]) -> None:
        """Forgets the iterations from this one on, which will be made again.

        Args:
            iteration: The first to forget.
            replaced: Names of groups that have new processes.
        """
        self._answers, self._open = [], {}
        self._works.clear()
        self._num_complete = min(self._num_complete, iteration)
        kept = [one for one in self._kept if one.issued[0].call.iteration < iteration]
        self._kept = deque(kept, maxlen=self._keep_iterations)
        for group in self._groups:
            # Work of calls that were given up, under labels that will be used again.
            group.fetch(group.ask_work(), self._timeout_s, f"reading the times of {group.name}")
        self._read_clocks([group for group in self._groups if group.name in replaced])

    def close(self, silent: Sequence[WorkerGroup[Any]] = ()) -> None:
        """Asks every process once more; call it when nothing is under way.

        Args:
            silent: Groups that would not answer.
        """
        beside = [group for group in self._beside if group not in silent]
        # Their processes may have been replaced, on other machines, while the run went on.
        self._read_clocks(beside)
        self._ask((*self._groups, *beside))
        self._hear()

    def utilisation(self) -> dict[str, dict[str, float]]:
        """Seconds busy, transferring and waiting of each rank that a schedule asks."""
        if self._began_s is None:
            return {}
        whole_s = self._ended_s - self._began_s
        sizes = defaultdict[str, int](int)
        for role, _ in self._usage:
            sizes[role] += 1
        return {
            role if sizes[role] == 1 else f"{role}[{rank}]": {
                "busy_s": used.busy_s,
                "transferring_s": used.transferring_s,
                "waiting_s": max(0.0, whole_s - used.busy_s - used.transferring_s),
            }
            for (role, rank), used in sorted(self._usage.items())
        }

    def critical_path(self) -> dict[str, float]:
        """Seconds of the iterations' critical paths by `role.stage`, the longest first."""
        return dict(sorted(self._path_s.items(), key=lambda item: -item[1]))

    def write(self, path: Path) -> None:
        """Writes the trace of the last iterations."""
        if not self._kept:
            return
        since_s = self._kept[0].issued[0].issued_s
        works = [work for one in self._kept for work in one.works]
        works += [work for work in self._others if work.left_s >= since_s]
        events = trace_events(works, [one.issued for one in self._kept])
        content = {
            "traceEvents": events,
            "displayTimeUnit": "ms",
            "otherData": {
                "clock": "microseconds since 1970; exact within a machine, by the machines' own"
                " clocks between them",
                "machines": len(self._machines),
                "iterations": [one.issued[0].call.iteration for one in self._kept],
            },
        }
        write_text(str(path), json.dumps(content) + "\n")

    def _read_clocks(self, groups: Sequence[WorkerGroup[Any]]) -> None:
        for group in groups:
            for rank, clock in enumerate(group.clocks()):
                offset_s = self._machines.setdefault(clock.machine, clock.offset_s)
                self._offsets[group.name, rank] = offset_s
                self._processes[group.name, rank] = (clock.machine, clock.process)

    def _ask(self, groups: Sequence[WorkerGroup[Any]]) -> None:
        self._answers += [(group, group.ask_work()) for group in groups]

    def _hear(self) -> dict[str, float]:
        seconds = defaultdict[str, float](float)
        for group, answers in self._answers:
            attempted = f"reading the times of {group.name}"
            for part in group.fetch(answers, self._timeout_s, attempted):
                for work in part:
                    seconds[f"{work.role}.{work.method}"] += work.seconds
                    self._sort(work)
        self._answers = []
        for iteration in list(self._open):
            self._complete(iteration)
        return dict(seconds)

    def _sort(self, work: Work) -> None:
        """Puts a call on the common clock, and where it belongs."""
        offset_s = self._offsets[work.role, work.rank]
        times = {
            name: getattr(work, name) + offset_s
            for name in ("arrived_s", "began_s", "ended_s", "left_s")
        }
        placed = replace(work, **times)
        iteration, part = work.label.iteration, work.label.part
        if iteration is not None and part is not None and iteration >= self._num_complete:
            self._works[iteration].append(placed)
        else:
            self._others.append(placed)

    def _complete(self, iteration: int) -> None:
        """Works out an iteration, if everything is known of it."""
        issued, works = self._open[iteration], self._works[iteration]
        by_key = {key_of_work(work): work for work in works}
        if any(key_of_call(one) not in by_key for one in issued):
            return
        own = (OWN_MACHINE, os.getpid())
        timeline = measured_timeline(issued, by_key, self._processes, own)
        since_s = max(0.0, self._ended_s - issued[0].issued_s)
        for name, spent_s in path_seconds(timeline, since_s).items():
            self._path_s[name] += spent_s
        self._count(timeline, issued, by_key)
        if self._keep_iterations:
            self._kept.append(_Iteration(issued, tuple(works)))
        del self._open[iteration], self._works[iteration]
        self._num_complete = iteration + 1

    def _count(
        self, timeline: Timeline, issued: Sequence[IssuedCall], by_key: dict[Any, Work]
    ) -> None:
        began_s = issued[0].issued_s
        for span, one in zip(timeline.spans, issued, strict=True):
            work = by_key[key_of_call(one)]
            rank = (work.role, work.rank)
            process = self._processes[rank]
            could_begin_s = max(began_s + span.issued_s, began_s + span.ready_s)
            could_begin_s = max(could_begin_s, self._free_s.get(process, 0.0))
            # Without arguments from others nothing is on its way.
            self._usage[rank].add(work, could_begin_s if one.call.inputs else work.arrived_s)
            self._free_s[process] = work.left_s
            self._ended_s = max(self._ended_s, work.left_s)
