"""Python for the processes that tests start, forked off one that has imported the libraries.

A command of `sgmd` imports torch, diffusers and their like for three to five seconds of a core, and
so do the processes it starts; the tests start some hundreds. Each is still a process of its own,
with its own files, environment, limits and end: what it shares is the memory of foreign libraries.
Modules of this project are never among them, so a process reads those that its own path names.

    test        Popen([forked_python(), "-m", "pipelines.cli", ...])
      client    asks the server and waits (`forked_client.py`); signals go on to the process
    server      imports libraries, then forks for each request, and says how the process has ended
      process   a session of its own; ends when its client is gone
      server    one for each group of settings of Ray: has imported Ray as well, and forks what
                surely imports it

Ray keeps the settings with which it was imported. Not among the libraries is what starts threads,
such as pyarrow.
"""

import atexit
import io
import json
import multiprocessing.spawn
import os
import resource
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from select import select
from typing import Any, NoReturn

import psutil
from execnet.gateway_io import popen_bootstrapline

_INTERPRETER = "SGMD_TESTS_INTERPRETER"
PYTHON = os.environ.get(_INTERPRETER, sys.executable)
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
    "transformers.models.t5.tokenization_t5",
    "ftfy",
    "s3fs",
    "yaml",
    "PIL.Image",
    "diffusers.schedulers.scheduling_flow_match_euler_discrete",
    "diffusers.pipelines.wan.pipeline_wan",
    "transformers.models.auto",
    "boto3",
    "av",
    "cv2",
    "pydantic",
    "jinja2",
    "huggingface_hub",
    "packaging.version",
    "tqdm",
    # Of others, what Ray imports first and most of our commands do.
    "jsonschema",
    "google.protobuf.json_format",
    "msgpack",
    "pdb",
    "tracemalloc",
    "typer",
)
_OF_RAY = (
    "ray",
    "ray.scripts.scripts",
    "ray.job_submission",
    "ray.dashboard.head",
    "ray.dashboard.agent",
    "ray.dashboard.modules.job.job_head",
    "ray.dashboard.modules.job.job_agent",
    "ray.dashboard.modules.job.job_manager",
    "ray.dashboard.modules.reporter.reporter_agent",
    "ray.dashboard.modules.metrics.metrics_head",
    "ray._private.runtime_env.agent.runtime_env_agent",
    "ray._private.log_monitor",
    "ray.autoscaler._private.monitor",
    "ray.autoscaler.v2.monitor",
)
_OF_TESTS = (
    "beartype",
    "jaxtyping",
    "moto.s3.responses",
    "moto.server",
    "optuna",
    "playwright.sync_api",
    "rich.markdown",
    "torch.utils.tensorboard",
    "wandb",
)
"""Of processes of pytest-xdist, which import all tests."""
_USES_RAY = ("ray.scripts.scripts", "pipelines.cli", "pipelines.submitting.in_job")
"""Modules that are run and import Ray, always or for most commands, besides Ray's scripts."""
_OF_ONE_PROCESS = {
    *("RAY_ADDRESS", "RAY_JOB_ID", "RAY_NODE_ID", "RAY_RAYLET_PID"),
    *("RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_JOB_STOP_WAIT_TIME_S", "RAY_USAGE_STATS_ENABLED"),
    *("RAY_LD_PRELOAD_ON_WORKERS", "RAY_IGNORE_UNHANDLED_ERRORS", "RAY_TMPDIR"),
}
"""Variables of Ray that are no settings: it reads them when they are used, or in its workers."""
_RARELY = {"REPORTER_UPDATE_INTERVAL_MS": "3600000", "METRICS_RECORD_INTERVAL_S": "3600"}
"""Settings of Ray's agents and dashboard, which look at all their processes every few seconds."""
_SHARED = "SGMD_TESTS_FORKED_PYTHON"
_AGENTS = ("dashboard/agent.py", "runtime_env/agent/main.py")
"""Ends of the paths of Ray's agents."""
_COMMANDS = {"sgmd": "pipelines.cli", "ray": "ray.scripts.scripts"}
_READ_AT_IMPORT = (
    *("HF_", "HUGGINGFACE", "TRANSFORMERS_", "DIFFUSERS_", "ACCELERATE_", "TORCH", "PYTORCH_"),
    *("OMP_", "MKL_", "OPENBLAS_", "CUDA_", "OPENCV_", "PYTHONHASHSEED", "PYTHONWARNINGS"),
    *("PYTHONOPTIMIZE", "PYTHONSTARTUP", "PYTHONDONTWRITEBYTECODE", "PYTHONHOME", "LD_", "LANG"),
    *("LC_ALL", "HOME", "TF_", "USE_", "KMP_", "MALLOC_", "FSSPEC_"),
)
"""Beginnings of names of variables that libraries read when they are imported."""
_READ_AT_USE = {"HF_TOKEN", "HUGGINGFACE_HUB_TOKEN", "PYTHONPATH", "CUDA_VISIBLE_DEVICES"}
_NO_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"
"""Commands set it before they import what reads it, and so does the server."""
_OF_ANOTHER_OPENMP = {"KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"}
"""Variables that scikit-learn sets for Intel's OpenMP; what torch brings is GNU's."""
_MAY_DIFFER = {*_READ_AT_USE, *_OF_ANOTHER_OPENMP, _NO_BARS}


