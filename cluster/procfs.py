"""Processes of this machine as Linux shows them in /proc: state, start, processor time."""

from contextlib import suppress
from pathlib import Path


def born(pid: int) -> int:
    """Start time of a process in clock ticks since the start of the machine; 0 where it is gone."""
    found = _stat(pid)
    return int(found[19]) if found else 0


def process_state(pid: int) -> str:
    """State of a process in one letter, as /proc has it; empty where it is gone."""
    found = _stat(pid)
    return found[0] if found else ""


def is_running(pid: int, since: int) -> bool:
    """Returns True if a process has not ended; one that ended may still be in /proc.

    Args:
        pid: Its id.
        since: Its start time, as `born` says it.
    """
    found = _stat(pid)
    return bool(found) and found[0] not in ("Z", "X") and int(found[19]) == since


def cpu_ticks(pid: int) -> int:
    """Processor time of a process in clock ticks."""
    found = _stat(pid)
    return int(found[11]) + int(found[12]) if found else 0


def oom_kills() -> int:
    """Processes that the system has ended because memory ran out since its start."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def raylet_of(node: str) -> int:
    """Process id of the raylet of this machine; 0 where it is not found.

    Args:
        node: Ray's id of the machine.
    """
    mark = f"--node_id={node}".encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if mark in path.read_bytes().split(b"\0"):
                return int(path.parent.name)
    return 0


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name, which may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode().split()
    except OSError:
        return []
