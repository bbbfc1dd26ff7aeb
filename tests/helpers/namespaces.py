"""Runs a command as a machine of its own: in namespaces of network, processes and mounts.

    python -m tests.helpers.namespaces INTERPRETER NETWORK FOLDER DISK COMMAND...

    process        goes into the network of this name, and ends as the machine ends
      first        process 1 of the machine: when one of both ends, all that the machine has ends
        server     a fork of this one, which forks the Pythons of the machine (`forked_python.py`)
        COMMAND    the machine ends with it

At the path DISK the machine finds FOLDER. `DISK/python/python` stands for the interpreter there:
what comes of it is in the namespaces and, if this process was forked, begins with the libraries.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.helpers.forked_python import listener_for, serve_forks

_CLONE_NEWNS, _CLONE_NEWPID, _CLONE_NEWNET = 0x00020000, 0x20000000, 0x40000000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_PR_SET_PDEATHSIG = 1
_C = ctypes.CDLL(None, use_errno=True)


def python_of(disk: Path) -> Path:
    """What stands for Python on a machine with this disk."""
    return disk / "python" / "python"


def main(interpreter: str, network: str, folder: str, disk: str, *command: str) -> None:
    """Ends with the status of the command; returns in the processes that a machine's server forks.

    Args:
        interpreter: Python itself.
        network: Name of a network namespace.
        folder: What lies on the disk.
        disk: Where the machine has it.
        command: What runs there.
    """
    with Path("/run/netns", network).open() as namespace:
        _call("setns", namespace.fileno(), _CLONE_NEWNET)
    _call("unshare", _CLONE_NEWNS | _CLONE_NEWPID)
    seen, held = os.pipe()
    first = os.fork()
    if first:
        _, status = os.waitpid(first, 0)
        _end_as(status)
    os.close(held)
    end_with_parent(seen)
    # Before there is a mount of its own, or the others would see it.
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    _mount("proc", "/proc", "proc")
    _mount("sysfs", "/sys", "sysfs")
    _mount(folder, disk, "", _MS_BIND)
    python = python_of(Path(disk))
    python.parent.mkdir()
    listener = listener_for(python, interpreter)
    ends, lives = os.pipe()
    if os.fork():
        listener.close()
        os.close(ends)
        _wait_for(command)
    os.close(lives)
    os.dup2(ends, 0)
    os.close(ends)
    _forget_own_modules()
    serve_forks(listener, str(python))


def end_with_parent(seen: int) -> None:
    """Ends this process when its parent ends, and now if it has ended.

    Process 1 of a namespace does not see a parent outside of it: `getppid` is 0 before and after.

    Args:
        seen: Reading end of a pipe that the parent alone can write to; it is closed.
    """
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if select.select([seen], [], [], 0)[0]:
        os._exit(1)
    os.close(seen)


def _call(name: str, *arguments: object) -> None:
    if getattr(_C, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{name}{arguments}: {os.strerror(ctypes.get_errno())}")


def _mount(source: str, target: str, kind: str, flags: int = 0) -> None:
    texts = (text.encode() for text in (source, target, kind))
    _call("mount", *texts, ctypes.c_ulong(flags), None)


def _wait_for(command: Sequence[str]) -> None:
    """Runs a command and ends with it; of process 1 are all children that others have left."""
    own = subprocess.Popen(command)
    while True:
        pid, status = os.wait()
        if pid == own.pid:
            _end_as(status)


def _end_as(status: int) -> None:
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _forget_own_modules() -> None:
    """What is forked reads the modules of this project, and the paths, that it names itself."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    named = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[1:] = sys.path[1 + len(named) :]


if __name__ == "__main__":
    main(*sys.argv[1:])