@cache
def forked_python() -> str:
    """Path of an executable that stands for Python; its server lives as long as this process.

    Processes of tests side by side share the server of the one that has started them.
    """
    if shared := os.environ.get(_SHARED):
        return shared
    folder = tempfile.TemporaryDirectory(prefix="py-", dir="/tmp", ignore_cleanup_errors=True)
    executable = Path(folder.name, "python")
    with listener_for(executable) as listener:
        environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
        environment[_NO_BARS] = "1"
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


def listener_for(executable: Path, interpreter: str = PYTHON) -> socket.socket:
    """Writes an executable that stands for an interpreter; its requests come to what is returned.

    Where this process was forked, `PYTHON` is not an interpreter.
    """
    # Without a shell, which would change the environment.
    executable.write_text(f"#!{interpreter} -IS\n{_CLIENT.read_text()}")
    executable.chmod(0o700)
    # Programs are looked for beside the interpreter.
    for program in Path(interpreter).parent.iterdir():
        beside = executable.with_name(program.name)
        if module := _COMMANDS.get(program.name):
            beside.write_text(f'#!/bin/sh\nexec {executable} -m {module} "$@"\n')
            beside.chmod(0o700)
        elif not program.name.startswith("python"):
            beside.symlink_to(program)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(executable.with_name("socket")))
    listener.listen(128)
    return listener


def share_forked_python() -> str:
    """Lets the processes that this one will start share the server; returns the executable."""
    os.environ[_INTERPRETER] = PYTHON
    os.environ[_SHARED] = forked_python()
    return forked_python()


def take_interpreter() -> None:
    """Has a forked process of tests start new interpreters, as one that was not forked does."""
    sys.executable = PYTHON
    multiprocessing.set_executable(PYTHON)


@contextmanager
def starting_forks() -> Iterator[None]:
    """What this process starts until the block ends is forked, also by `multiprocessing`."""
    own, spawned = sys.executable, multiprocessing.spawn.get_executable()
    sys.executable = forked_python()
    multiprocessing.set_executable(sys.executable)
    try:
        yield
    finally:
        sys.executable = own
        multiprocessing.set_executable(spawned)


def forked_process(pid: int) -> int:
    """The process that was forked for a client; any other process is its own."""
    process = Path(f"/proc/{pid}")
    # What was forked may be heard of before its client knows of it.
    while forked_python() in (process / "cmdline").read_text().split("\0")[:3]:
        name = (process / "comm").read_text().strip()
        if name == "itself":
            break
        if name.startswith("for-") and name != "for-0":
            return int(name.removeprefix("for-"))
        time.sleep(0.001)
    return pid


def processes_below(pid: int) -> list[psutil.Process]:
    """Descendants of a process; below a client is what was forked for it, whose parent is not."""
    found: dict[int, psutil.Process] = {}
    parents = [pid]
    while parents:
        parent = parents.pop()
        with suppress(psutil.Error, OSError):
            below = psutil.Process(parent).children()
            if (forked := forked_process(parent)) != parent:
                below.append(psutil.Process(forked))
            parents += [child.pid for child in below if child.pid not in found]
            found |= {child.pid: child for child in below}
    return list(found.values())


def kill(process: subprocess.Popen[Any]) -> None:
    """Kills what was forked for a client, as a power cut would; returns when both are gone.

    Who kills the client itself kills both as well, but may go on before the other one is gone.
    """
    with suppress(ProcessLookupError):
        os.kill(forked_process(process.pid), signal.SIGKILL)
    process.wait(30)


