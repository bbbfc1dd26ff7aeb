"""Stands for the Python interpreter: has a process forked, and ends as that process ends.

It runs before anything is imported, as the executable of which this is the text, beside the socket
of the server:

    python ARGUMENTS...

What the server does not know (an option of the interpreter, a terminal, another environment), and
what comes when there is none, is started by the interpreter itself. Signals go on to the process,
and whoever kills this one kills it.
"""

import json
import os
import resource
import shlex
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

_SETUP, _WORKER = "setup_worker.py", "default_worker.py"
_AGENTS = ("dashboard/agent.py", "runtime_env/agent/main.py")
_OPTIONS = ("-P", "-u")
"""Options of the interpreter that the server knows."""
_CONTEXT = "--serialized-runtime-env-context="
_PR_SET_PDEATHSIG = 1
_LIMITS = {name: getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}


def main() -> None:
    """Runs until the process has ended."""
    own, *arguments = sys.argv
    if arguments[:2] == ["-I", "-S"] and arguments[2:] and arguments[2].endswith(".py"):
        _run_here(arguments[2:])
        return
    address = str(Path(own).with_name("socket"))
    start = _without_setup(_start(arguments))
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    passed = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
    # From before there is a process: what comes meanwhile is for it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, passed)
    if start is None or os.isatty(0) or not _asked(server, address, start, mask):
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.execv(sys.executable, [sys.executable, *arguments])
    pid = 0
    ended = b""
    with server.makefile("rb") as answers:
        pid = int(answers.readline() or 0)
        # Tells the tests which process it is.
        Path("/proc/self/comm").write_text(f"for-{pid}")
        if not pid:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.execv(sys.executable, [sys.executable, *arguments])

        def passing(number: int, _frame: object) -> None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

        for number in passed:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, passing)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        ended = answers.readline()
    if not ended:
        os._exit(1)
    code = os.waitstatus_to_exitcode(int(ended))
    if code < 0:
        # As the process has ended, so that who waits reads the same status. No second core file.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
        os.kill(os.getpid(), -code)
    os._exit(code)


def _run_here(command: list[str]) -> None:
    """Runs a script that asks for the options of this interpreter: it is as good as another one.

    So Ray asks for each of its workers; a start costs 30 ms of a core. What the script becomes by
    `exec` of its interpreter asks the server again.
    """
    Path("/proc/self/comm").write_text("itself")
    sys.executable = sys.argv[0]
    sys.argv = command
    exec(compile(Path(command[0]).read_text(), command[0], "exec"), {"__name__": "__main__"})


def _start(arguments: list[str]) -> list[str] | None:
    """Returns a start that can be forked: -m MODULE, -c CODE or a script; None for any other.

    Options that the server knows come before it.
    """
    if arguments[:1] == ["-B"] and os.environ.get("PYTHONDONTWRITEBYTECODE"):
        # So `multiprocessing` passes a variable on, which is the server's as well.
        arguments = arguments[1:]
    options = 0
    while arguments[options : options + 1] and arguments[options] in _OPTIONS:
        options += 1
    start = arguments[options:]
    if not start or (start[0].startswith("-") and start[0] not in ("-m", "-c")):
        return None
    if start[0] == "-c" and start[1:2] and start[1].startswith("-"):
        return None
    return arguments


def _without_setup(start: list[str] | None) -> list[str] | None:
    """Leaves out the script that Ray puts before a worker's own, and does what it would do.

    A worker and an agent end with their raylet.
    """
    scripts = [Path(word).name for word in (start or [])[:2]]
    is_agent = any(word.endswith(_AGENTS) for word in (start or [])[:2])
    if start is None or not (is_agent or _WORKER in scripts):
        return start
    with suppress(ImportError, OSError, AttributeError):  # A system without it.
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if scripts != [_SETUP, _WORKER]:
        return start
    found = [word.removeprefix(_CONTEXT) for word in start if word.startswith(_CONTEXT)]
    context = json.loads(found[0]) if found else {}
    # Of a job with files of its own: ["cd", FOLDER, "&&"], its folder quoted.
    match context.get("command_prefix") or []:
        case []:
            pass
        case ["cd", folder, "&&"]:
            os.chdir(*shlex.split(folder))
        case _:
            return None
    os.environ.update(context.get("env_vars") or {})
    return [word for word in start[1:] if not word.startswith((_CONTEXT, "--language="))]


def _asked(
    server: socket.socket, address: str, start: list[str], mask: set[signal.Signals | int]
) -> bool:
    """Sends the request with all open files; False if nobody takes it."""
    try:
        files = sorted(
            number
            for number in (int(file.name) for file in Path("/proc/self/fd").iterdir())
            if number != server.fileno() and _is_open(number)
        )
        umask = os.umask(0o22)
        os.umask(umask)
        request = {
            "start": start,
            "files": files,
            "environment": dict(os.environ),
            "folder": str(Path.cwd()),
            "umask": umask,
            "ignored": [
                number
                for number in signal.valid_signals()
                if signal.getsignal(number) is signal.SIG_IGN
            ],
            "blocked": [int(number) for number in mask],
            "limits": {name: resource.getrlimit(number) for name, number in _LIMITS.items()},
        }
        body = json.dumps(request).encode()
        server.connect(address)
        socket.send_fds(server, [len(body).to_bytes(8, "big")], files)
        server.sendall(body)
        return server.recv(1) == b"+"
    except OSError:
        return False


def _is_open(number: int) -> bool:
    try:
        return os.get_inheritable(number)
    except OSError:
        return False


if __name__ == "__main__":
    main()
