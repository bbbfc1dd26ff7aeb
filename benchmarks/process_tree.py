"""Processes of a run, by a mark that they inherit in their environment."""

import re
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "SGMD_BENCHMARK_RUN"
"""Variable of the environment by which the processes of a run are found."""
_RAY_PART = re.compile(r"/(gcs_server|raylet|log_monitor|monitor|agent|main)(?:\.py)?(?:\s|$)")


class ProcessTree:
    """CPU seconds and memory of all processes that carry a mark in their environment.

    Args:
        mark: Its value.
    """

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._others: set[tuple[int, float]] = set()
        self._found: dict[tuple[int, float], psutil.Process] = {}
        self._seconds: dict[tuple[int, float], float] = {}
        self._names: dict[tuple[int, float], str] = {}

    def look(self) -> None:
        """Finds new processes and reads the times of all; what has ended keeps its last time."""
        for process in psutil.process_iter():
            key = (process.pid, process.create_time())
            if key in self._others:
                continue
            try:
                if key not in self._found:
                    # An environment may be empty just after a fork: the parent's is looked at then.
                    if process.environ().get(MARK) != self._mark:
                        self._others.add(key)
                        continue
                    self._found[key] = process
                times = process.cpu_times()
                self._seconds[key] = times.user + times.system
                self._names[key] = _name(process.cmdline())
            except psutil.Error:
                self._others.add(key) if key not in self._found else None

    def seconds_by_name(self) -> dict[str, float]:
        """CPU seconds by name of the processes, most first."""
        sums: dict[str, float] = defaultdict(float)
        for key, seconds in self._seconds.items():
            sums[self._names[key]] += seconds
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def memory_mb(self) -> tuple[float, int]:
        """Proportional set size of the processes that live, and how many they are.

        Pages that several share count in parts.
        """
        total, count = 0.0, 0
        for process in self._found.values():
            with suppress(psutil.Error, OSError):
                total += process.memory_full_info().pss / 2**20
                count += 1
        return total, count

    def share_priority(self) -> None:
        """Gives every process found the priority of this one's session (Linux).

        Ray starts processes in sessions of their own, to which `/proc/self/autogroup` does not
        reach: beside other work, what is raised would be compared with what is not.
        """
        own = Path("/proc/self/autogroup")
        if not own.exists():
            return
        nice = own.read_text().split()[-1]
        for process in self._found.values():
            with suppress(OSError):
                Path(f"/proc/{process.pid}/autogroup").write_text(nice)

    def end(self) -> None:
        """Ends every process found."""
        for process in self._found.values():
            try:
                process.kill()
            except psutil.Error:
                continue
        psutil.wait_procs(list(self._found.values()), timeout=30)


def thread_seconds(pid: int) -> tuple[float, float]:
    """CPU seconds of the main thread of a process, and of all its others (Linux).

    A thread that has ended counts no more.
    """
    main, others = 0.0, 0.0
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):
            seconds = int((thread / "schedstat").read_text().split()[0]) / 1e9
            if int(thread.name) == pid:
                main += seconds
            else:
                others += seconds
    return main, others


def _name(command: list[str]) -> str:
    line = " ".join(command)
    part = _RAY_PART.search(line)
    if line.startswith("ray::"):
        # An actor's title names its class and its last method.
        return line.split()[0]
    if part:
        return f"Ray's {part[1]}"
    return "sgmd" if "pipelines.cli" in line else (line[:40] or "ended")