class _Server:
    """Forks a process a request; tells each client how its process has ended.

    Args:
        listener: Where clients ask; of a server with Ray, where another server passes them on.
        environments: Of processes that would read what the libraries have read.
    """

    def __init__(self, listener: socket.socket, *environments: dict[str, str]) -> None:
        self._environments = environments
        self._serve_at(listener, with_ray=False)

    def _serve_at(self, listener: socket.socket, *, with_ray: bool) -> None:
        self._listener, self._with_ray = listener, with_ray
        self._select = selectors.DefaultSelector()
        self._select.register(0, selectors.EVENT_READ)
        self._select.register(listener, selectors.EVENT_READ)
        self._clients: dict[socket.socket, tuple[int, int]] = {}
        self._servers: dict[frozenset[tuple[str, str]], socket.socket] = {}

    def serve(self) -> dict[str, Any] | None:
        """Returns a request in the process that was forked for it; None at the end of the tests."""
        while True:
            select = self._select
            for key, _ in select.select():
                if key.fileobj == 0:
                    self._end_all()
                    return None
                if key.fileobj is self._listener:
                    request = self._take()
                    if request is not None:
                        return request
                    if self._select is not select:
                        break  # This process has become a server with Ray.
                elif isinstance(key.fileobj, socket.socket):
                    self._client_has_gone(key.fileobj)
                else:
                    self._process_has_ended(key.data)

    def _take(self) -> dict[str, Any] | None:
        """Forks for a request, or passes it on; returns it in the process that is to run it."""
        files: list[int] = []
        if self._with_ray:
            try:
                body = _receive(self._listener, files)
            except OSError:  # The server that passes requests on was killed.
                self._end_all()
                os._exit(1)
            client = socket.socket(fileno=files.pop(0))
        else:
            client, _ = self._listener.accept()
        client.settimeout(5)
        try:
            if not self._with_ray:
                body = _receive(client, files)
            request = json.loads(body)
            if not _is_same(request["environment"], self._environments):
                client.sendall(b"-")
            elif not self._with_ray and _uses_ray(request["start"]):
                server = self._with_settings(_settings_of_ray(request["environment"]))
                if server is not None:
                    _send(server, body, [client.fileno(), *files])
            elif self._fork(client, is_of_tests=popen_bootstrapline in request["start"]):
                request["received"] = files
                if self._with_ray:
                    # As Ray leaves it when it is imported.
                    request["environment"]["RAY_CLIENT_MODE"] = "0"
                return request
        except (OSError, ValueError):
            pass
        if client not in self._clients:
            client.close()
        for file in files:
            os.close(file)
        return None

    def _fork(self, client: socket.socket, *, is_of_tests: bool) -> bool:
        """Returns True in the fork, and False in the server."""
        client.sendall(b"+")
        if is_of_tests:
            _import(_OF_TESTS)
        pid = os.fork()
        if pid == 0:
            self._close()
            client.close()
            return True
        handle = os.pidfd_open(pid)
        self._clients[client] = (pid, handle)
        self._select.register(client, selectors.EVENT_READ)
        self._select.register(handle, selectors.EVENT_READ, client)
        client.sendall(b"%d\n" % pid)
        return False

    def _with_settings(self, settings: frozenset[tuple[str, str]]) -> socket.socket | None:
        """Returns the way to the server that has imported Ray with these settings.

        Where there is none, one is forked: in it this returns None, and it serves from then on.
        """
        if settings not in self._servers:
            self._servers[settings], far = socket.socketpair()
            if os.fork() == 0:
                self._close()
                for name in [name for name in os.environ if name.startswith("RAY_")]:
                    del os.environ[name]
                os.environ.update(settings)
                os.environ.update(_RARELY)
                _import(_OF_RAY)
                self._serve_at(far, with_ray=True)
                return None
            far.close()
        return self._servers[settings]

    def _end_all(self) -> None:
        """Leaves no process behind when the tests end, or are killed."""
        for pid, _ in self._clients.values():
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def _client_has_gone(self, client: socket.socket) -> None:
        if client in self._clients:  # Else its process has ended at the same moment.
            self._select.unregister(client)
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
        for server in self._servers.values():
            server.close()


def _send(way: socket.socket, body: bytes, files: list[int]) -> None:
    socket.send_fds(way, [len(body).to_bytes(8, "big")], files)
    way.sendall(body)


def _receive(client: socket.socket, files: list[int]) -> bytes:
    head, received, _, _ = socket.recv_fds(client, 8, 64)
    files += received
    if not head:
        raise OSError("the client has gone")
    left = int.from_bytes(head, "big")
    parts: list[bytes] = []
    while left:
        parts.append(client.recv(left))
        if not parts[-1]:
            raise OSError("the client has gone")
        left -= len(parts[-1])
    return b"".join(parts)


def _uses_ray(start: Sequence[str]) -> bool:
    """Returns True for commands of this project, and of Ray, that are likely to import Ray.

    Not for its workers: when it is imported, Ray reads which job and which raylet they belong to.
    """
    how, *rest = [word for word in start if word not in ("-P", "-u")]
    if how == "-c":
        return rest[0] == popen_bootstrapline  # A process of pytest-xdist.
    if how == "-m":
        return rest[0] in _USES_RAY
    return "/site-packages/ray/" in how and not how.endswith("_worker.py")


