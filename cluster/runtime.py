"""Ray, started for the length of a run: a private cluster on this machine, or one that exists.

    address None      the cluster named by RAY_ADDRESS (so inside a submitted job), else a new one
    address "auto"    the cluster that runs on this machine
    address "h:port"  that cluster

A new cluster admits only processes that know its token. Ray would write the token into the home
directory, readable by everyone on the machine; here it lives in the environment of this process and
of those it starts. A mode or token that the user chose (RAY_AUTH_MODE, RAY_AUTH_TOKEN,
RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token) is left alone. All sockets of a new cluster listen on the
loopback interface. A cluster that exists is asked whether it wants a token: where it wants none,
whoever reaches its ports can run code on it, and a warning says so. A start that a busy machine did
not make in time is tried once more.
"""

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

import ray
from ray._private import ray_constants, services
from ray._private.node import Node

from cluster.background import in_background
from cluster.errors import RayStartError
from cluster.procfs import process_state, raylet_of
from cluster.ray.fork_server import has_gpus, serve_forks
from cluster.storage_errors import room_at
from cluster.tokens import (
    PROBE_TIMEOUT_S,
    asked_with,
    create_token,
    own_token,
    send_token,
    warn_without_token,
)

_log = logging.getLogger(__name__)

_GRACE_S = 10.0
_SYSTEM_SETTINGS = {
    "task_events_max_num_task_in_gcs": 10_000,
    "prestart_worker_first_driver": False,
}
"""Settings of Ray in a new cluster. Its control service remembers the last 100,000 calls by
default, 250 MB of them, for its dashboard, which a new cluster does not have. It would also start a
worker for each core in advance, of which a run uses few, and wait for them without a limit where
they abort."""
_NO_HANDLER_IN_C = "RAY_DISABLE_FAILURE_SIGNAL_HANDLER"
_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}


@contextmanager
def start_ray(
    address: str | None = None,
    num_cpus: int | None = None,
    object_store_memory: int | None = None,
    temp_dir: str | None = None,
    log_to_driver: bool = False,
    preload: Sequence[str] = (),
) -> Iterator[None]:
    """Connects this process to Ray, and disconnects it at the end.

    A process that is connected already stays so, before and after.

    Args:
        address: See the top of this file.
        num_cpus: Cores of a new cluster; None: those of the machine.
        object_store_memory: Shared memory of a new cluster, in bytes; None: Ray's share (30 %).
        temp_dir: Where a new cluster keeps logs and sockets; a short path. None: /tmp/ray.
        log_to_driver: Whether what the ranks print appears on this process's terminal.
        preload: Modules that the workers of a new cluster are forked with; see
            `cluster.ray.fork_server`. Left out on a machine with GPUs.

    Raises:
        RayStartError: Ray did not start, or nobody answers at the address.
    """
    if ray.is_initialized():
        yield
        return
    target = address or os.environ.get("RAY_ADDRESS") or "local"
    handler = signal.getsignal(signal.SIGTERM)
    forks = ExitStack()
    try:
        with _stops_kept_back():
            if target == "local":
                create_token()
                modules = () if has_gpus() else preload
                python = str(forks.enter_context(serve_forks(modules)))
                _start_local(python, num_cpus, object_store_memory, temp_dir, log_to_driver)
            else:
                if (num_cpus, object_store_memory, temp_dir) != (None, None, None):
                    _log.warning("%s exists: sizes and folder of a new cluster are ignored", target)
                _connect(target, log_to_driver)
    except Exception as error:  # Ray raises bare ones when a part of it does not come up in time.
        ray.shutdown()
        forks.close()
        raise _start_error(target, error, temp_dir, from_environment=address is None) from error
    except BaseException as stop:
        ray.shutdown()
        forks.close()
        if isinstance(stop, SystemExit) and stop.code == signal.SIGTERM and callable(handler):
            # Another thread took the signal, and Ray's handler, in place by then, answered it.
            handler(signal.SIGTERM, None)
        raise
    raylet = raylet_of(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else 0
    try:
        yield
    finally:
        with _ending_if_stopped(raylet):
            ray.shutdown()
        forks.close()


@contextmanager
def _ending_if_stopped(raylet: int) -> Iterator[None]:
    """Ends a frozen raylet, for whose answer Ray's shutdown would wait without end."""
    if sys.is_finalizing():
        # A generator that nobody has closed ends with the interpreter, which starts no thread.
        yield
        return

    def watch(over: threading.Event) -> None:
        while not over.wait(_GRACE_S / 2):
            if raylet and process_state(raylet) == "T":
                _log.warning("the raylet of this machine is frozen (stopped); ending it")
                with suppress(OSError):
                    os.kill(raylet, signal.SIGKILL)

    with in_background("watch-shutdown", watch):
        yield


def _start_local(
    python: str,
    num_cpus: int | None,
    object_store_memory: int | None,
    temp_dir: str | None,
    log_to_driver: bool,
) -> None:
    for is_last in (False, True):
        ours = _children()
        try:
            with _on_loopback(), _ray_takes_for_python(python), _without_unused(log_to_driver):
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    object_store_memory=object_store_memory,
                    _temp_dir=temp_dir,
                    include_dashboard=False,
                    log_to_driver=log_to_driver,
                    logging_level=logging.ERROR,
                    _system_config=_system_settings(),
                )
        except Exception as error:  # Ray raises no type of its own for this.
            if is_last or "timed out" not in str(error):
                raise
            _log.warning("Ray did not start in time; starting it once more")
            ray.shutdown()
            # What has come up of it belongs to nobody: Ray forgets it, and it would run on.
            _end(_children() - ours)
        else:
            return


