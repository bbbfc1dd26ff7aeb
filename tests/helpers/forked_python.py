"""Python for the processes that tests start, forked off one that has imported the libraries.

A command of `sgmd` imports torch, diffusers and their like for three to five seconds of a core, and
so do the processes it starts; the tests start some hundreds. Each is still a process of its own,
with its own files, environment, limits and end: what it shares is the memory of foreign libraries.
Modules of this project are never among them, so a process reads those that its own path names.

    test        Popen([forked_python(), "-m", "pipelines.cli", ...])
      client    asks the server and waits (`forked_client.py`); signals go on to the process
    server      imports libraries, then forks for each request, and says how the process has ended
      process   a session of its own; ends when its client is gone

Not among the libraries are Ray, which keeps the environment in which it was imported, and what
starts threads.
"""

import atexit
import json
import os
import resource
import runpy
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

PYTHON = sys.executable
"""The interpreter itself, for what must not be forked."""
_CLIENT = Path(__file__).with_name("forked_client.py")
_LIBRARIES = (
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.utils.checkpoint",
    "accelerate",
    "peft",
    "diffusers.models.transformers.transformer_wan",
    "diffusers.models.autoencoders.autoencoder_kl_wan",
    "diffusers.schedulers.scheduling_unipc_multistep",
    "transformers.models.umt5.modeling_umt5",
    "transformers.models.t5.tokenization_t5_fast",
    "ftfy",
    "pyarrow.parquet",
    "pyarrow.compute",
    "s3fs",
    "yaml",
    "PIL.Image",
    "diffusers.schedulers.scheduling_flow_match_euler_discrete",
    "diffusers.pipelines.wan.pipeline_wan",
    "transformers.models.auto",
    "pyarrow.dataset",
    "boto3",
    "av",
    "cv2",
    "pydantic",
    "jinja2",
    "huggingface_hub",
    "packaging.version",
    "tqdm",
)
_COMMANDS = {"sgmd": "pipelines.cli", "ray": "ray.scripts.scripts"}
_READ_AT_IMPORT = (
    *("HF_", "HUGGINGFACE", "TRANSFORMERS_", "DIFFUSERS_", "ACCELERATE_", "TORCH", "PYTORCH_"),
    *("OMP_", "MKL_", "OPENBLAS_", "CUDA_", "OPENCV_", "PYTHONHASHSEED", "PYTHONWARNINGS"),
    *("PYTHONOPTIMIZE", "PYTHONSTARTUP", "PYTHONDONTWRITEBYTECODE", "PYTHONHOME", "LD_", "LANG"),
    *("LC_ALL", "HOME", "TF_", "USE_", "KMP_", "MALLOC_", "FSSPEC_"),
)
"""Beginnings of names of variables that libraries read when they are imported."""
_READ_AT_USE = {"HF_TOKEN", "HUGGINGFACE_HUB_TOKEN", "PYTHONPATH"}


