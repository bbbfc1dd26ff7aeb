"""Processes of other machines, looked at and ended: state, stacks, last log lines.

A function of this file runs here where the process is on this machine, and otherwise in a small Ray
task on its machine, which may not answer: it may be gone, or too busy to start a process. Nothing
follows from that for the process. What this file imports is light, because the task waits for it. A
process is named by its id and start time, so a later one with the same id is
left alone.
"""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.procfs import born, cpu_ticks, oom_kills, process_state
from cluster.ray.progress import STACK_SIGNAL
from cluster.redaction import without_secrets

_log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

NUM_LINES = 20
FATAL = "Fatal Python error: "
"""Beginning of what Python writes to a log when a process crashes; its calls follow."""
_LONGEST_LINE = 400
_OWN_END_S = 20.0
_TAIL_BYTES = 64 * 2**10
_STACK_TIMEOUT_S = 8.0
_BUSY_S = 1.0
_TICKS_OF_WORK = 5
# Lines that Ray writes to every log.
_OF_RAY = (":job_id:", ":actor_name:", ":task_name:")


@dataclass(frozen=True, slots=True)
class ProcessLook:
    """Result of a look at a process that its machine has answered for.

    Attributes:
        state: One letter, as /proc has it; empty where the process is gone.
        is_busy: Whether it uses a processor.
        last_lines: The end of its log, secrets blotted out.
        oom_kills: Processes that the system of its machine has ended because memory ran out.
    """

    state: str
    is_busy: bool
    last_lines: tuple[str, ...]
    oom_kills: int

    @property
    def is_gone(self) -> bool:
        """True if the process has ended, although its parent may not have noticed."""
        return self.state in ("", "Z", "X")


def on_machine(
    node: str, timeout_s: float, function: Callable[P, R], /, *args: P.args, **keywords: P.kwargs
) -> R | None:
    """Calls a function on a machine; None where it does not answer.

    Args:
        node: Ray's id of the machine.
        timeout_s: How long to wait for another machine.
        function: A function of a module.
        args: Its arguments.
        keywords: Its arguments by name.
    """
    if node == ray.get_runtime_context().get_node_id():
        return function(*args, **keywords)
    try:
        task = cast(Any, ray.remote(function)).options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        answer = task.remote(*args, **keywords)
    except Exception:
        return None
    try:
        return ray.get(answer, timeout=timeout_s)
    except GetTimeoutError:
        with suppress(Exception):
            ray.cancel(answer)  # Or it would run once the machine has time again.
    except Exception as error:  # The machine may be gone.
        _log.debug("machine %s does not answer: %s", node, error)
    return None


def look_at(pid: int, since: int, log: str, *, is_busy: bool = False) -> ProcessLook:
    """State and last log lines of a process.

    Args:
        pid: Its id.
        since: Its start time, as `born` says it.
        log: Its log.
        is_busy: Whether to find out if it uses a processor, which takes a second.
    """
    state = process_state(pid) if born(pid) == since else ""
    before = cpu_ticks(pid)
    if is_busy and state:
        time.sleep(_BUSY_S)
    busy = is_busy and cpu_ticks(pid) - before >= _TICKS_OF_WORK
    return ProcessLook(state, busy, last_lines(log), oom_kills())


def last_lines(log: str, count: int = NUM_LINES) -> tuple[str, ...]:
    """The last lines of a log, without those that Ray writes to each, and without secrets.

    Of a crash they are the first ones: what happened, and the innermost calls.
    """
    if not log:
        return ()
    try:
        with Path(log).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ()
    lines = [line.rstrip() for line in text.splitlines() if not line.startswith(_OF_RAY)]
    lines = [line for line in lines if line]
    fatal = [place for place, line in enumerate(lines) if line.startswith(FATAL)]
    start = max(0, len(lines) - count)
    start = min(start, fatal[-1]) if fatal else start
    return tuple(without_secrets(line)[:_LONGEST_LINE] for line in lines[start : start + count])


def stacks_of(pid: int, since: int, stacks: str) -> str:
    """Stacks of all threads of a process, by py-spy or by Python itself; never raises.

    Args:
        pid: Its id.
        since: Its start time.
        stacks: File that the process writes to when it receives `STACK_SIGNAL`; may be empty.
    """
    if born(pid) != since:
        return "The process is gone.\n"
    parts = [_kernel_state(pid)]
    found = _by_py_spy(pid)
    if not found and stacks and process_state(pid) != "T":
        found = _by_signal(pid, stacks)
    return "".join([*parts, found or "No stack: py-spy is not there or not permitted.\n"])


def end_process(pid: int, since: int) -> bool:
    """Ends a process at once, a stopped one too; False where it is gone already."""
    if born(pid) != since:
        return False
    with suppress(OSError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def end_actor(actor: ActorHandle, way: str) -> None:
    """Ends an actor by a method of its own, and its process where that takes long.

    Actors that it owns end with its process; what it has reserved does not.

    Args:
        actor: May have ended.
        way: Name of the method.
    """
    ray.wait([getattr(actor, way).remote()], timeout=_OWN_END_S)
    ray.kill(actor)


def _kernel_state(pid: int) -> str:
    """State and the kernel function that it waits in."""
    lines: list[str] = []
    with suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        lines += [line for line in status if line.startswith(("State", "VmRSS", "Threads"))]
    with suppress(OSError):
        lines.append(f"Waits in:\t{Path(f'/proc/{pid}/wchan').read_text() or '?'}")
    return "".join(f"{line}\n" for line in lines)


def _by_py_spy(pid: int) -> str:
    """Stacks by py-spy, which does not stop the process and reads a stopped one, too."""
    beside = Path(sys.executable).with_name("py-spy")
    tool = str(beside) if beside.exists() else shutil.which("py-spy")
    if tool is None:
        return ""
    command = [tool, "dump", "--nonblocking", "--pid", str(pid)]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_STACK_TIMEOUT_S, check=False
        )
        return done.stdout if done.returncode == 0 else ""
    return ""


def _by_signal(pid: int, stacks: str) -> str:
    """Stacks that the process itself has written on `STACK_SIGNAL`."""
    path = Path(stacks)
    with suppress(OSError):
        before = path.stat().st_size
        os.kill(pid, STACK_SIGNAL)
        end_s = time.monotonic() + 1.0
        while time.monotonic() < end_s:
            time.sleep(0.1)
            if path.stat().st_size > before:
                time.sleep(0.1)
                break
        with path.open("rb") as file:
            file.seek(before)
            return file.read().decode(errors="replace")
    return ""