def _system_settings() -> dict[str, int | bool]:
    """Our settings of Ray, except for those that the environment sets."""
    return {
        name: value for name, value in _SYSTEM_SETTINGS.items() if f"RAY_{name}" not in os.environ
    }


@contextmanager
def _stops_kept_back() -> Iterator[None]:
    """Delivers signals that ask for a stop after Ray has started, to the handlers of before.

    Ray puts a handler of its own in the place of SIGTERM's, which ends the process. And a signal to
    the whole process group or job (Ctrl-C, `timeout`, `scancel`) is for this process to answer:
    Ray's must live until the state is saved. They inherit what is blocked.

    Threads of libraries that were started before do not, and take the signal meanwhile. So Ray's
    handler in C, which aborts the process, is left out here; its workers have it.
    """
    handler = signal.getsignal(signal.SIGTERM)
    in_c = getattr(ray_constants, _NO_HANDLER_IN_C, False)
    setattr(ray_constants, _NO_HANDLER_IN_C, True)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        setattr(ray_constants, _NO_HANDLER_IN_C, in_c)
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Makes Ray take the loopback interface for its own, as it does on a laptop's system.

    `ray.init` replaces 127.0.0.1, given as an address, by that of the machine; this is the switch
    behind its behaviour on macOS and Windows, where clusters of one machine need no other.
    """
    if not hasattr(ray_constants, "ENABLE_RAY_CLUSTER"):
        _log.warning("this Ray listens on all interfaces: only its token keeps others out")
        yield
        return
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _ray_takes_for_python(executable: str) -> Iterator[None]:
    """Makes Ray write an executable into the commands that its raylet starts processes by.

    Ray has no setting for it: it takes `sys.executable`.
    """
    own = sys.executable
    sys.executable = executable
    try:
        yield
    finally:
        sys.executable = own


@contextmanager
def _without_unused(log_to_driver: bool) -> Iterator[None]:
    """Makes Ray leave out processes that a private cluster has no use for.

    They are the autoscaler's monitor, the server of the dashboard, which starts without one too,
    and, unless its lines are shown, the reader of the workers' logs: two seconds of a core and
    200 MB of memory.
    """
    names = ["start_monitor", "start_api_server"]
    names += [] if log_to_driver else ["start_log_monitor"]
    own = {name: getattr(Node, name) for name in names if hasattr(Node, name)}
    for name in own:
        setattr(Node, name, lambda *_args, **_options: None)
    try:
        yield
    finally:
        for name, method in own.items():
            setattr(Node, name, method)


def _children() -> set[int]:
    """Returns the processes that this one has started."""
    found: set[int] = set()
    for each in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # number (name) state parent ...: a name may hold anything.
            _, parent, *_ = each.read_text().rpartition(")")[2].split()
            if int(parent) == os.getpid():
                found.add(int(each.parent.name))
    return found


def _end(processes: set[int]) -> None:
    """Ends processes that this one has started, and waits until they are gone."""
    for number in processes:
        with suppress(OSError):
            os.kill(number, signal.SIGTERM)
    end = time.monotonic() + _GRACE_S
    for number in processes:
        with suppress(OSError):
            while os.waitpid(number, os.WNOHANG) == (0, 0):
                if time.monotonic() > end:
                    os.kill(number, signal.SIGKILL)
                time.sleep(0.05)


def _connect(address: str, log_to_driver: bool) -> None:
    if address.startswith("ray://"):
        raise ValueError("Ray Client (ray://) keeps references in another process than ours")
    gcs_address = _address_of_this_machine() if address == "auto" else address
    host, _, port = gcs_address.rpartition(":")
    if not port.isdigit():
        # Ray says why it takes none.
        ray.init(address=address, log_to_driver=log_to_driver, logging_level=logging.ERROR)
        return
    host = host or "localhost"
    try:
        # Ray itself would try for a minute, and then end the whole process.
        socket.create_connection((host, int(port)), PROBE_TIMEOUT_S).close()
    except OSError as error:
        # Of `auto`, that of the latest cluster here, which may have ended.
        raise type(error)(f"{error} (at {gcs_address})") from error
    # Ray itself would try for 40 s, or without end where a cluster listens on loopback alone.
    token = own_token()
    answer = asked_with(gcs_address, token)
    if answer == "refused":
        raise PermissionError(f"it refuses {'this token' if token else 'to answer without one'}")
    if answer == "silent":
        raise TimeoutError(f"{gcs_address} takes connections and does not answer")
    if answer == "none":
        raise ConnectionError(f"what listens at {gcs_address} is not a control service of Ray")
    if token and asked_with(gcs_address) == "refused":
        send_token()
    with _on_loopback() if _is_loopback_alone(host, int(port)) else nullcontext():
        ray.init(address=gcs_address, log_to_driver=log_to_driver, logging_level=logging.ERROR)
    warn_without_token(ray.get_runtime_context().gcs_address)


def _address_of_this_machine() -> str:
    """Address of a cluster that runs here, as its own processes name it; empty where none does.

    Ray would replace the loopback address of a private cluster by that of the machine, at which
    nobody listens.
    """
    with suppress(Exception):
        return services.get_ray_address_from_environment("auto", None) or ""
    return ""


def _is_loopback_alone(host: str, port: int) -> bool:
    """Returns True if a cluster is named by this machine's loopback address and has no other."""
    if not services.is_localhost(host):
        return False
    try:
        socket.create_connection((services.get_node_ip_address(), port), PROBE_TIMEOUT_S).close()
    except OSError:
        return True
    return False


def _start_error(
    target: str, error: Exception, temp_dir: str | None, *, from_environment: bool
) -> RayStartError:
    cause = f"{type(error).__name__}: {error}"
    if target == "local":
        room = room_at(temp_dir or os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
        return RayStartError(
            "starting Ray on this machine",
            f"{cause.rstrip('.')} ({room})" if room else cause,
            "free memory, a writable temporary folder with a short path, and /dev/shm",
            "Run `sgmd doctor` to see which is missing, or choose the local topology, which needs"
            " no Ray",
        )
    by, leave = (" (RAY_ADDRESS)", "unset it") if from_environment else ("", "leave it out")
    return RayStartError(
        f"connecting to the Ray cluster at {target}{by}",
        cause,
        "a running cluster of the same Ray and Python version, and its token where it asks for one"
        " (RAY_AUTH_MODE=token and RAY_AUTH_TOKEN)",
        f"Check the address with `ray status --address`, or {leave} to start a private cluster;"
        " from outside a cluster, submit the run as a job",
    )
