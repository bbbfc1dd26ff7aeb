"""Progress of a process, as it reports it: which call it is in, since when, and that it is alive.

    calls (main thread)       begin, end           a few assignments, no lock
    reporter (own thread)     one report a second  -> Ray's key-value store

The report goes to the control service (GCS) directly, not through an actor call or the raylet, so
it arrives while the main thread computes, while a raylet is frozen, and from any machine of the
cluster; nothing listens on a further port. It outlives the process and says where it was; it goes
when the group is closed, and at the latest with the job, whatever way that ends. One report takes
0.4 ms of a thread that holds no lock meanwhile. A concurrency group of Ray would do the same, but
moves the calls of the actor off the main thread.

Signal SIGUSR2 makes the process write the stacks of its threads to a file beside its log; Python's
lock is not needed for that, so it works for a call that holds it.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections import defaultdict, deque
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import IO, Any

import ray
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from cluster.procfs import born, oom_kills, process_state, raylet_of
from cluster.said import SaidHandler
from cluster.spans import Label

REPORT_EVERY_S = 1.0
# Keys under a job's functions are deleted by the control service itself once the job has ended; for
# any others there is nobody left when a driver is killed.
_NAMESPACE, _OF_JOB = b"fun", "RemoteFunction:{job}:sgmd/"
STACK_SIGNAL = signal.SIGUSR2
_TIMES_KEPT = 50


@dataclass(frozen=True, slots=True)
class ProgressReport:
    """Report of one process.

    Attributes:
        count: Number of the report; one that grows is a sign of life.
        pid: Process id.
        born: Start time of the process in clock ticks, which tells it from a later one of its pid.
        node: Ray's id of its machine.
        address: Address of its machine.
        log: File that its standard error goes to; empty where it is not a file.
        stacks: File that `STACK_SIGNAL` writes to; empty where there is none.
        raylet: Process id of its raylet.
        raylet_state: State of that process, as /proc has it; T is stopped, empty is gone.
        oom_kills: Processes that the system has ended because memory ran out, since its start.
        rss_bytes: Main memory of the process.
        workers: Rank by group of each worker in it.
        group: Group of the call that it is in; empty between calls.
        method: Its method.
        iteration: Iteration that the call is part of; None: of none.
        label: Part of the program and micro-batch, in words.
        seconds: How long the call has been under way, its arguments being there.
        collectives: Collectives that the process has entered since its start, also between calls.
        usual_s: Median seconds of earlier calls like it, the first one left out.
        longest_s: The longest of these.
        num_earlier: How many these are.
        said: The last lines that it has logged, as `cluster.said` holds them.
    """

    count: int
    pid: int
    born: int
    node: str
    address: str
    log: str
    stacks: str
    raylet: int
    raylet_state: str
    oom_kills: int
    rss_bytes: int
    workers: dict[str, int]
    group: str = ""
    method: str = ""
    iteration: int | None = None
    label: str = ""
    seconds: float = 0.0
    collectives: int = 0
    usual_s: float = 0.0
    longest_s: float = 0.0
    num_earlier: int = 0
    said: list[dict[str, Any]] = field(default_factory=list)

    @property
    def call(self) -> str:
        """Its call in words."""
        if not self.method:
            return "between two calls"
        where = [] if self.iteration is None else [f"iteration {self.iteration}"]
        where += [self.label] if self.label else []
        return f"in {self.method}()" + (f" of {', '.join(where)}" if where else "")


class ProgressReporter:
    """Notes the calls of this process and reports them, from a thread of its own.

    Args:
        workers: Rank by group of the workers that live here; read, never changed.
    """

    def __init__(self, workers: dict[str, int]) -> None:
        self._workers = workers
        self._current: tuple[str, str, Label, float] | None = None
        self._times: dict[tuple[str, str], deque[float]] = defaultdict(
            lambda: deque(maxlen=_TIMES_KEPT)
        )
        self._has_run: set[tuple[str, str]] = set()
        self._stacks: IO[str] | None = None
        self._said = SaidHandler(self._place)

    def start(self) -> None:
        """Starts the reports; they end with the process."""
        self._said.listen()
        context = ray.get_runtime_context()
        log = _error_file()
        if folder := Path(log).parent if log else None:
            with suppress(OSError):
                self._stacks = (folder / f"stacks-{os.getpid()}.txt").open("w")
                faulthandler.register(STACK_SIGNAL, self._stacks, all_threads=True)
        fixed = {
            "pid": os.getpid(),
            "born": born(os.getpid()),
            "node": context.get_node_id(),
            "address": ray.util.get_node_ip_address(),
            "log": log,
            "stacks": self._stacks.name if self._stacks else "",
            "raylet": raylet_of(context.get_node_id()),
        }
        key = report_key(context.get_actor_id() or "")
        thread = threading.Thread(
            target=self._report, args=(key, fixed), name="progress", daemon=True
        )
        thread.start()

    def begin(self, group: str, method: str, label: Label) -> None:
        """Notes that a call has begun; its arguments are there."""
        self._current = (group, method, label, time.monotonic())

    def end(self) -> None:
        """Notes that the call has ended."""
        if self._current is None:
            return
        group, method, _, began_s = self._current
        self._current = None
        # The first one compiles, reads files and fills caches, so it says nothing of the others.
        if (group, method) in self._has_run:
            self._times[group, method].append(time.monotonic() - began_s)
        self._has_run.add((group, method))

    def _report(self, key: bytes, fixed: dict[str, Any]) -> None:
        count = 0
        while True:
            count += 1
            report = ProgressReport(
                count=count,
                raylet_state=process_state(fixed["raylet"]),
                oom_kills=oom_kills(),
                rss_bytes=_rss_bytes(),
                workers=dict(self._workers),
                collectives=_collectives_entered(),
                said=self._said.recent(),
                **fixed,
                **self._call(),
            )
            with suppress(Exception):
                # The control service may be restarting; the next report comes in a second.
                _put(key, json.dumps(asdict(report)))
                _obey(report)
            time.sleep(REPORT_EVERY_S)

    def _place(self) -> tuple[str, int, int | None]:
        """Group, rank and iteration of the call under way; between two, of any of its workers."""
        current = self._current
        group = current[0] if current else next(iter(self._workers), "process")
        return group, self._workers.get(group, 0), current[2].iteration if current else None

    def _call(self) -> dict[str, Any]:
        current = self._current
        if current is None:
            return {}
        group, method, label, began_s = current
        times = list(self._times[group, method])
        parts = {"part": label.part, "micro-batch": label.micro_batch}
        return {
            "group": group,
            "method": method,
            "iteration": label.iteration,
            "label": ", ".join(
                f"{name} {value}" for name, value in parts.items() if value is not None
            ),
            "seconds": time.monotonic() - began_s,
            "usual_s": median(times) if times else 0.0,
            "longest_s": max(times, default=0.0),
            "num_earlier": len(times),
        }


_READ: dict[str, ProgressReport] = {}
"""Reports that were read here, by actor id."""


def read_report(actor_id: str) -> ProgressReport | None:
    """The newest report of an actor's process; None where there is none.

    Raises:
        Exception: The control service does not answer.
    """
    data = _internal_kv_get(report_key(actor_id), namespace=_NAMESPACE)
    if not data:
        return None
    names = {each.name for each in fields(ProgressReport)}
    content = {key: value for key, value in json.loads(data).items() if key in names}
    _READ[actor_id] = ProgressReport(**content)
    return _READ[actor_id]


def last_report(actor_id: str) -> ProgressReport | None:
    """The newest report of an actor's process, or the one that was read last here.

    Ray takes a job for ended, and deletes its reports, when the machine of its driver is lost.
    """
    with suppress(Exception):
        if report := read_report(actor_id):
            return report
    return _READ.get(actor_id)


def forget_report(actor_id: str) -> None:
    """Deletes the report of an actor that is gone."""
    _READ.pop(actor_id, None)
    _internal_kv_del(report_key(actor_id), namespace=_NAMESPACE)


def order_end_of_raylet(node: str, raylet: int) -> None:
    """Asks the reporters on a machine to end its raylet, which is frozen and starts no process."""
    _put(_order_key(node), str(raylet))


def report_key(actor_id: str) -> bytes:
    """Key of the report of an actor of this job."""
    return _key(f"progress/{actor_id}")


def _obey(report: ProgressReport) -> None:
    """Ends a stopped raylet that the controller has asked to end."""
    if report.raylet_state != "T":
        return
    order = _internal_kv_get(_order_key(report.node), namespace=_NAMESPACE)
    if order and int(order) == report.raylet:
        os.kill(report.raylet, signal.SIGKILL)


def _order_key(node: str) -> bytes:
    return _key(f"order/{node}")


def _key(name: str) -> bytes:
    return (_OF_JOB.format(job=ray.get_runtime_context().get_job_id()) + name).encode()


def _put(key: bytes, text: str) -> None:
    _internal_kv_put(key, text.encode(), overwrite=True, namespace=_NAMESPACE)


def _collectives_entered() -> int:
    """Collectives of all groups that this process has entered."""
    # Not imported here: whoever looks at a process of another machine would wait for it.
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return 0
    total = 0
    for group in list(dist.distributed_c10d._world.pg_map):
        with suppress(Exception):
            total += group._get_sequence_number_for_group()
    return total


def _rss_bytes() -> int:
    with suppress(OSError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _error_file() -> str:
    """Path of the file that standard error goes to; empty where it is none."""
    with suppress(OSError):
        path = Path("/proc/self/fd/2").readlink()
        return str(path) if path.is_file() else ""
    return ""