@cache
def forked_python() -> str:
    """Path of an executable that stands for Python; its server lives as long as this process."""
    folder = tempfile.TemporaryDirectory(prefix="py-", dir="/tmp", ignore_cleanup_errors=True)
    address, executable = Path(folder.name, "socket"), Path(folder.name, "python")
    client = [PYTHON, "-I", "-S", str(_CLIENT), str(address)]
    executable.write_text(f'#!/bin/sh\nexec {shlex.join(client)} "$@"\n')
    executable.chmod(0o700)
    # Programs are looked for beside the interpreter.
    for program in Path(PYTHON).parent.iterdir():
        beside = Path(folder.name, program.name)
        if module := _COMMANDS.get(program.name):
            beside.write_text(f'#!/bin/sh\nexec {executable} -m {module} "$@"\n')
            beside.chmod(0o700)
        elif not program.name.startswith("python"):
            beside.symlink_to(program)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(address))
        listener.listen(128)
        environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
        server = subprocess.Popen(
            [PYTHON, __file__, str(listener.fileno()), str(executable)],
            cwd=folder.name,
            env=environment,
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def end() -> None:
        # At the end of its input it ends what it has forked.
        with suppress(subprocess.TimeoutExpired):
            server.communicate(timeout=10)
        server.kill()
        server.wait()
        folder.cleanup()

    atexit.register(end)
    return str(executable)


def forked_process(pid: int) -> int:
    """The process that was forked for a client; any other process is its own."""
    name = Path(f"/proc/{pid}/comm").read_text().strip()
    return int(name.removeprefix("for-")) if name.startswith("for-") else pid


class _Server:
    """Forks a process a request; tells each client how its process has ended."""

    def __init__(self, listener: socket.socket, environment: dict[str, str]) -> None:
        self._listener, self._environment = listener, environment
        self._select = selectors.DefaultSelector()
        self._select.register(0, selectors.EVENT_READ)
        self._select.register(listener, selectors.EVENT_READ)
        self._clients: dict[socket.socket, tuple[int, int]] = {}

    def serve(self) -> dict[str, Any] | None:
        """Returns a request in the process that was forked for it; None at the end of the tests."""
        while True:
            for key, _ in self._select.select():
                if key.fileobj == 0:
                    self._end_all()
                    return None
                if key.fileobj is self._listener:
                    request = self._take()
                    if request is not None:
                        return request
                elif isinstance(key.fileobj, socket.socket):
                    self._client_has_gone(key.fileobj)
                else:
                    self._process_has_ended(key.data)

    def _take(self) -> dict[str, Any] | None:
        client, _ = self._listener.accept()
        client.settimeout(5)
        files: list[int] = []
        try:
            request = _receive(client, files)
            if not _is_same(request["environment"], self._environment):
                client.sendall(b"-")
                raise ValueError("another environment")
            client.sendall(b"+")
            pid = os.fork()
            if pid == 0:
                self._close()
                client.close()
                request["received"] = files
                return request
            handle = os.pidfd_open(pid)
            self._clients[client] = (pid, handle)
            self._select.register(client, selectors.EVENT_READ)
            self._select.register(handle, selectors.EVENT_READ, client)
            client.sendall(b"%d\n" % pid)
        except (OSError, ValueError):
            if client not in self._clients:
                client.close()
        for file in files:
            os.close(file)
        return None

    def _end_all(self) -> None:
        """Leaves no process behind when the tests end, or are killed."""
        for pid, _ in self._clients.values():
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def _client_has_gone(self, client: socket.socket) -> None:
        self._select.unregister(client)
        if client in self._clients:
            os.kill(self._clients[client][0], signal.SIGKILL)

    def _process_has_ended(self, client: socket.socket) -> None:
        pid, handle = self._clients.pop(client)
        _, status = os.waitpid(pid, 0)
        with suppress(KeyError, ValueError):
            self._select.unregister(client)
        self._select.unregister(handle)
        os.close(handle)
        with suppress(OSError):
            client.sendall(b"%d\n" % status)
        client.close()

    def _close(self) -> None:
        self._select.close()
        self._listener.close()
        for client, (_, handle) in self._clients.items():
            client.close()
            os.close(handle)


def _receive(client: socket.socket, files: list[int]) -> dict[str, Any]:
    head, received, _, _ = socket.recv_fds(client, 8, 64)
    files += received
    left = int.from_bytes(head, "big")
    parts: list[bytes] = []
    while left:
        parts.append(client.recv(left))
        if not parts[-1]:
            raise OSError("the client has gone")
        left -= len(parts[-1])
    return json.loads(b"".join(parts))


def _is_same(environment: dict[str, str], ours: dict[str, str]) -> bool:
    """Returns True if the libraries would read what the server's have read."""
    return all(
        environment.get(name) == ours.get(name)
        for name in {*environment, *ours}
        if name.startswith(_READ_AT_IMPORT) and name not in _READ_AT_USE
    )


def _become(request: dict[str, Any], executable: str) -> None:
    """Runs what was asked for as a new interpreter would."""
    os.setsid()
    _take_files(request["files"], request["received"])
    os.umask(request["umask"])
    for name, limit in request["limits"].items():
        resource.setrlimit(getattr(resource, name), tuple(limit))
    for number in request["ignored"]:
        with suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_IGN)
    if signal.SIGINT not in request["ignored"]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    tempfile.tempdir = None
    time.tzset()
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    sys.executable = executable
    how, *rest = request["start"]
    found = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    first = str(Path(how).resolve().parent) if how not in ("-m", "-c") else ""
    sys.path[:] = [first, *found, *sys.path[1:]]
    if how == "-m":
        sys.path[0] = str(Path.cwd())
        sys.argv = ["-m", *rest[1:]]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif how == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"].__dict__
        for name in [name for name in main if not name.startswith("__")]:
            del main[name]
        main.pop("__file__", None)
        exec(compile(rest[0], "<string>", "exec"), main)
    else:
        sys.argv = [how, *rest]
        runpy.run_path(how, run_name="__main__")


def _take_files(numbers: list[int], received: list[int]) -> None:
    """Gives the files that came with a request the numbers that they have at the client."""
    import fcntl

    above = max([*numbers, *received, 100]) + 1
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD, above) for file in received]
    for file in received:
        os.close(file)
    for number, file in zip(numbers, moved, strict=True):
        os.dup2(file, number)
        os.close(file)


def _run(listener: socket.socket, executable: str) -> None:
    import gc

    # Some libraries set variables.
    environment = dict(os.environ)
    gc.disable()
    for library in _LIBRARIES:
        with suppress(Exception):
            import_module(library)
    gc.enable()
    gc.collect()
    gc.freeze()
    assert threading.active_count() == 1
    request = _Server(listener, environment).serve()
    if request is not None:
        _become(request, executable)


if __name__ == "__main__":
    # Where this script lies is no place to import from.
    sys.path.pop(0)
    sys.path.insert(0, "")
    _run(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
