"""Asks the fork server for a process, and ends when that process has ended.

Stands for the Python interpreter in the commands by which Ray starts processes, so it runs before
anything is imported:

    fork_client.py SOCKET SCRIPT ARGUMENTS...

What is not a plain worker, or comes when the server is gone or stopped (SIGSTOP), is started by the
interpreter itself.
Either way a process ends with its parent: Ray's agents notice the end of their raylet, but try for
a minute to report it to a control service that is gone as well.
"""

import json
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

_SETUP, _WORKER = "setup_worker.py", "default_worker.py"
_CONTEXT = "--serialized-runtime-env-context="
_PR_SET_PDEATHSIG = 1
_ITS_OWN = ("command_prefix", "override_worker_entrypoint", "java_jars")
SERVER = "server"
"""File beside the socket with the number of the server's process."""
_LOOK_EVERY_S, _LOOKS, _SEND_S = 1.0, 3, 30.0


def ask_for_process() -> None:
    """Runs until the process has ended."""
    address, *command = sys.argv[1:]
    end_with_parent_at_once()
    variables = _variables(command)
    if variables is None or not _forked(address, command, variables):
        os.execv(sys.executable, [sys.executable, *command])


def end_with_parent_at_once() -> None:
    """Asks the kernel to end this process, and what it becomes by `exec`, with its parent."""
    parent = os.getppid()
    with suppress(ImportError, OSError, AttributeError):  # A system without it.
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _variables(command: list[str]) -> dict[str, str] | None:
    """Returns the variables of a worker's runtime environment; None if it is not a plain worker.

    With a runtime environment Ray puts a script before the worker's own. The environment may name
    an interpreter or a container.
    """
    scripts = [Path(word).name for word in command[:2]]
    if scripts[:1] == [_WORKER]:
        return {}
    if scripts != [_SETUP, _WORKER]:
        return None
    found = [word.removeprefix(_CONTEXT) for word in command if word.startswith(_CONTEXT)]
    context = json.loads(found[0]) if found else {}
    if any(context.get(name) for name in _ITS_OWN):
        return None
    if context.get("py_executable", sys.executable) != sys.executable:
        return None
    return context.get("env_vars") or {}


def _forked(address: str, command: list[str], variables: dict[str, str]) -> bool:
    """Waits for the end of a forked process; False if the server has made none."""
    first = int(Path(command[0]).name == _SETUP)
    words = [word for word in command[first:] if not word.startswith((_CONTEXT, "--language="))]
    try:
        request = {
            "arguments": words,
            "environment": dict(os.environ),
            "variables": variables,
            "folder": str(Path.cwd()),
        }
        body = json.dumps(request).encode()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            server.settimeout(_SEND_S)
            server.connect(address)
            socket.send_fds(server, [len(body).to_bytes(8, "big")], [0, 1, 2])
            server.sendall(body)
            if not _is_answered(server, Path(address).with_name(SERVER)):
                return False
            server.settimeout(None)
            # From here on the server alone may start the process; before, it waits for this word.
            server.sendall(b"1")
            if not server.recv(1):
                return False
            # The forked process holds the other end until it ends.
            server.recv(1)
            return True
    except OSError:
        return False


def _is_answered(server: socket.socket, number: Path) -> bool:
    """Waits for the server's answer, which may be importing; False where there will be none."""
    server.settimeout(_LOOK_EVERY_S)
    looks = 0
    while looks < _LOOKS:
        try:
            return bool(server.recv(1))
        except TimeoutError:
            looks = looks + 1 if _is_stopped(number) else 0
    return False


def _is_stopped(number: Path) -> bool:
    """Returns True if the process that a file names is stopped."""
    try:
        stat = Path(f"/proc/{number.read_text()}/stat").read_text()
    except OSError:
        return False
    # number (name) state ...: a name may hold anything.
    return stat.rpartition(")")[2].split()[:1] in (["T"], ["t"])


if __name__ == "__main__":
    ask_for_process()
