"""Worker processes of a private cluster, forked off one that has imported their libraries.

Importing torch, diffusers and Ray costs a process ten seconds of a core, and a run in pools has a
process a rank. Here they are imported once:

    controller      offers an executable in place of Python while Ray starts
    raylet          starts a worker as always, by that executable (`fork_client.py`)
      client        sends command, environment and standard streams to the server
        server      imports modules, then forks a process for each request
          worker    runs Ray's own script of a worker; its memory is shared until it is written

The server makes no tensor and starts no thread, so what it forks is as a new interpreter that has
imported the same modules. Threads that libraries start when they are imported (OpenBLAS, OpenCV,
the memory allocator of Arrow) are idle when it forks. Where it cannot help, or is stopped
(SIGSTOP), the interpreter is started instead. A CUDA driver does not survive a fork: on machines
with GPUs there is no server, and the interpreter is always started.

Either way a process ends with its parent, the raylet or the server, at once.
"""

import fcntl
import gc
import json
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from select import select
from typing import Any

from cluster.background import in_background
from cluster.ray.fork_client import SERVER, end_with_parent_at_once
from sgmd_core.collector import paused_collector

_PREFIX, _OWNED = "forks-", "owned"
_CLIENT = Path(__file__).with_name("fork_client.py")
_GPU_DEVICES = ("nvidia[0-9]*", "kfd", "dxg")
_END_TIMEOUT_S = 10.0
_REQUEST_TIMEOUT_S = 5.0
_TOUCH_EVERY_S = 3600.0
_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}
_READ_BY_RAY = ("jsonschema", "google.protobuf.json_format", "msgpack", "pdb", "tracemalloc")
"""Modules of others that Ray imports in every worker, a third of the time of its own import."""


def has_gpus() -> bool:
    """Returns True if this machine has a device file of a GPU; no driver is loaded for it."""
    return any(True for pattern in _GPU_DEVICES for _ in Path("/dev").glob(pattern))


@contextmanager
def serve_forks(modules: Sequence[str], touch_every_s: float = _TOUCH_EVERY_S) -> Iterator[Path]:
    """Runs a fork server; yields an executable that Ray takes for Python.

    Where files of the temporary folder cannot be executed, that is Python itself.

    Args:
        modules: What the server imports. One that cannot be imported is left out: the worker that
            needs it reports the error. Without modules there is no server.
        touch_every_s: How often the files get a new time: systems delete temporary files that are
            some days old, and no process could be started after that.
    """
    _sweep()
    with (
        tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as folder,
        _owning(Path(folder)),
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
        _touching(Path(folder), touch_every_s),
    ):
        # Its mode is 0700: nobody else can ask.
        address, executable = Path(folder, "socket"), Path(folder, "python")
        client = [sys.executable, "-I", "-S", str(_CLIENT), str(address)]
        executable.write_text(f'#!/bin/sh\nexec {shlex.join(client)} "$@"\n')
        executable.chmod(0o700)
        if not os.access(executable, os.X_OK):
            yield Path(sys.executable)
            return
        if not modules:
            yield executable
            return
        listener.bind(str(address))
        # Who asks before the modules are imported waits.
        listener.listen(128)
        server = subprocess.Popen(
            [sys.executable, "-m", __name__, str(listener.fileno()), *modules],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        listener.close()  # The server's own end is the last: without it nobody waits for an answer.
        # Clients look whether it is stopped.
        (Path(folder) / SERVER).write_text(str(server.pid))
        try:
            yield executable
        finally:
            server.kill()
            server.communicate(timeout=_END_TIMEOUT_S)


@contextmanager
def _owning(folder: Path) -> Iterator[None]:
    """Holds a lock on a folder for as long as this process lives."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # From here on a folder without the lock is one whose controller is gone.
        (folder / _OWNED).touch()
        yield
    finally:
        os.close(lock)


def _sweep() -> None:
    """Deletes the folders of controllers that were killed."""
    for mark in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_OWNED}"):
        with suppress(OSError):
            lock = os.open(mark.parent, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for path in mark.parent.iterdir():
                    path.unlink()
                mark.parent.rmdir()
            finally:
                os.close(lock)


@contextmanager
def _touching(folder: Path, every_s: float) -> Iterator[None]:
    """Gives a folder and its files a new time now and then, from a thread."""

    def touch(over: threading.Event) -> None:
        while not over.wait(every_s):
            with suppress(OSError):
                for path in (*folder.iterdir(), folder):
                    os.utime(path)

    with in_background("touch-forks", touch):
        yield


def run_fork_server(listener: socket.socket, modules: Sequence[str]) -> None:
    """Imports modules and forks a process for each request, until the controller is gone."""
    # Also while it is stopped, when it would not see the end of its standard input.
    end_with_parent_at_once()
    # As Ray's own processes of a private cluster: see `cluster.runtime`.
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    with paused_collector():
        for module in (*modules, *_READ_BY_RAY):
            with suppress(Exception):
                import_module(module)
    if "ray" in sys.modules:
        return  # Ray keeps the environment in which it was imported; each worker has its own.
    gc.collect()
    gc.freeze()  # The collector would write to every object, and so copy its memory.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    request = _serve(listener)
    if request is not None:
        _become_worker(request)


def _serve(listener: socket.socket) -> dict[str, Any] | None:
    """Returns a request in the process that was forked for it; None at the controller's end."""
    controller = sys.stdin.fileno()
    while True:
        ready, _, _ = select([controller, listener], [], [])
        if controller in ready:
            return None
        connection, _ = listener.accept()
        # Others wait meanwhile: a client that has been stopped must not hold them up without end.
        connection.settimeout(_REQUEST_TIMEOUT_S)
        streams: list[int] = []
        try:
            request = _receive(connection, streams)
            connection.sendall(b"1")
            # One that has waited too long starts its process by itself, and must not get another.
            if not connection.recv(1):
                raise ConnectionError("the client has gone")
            if os.fork() == 0:
                with _ending_on_error():
                    listener.close()
                    for number, stream in enumerate(streams):
                        os.dup2(stream, number)
                        os.close(stream)
                    connection.detach()  # The client waits for its end, which is this process's.
                return request
            connection.sendall(b"1")
        except (OSError, ValueError):
            pass  # The client has gone, or finds out that it is not served.
        for stream in streams:
            os.close(stream)
        connection.close()


@contextmanager
def _ending_on_error() -> Iterator[None]:
    """Ends a forked process whose preparation fails: it must not go on as a second server."""
    try:
        yield
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _receive(connection: socket.socket, streams: list[int]) -> dict[str, Any]:
    """Returns a request; appends the standard streams that came with it."""
    head, received, _, _ = socket.recv_fds(connection, 8, 3)
    streams += received
    left = int.from_bytes(head, "big")
    parts: list[bytes] = []
    while left:
        parts.append(connection.recv(left))
        if not parts[-1]:
            raise ConnectionError("the client has gone")
        left -= len(parts[-1])
    return json.loads(b"".join(parts))


def _become_worker(request: Mapping[str, Any]) -> None:
    """Runs Ray's script of a worker as a new interpreter would; the caller ends the process."""
    with _ending_on_error():
        end_with_parent_at_once()
        os.setsid()  # At the end of a worker its whole process group is ended.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        time.tzset()
        if "numpy.random" in sys.modules:
            # The global generator was seeded when it was imported.
            sys.modules["numpy.random"].seed()
        script, *_ = sys.argv = request["arguments"]
        sys.path[0] = str(Path(script).parent)
        if request["variables"]:
            from ray._private.utils import update_envs

            update_envs(request["variables"])
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    run_fork_server(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