def _settings_of_ray(environment: dict[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset(
        (name, text)
        for name, text in environment.items()
        if name.startswith("RAY_") and name not in _OF_ONE_PROCESS
    )


def _import(libraries: Sequence[str]) -> None:
    """Imports what forks are to share; the collector would write to every object of it."""
    import gc

    gc.disable()
    for library in libraries:
        with suppress(Exception):
            import_module(library)
    gc.enable()
    gc.collect()
    gc.freeze()
    # What forks has one thread: a lock that another one holds would stay closed for ever.
    assert len(os.listdir("/proc/self/task")) == 1  # noqa: PTH208


def _is_same(environment: dict[str, str], ours: Sequence[dict[str, str]]) -> bool:
    """Returns True if the libraries would read what the server's have read, or have set.

    The allocator that Ray loads into processes of its own is no difference.
    """
    if environment.get("LD_PRELOAD", "").endswith("/ray/core/libjemalloc.so"):
        environment = {name: text for name, text in environment.items() if name != "LD_PRELOAD"}
    return all(
        environment.get(name) in [own.get(name) for own in ours]
        for name in {*environment, *(name for own in ours for name in own)}
        if _is_read_at_import(name)
    )


def _is_read_at_import(name: str) -> bool:
    return name.startswith(_READ_AT_IMPORT) and name not in _MAY_DIFFER


@contextmanager
def kept_environment() -> Iterator[None]:
    """Takes back what libraries write into the environment, as torch does when it compiles.

    A process that is started with other variables cannot be forked.
    """
    before = {name: text for name, text in os.environ.items() if _is_read_at_import(name)}
    try:
        yield
    finally:
        for name in [name for name in os.environ if _is_read_at_import(name)]:
            if name not in before:
                del os.environ[name]
        os.environ.update(before)


def _run(request: dict[str, Any], executable: str) -> NoReturn:
    """Runs what was asked for and ends, but takes no module apart.

    An interpreter does so last, after all that can be seen of its end. With these libraries that
    is a third of a second of a core: it writes to all memory that the fork shares.
    """
    # What is run takes the place of this module, whose names are gone afterwards.
    import atexit
    import os
    import signal
    import sys
    import threading

    code, stopped = 0, False
    try:
        _become(request, executable)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and not isinstance(end.code, int):
            sys.stderr.write(f"{end.code}\n")
    except BaseException as error:
        code, stopped = 1, isinstance(error, KeyboardInterrupt)
        sys.excepthook(type(error), error, error.__traceback__)
    # Waits for threads; the interpreter has no public name for it.
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError:
            code = 120
    if stopped:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


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
    multiprocessing.set_executable(executable)
    how, *rest = request["start"]
    options: set[str] = set()
    while how in ("-P", "-u"):
        options.add(how)
        how, *rest = rest
    if "-u" in options:
        _write_at_once()
    if how.endswith(_AGENTS):
        # An agent ends when its parent is another one; its client ends with the raylet.
        os.environ["RAY_RAYLET_PID"] = str(os.getppid())
    found = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    first = str(Path(how).resolve().parent) if how not in ("-m", "-c") else ""
    sys.path[:] = [*([] if "-P" in options else [first]), *found, *sys.path[1:]]
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
        # A server in a module of its own has these, and what `multiprocessing` starts reads them.
        main |= {"__spec__": None, "__package__": None}
        exec(compile(rest[0], "<string>", "exec"), main)
    else:
        sys.argv = [how, *rest]
        runpy.run_path(how, run_name="__main__")


def _write_at_once() -> None:
    """Takes the buffers away from standard output and standard error."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        own = getattr(sys, name)
        raw = open(number, "wb", buffering=0, closefd=False)  # noqa: SIM115
        setattr(sys, name, io.TextIOWrapper(raw, own.encoding, own.errors, write_through=True))


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


def serve_forks(listener: socket.socket, executable: str) -> None:
    """Forks for every request until standard input ends; a fork ends as an interpreter does."""
    # Some libraries set variables.
    environment = dict(os.environ)
    if listener not in select([listener, sys.stdin], [], [])[0]:
        return  # The tests have ended, and nobody has asked.
    _import(_LIBRARIES)
    request = _Server(listener, environment, dict(os.environ)).serve()
    if request is not None:
        _run(request, executable)


if __name__ == "__main__":
    # Where this script lies is not a place to import from.
    sys.path.pop(0)
    sys.path.insert(0, "")
    serve_forks(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
