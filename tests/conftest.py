"""What the tests of several packages share: Ray, started once a session and only when needed."""

import gc
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import typer.testing

# Sets what Ray reads when it is imported, which is before this package in a forked process.
import cluster  # noqa: F401

# Before all that registers something for the end of the process.
from tests.helpers.ending import end_without_clearing
from tests.helpers.faulty_proxy import ProxyBook, Trouble, serve_faulty
from tests.helpers.forked_python import (
    forked_python,
    kept_environment,
    share_forked_python,
    starting_forks,
    take_interpreter,
)
from tests.helpers.remembered_checks import remember_checks
from tests.helpers.s3_server import S3Access, S3Server, free_port, serve_s3, use_server

# OpenMP reads both when torch is loaded. There are more processes than cores: threads that wait for
# one another by turning take sixty times as long there.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Read when libraries are imported: no test asks a network for a model.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ray reads the mode when it is imported. The token is this session's, never the user's own.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

# Before a module of `sgmd_core` is imported.
remember_checks()

# Typer's runner builds all commands anew for each call, which is half of what most calls take.
typer.testing._get_command = cache(typer.testing._get_command)

_HEAD_START_TIMEOUT_S = 180.0


def pytest_configure(config: pytest.Config) -> None:
    """Forks processes of tests side by side off one that has its libraries; ends these early."""
    if hasattr(config, "workerinput"):
        take_interpreter()
        end_without_clearing()
    elif getattr(config.option, "numprocesses", None):
        config.option.tx = [f"popen//python={share_forked_python()}"] * len(config.option.tx)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Pauses the collector of cycles while tests are imported, and keeps it from what stays.

    Afterwards it looks once in so many new objects: every 700, as by default, costs a twentieth of
    all tests, and what they leave behind is small.

    Libraries' loggers pass on to the root what they log: pytest hangs two handlers on each of the
    sixty that do not, in each of the three phases of every test.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        for logger in logging.Logger.manager.loggerDict.values():
            if isinstance(logger, logging.Logger):
                logger.propagate = True
        gc.freeze()
        gc.set_threshold(20_000, 10, 10)
        gc.enable()


_RAY_S, _SLOW_S, _QUICK_S = 20.0, 2.0, 0.1
"""Weight of a test with Ray, of a slow one and of any; a timeout of its own weighs as much."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files that take long first, so that processes side by side end together.

    Files with Ray, which mostly wait, come in turns with the others, which mostly compute.
    """
    weights: dict[bool, dict[Path, float]] = {True: defaultdict(float), False: defaultdict(float)}
    with_ray = {item.path for item in items if item.get_closest_marker("ray")}
    for item in items:
        timeout = item.get_closest_marker("timeout")
        weights[item.path in with_ray][item.path] += (
            (float(timeout.args[0]) if timeout else 0.0)
            + _RAY_S * (item.get_closest_marker("ray") is not None)
            + _SLOW_S * (item.get_closest_marker("slow") is not None)
            + _QUICK_S
        )
    places: dict[Path, tuple[float, Path]] = {}
    for kind in weights.values():
        before, total = 0.0, sum(kind.values())
        for path, weight in sorted(kind.items(), key=lambda entry: -entry[1]):
            places[path] = (before / total, path)
            before += weight
    items.sort(key=lambda item: places[item.path])


@pytest.fixture
def forked_libraries() -> Iterator[None]:
    """Lets the processes that a test starts be forked off a Python that has loaded libraries."""
    with starting_forks():
        yield


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The networks of the tests are tiny, and other tests run beside them.

    What builds networks sets the number for the whole process, and so for the tests after it.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def environment_of_libraries() -> Iterator[None]:
    """Leaves the variables that libraries read at import as a test has found them."""
    with kept_environment():
        yield


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk that takes nothing from the threads that save until the event is set."""
    opened = threading.Event()
    sync = os.fsync

    def wait(handle: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            opened.wait(60)
        sync(handle)

    monkeypatch.setattr(os, "fsync", wait)
    yield opened
    opened.set()


@pytest.fixture(scope="session")
def ray_folder() -> Iterator[Path]:
    """Ray's temporary folder for the session. Its path is short: sockets live there."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def s3_access() -> S3Access:
    """Where the processes of `ray_cluster` look for an S3 server; who wants one, starts it."""
    return S3Access()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server with the bucket `runs`; whose tests need other buckets has a fixture instead."""
    root = tmp_path_factory.mktemp("s3")
    (root / "runs").mkdir()
    with serve_s3(root) as running:
        yield running


@pytest.fixture
def through(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., ProxyBook]]:
    """Puts a proxy with some troubles between this process and the fixture `server`.

    What the SDK waits between its tries, up to seconds each, is cut to a tenth.
    """
    from botocore.retries.standard import ExponentialBackoff

    use_server(server.environment, monkeypatch)
    waited = ExponentialBackoff.delay_amount
    monkeypatch.setattr(
        ExponentialBackoff, "delay_amount", lambda self, context: waited(self, context) / 10
    )

    def put(plan: Callable[[int], Trouble], stall_s: float = 2.0) -> ProxyBook:
        book = stack.enter_context(
            serve_faulty(server.environment["AWS_ENDPOINT_URL"], plan, stall_s)
        )
        use_server({"AWS_ENDPOINT_URL": book.endpoint}, monkeypatch)
        return book

    with ExitStack() as stack:
        yield put


@pytest.fixture(scope="session")
def ray_cluster(ray_folder: Path, s3_access: S3Access) -> Iterator[None]:
    """A private cluster of four logical CPUs, and this process connected to it."""
    from cluster.runtime import start_ray
    from workers.models.wan_family import WAN_TRAITS

    folder = str(ray_folder / "own")
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        # Ray's processes keep the environment in which Ray was started.
        for name, value in s3_access.environment.items():
            patch.setenv(name, value)
        # Ray keeps a worker for each core, at a hundredth of a core each.
        patch.setenv("RAY_num_workers_soft_limit", "0")
        patch.setattr(sys, "executable", forked_python())
        stack.enter_context(
            start_ray(
                num_cpus=4,
                object_store_memory=200 * 2**20,
                temp_dir=folder,
                # The last one for trials of a sweep.
                preload=("workers.build", *WAN_TRAITS.modules, "pipelines.distillation.run"),
            )
        )
        patch.undo()
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Ends with a file what libraries of Ray keep for a next data set or training.

    These are actors with names, and are found or made by name; one takes a hundredth of a core.
    """
    yield
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized() or (nextitem and nextitem.path == item.path):
        return
    for actor in ray.util.list_named_actors(all_namespaces=True):
        with suppress(ValueError):  # It has ended by itself.
            ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))


@pytest.fixture(scope="module")
def ray_head(ray_folder: Path) -> Iterator[str]:
    """A cluster as an operator starts one, of four CPUs and a GPU; yields its job server's URL.

    CPUs and GPU are logical: Ray counts and hands them out, and no network ever finds the GPU.

    This process is not connected to it. It ends with the module, and only its own processes do: one
    that nobody uses takes a twentieth of a core.
    """
    log_file = ray_folder / "head.log"
    for is_last in (False, False, True):
        dashboard, *ports = (free_port() for _ in range(4))
        head = _start_head(ray_folder / "head", log_file, dashboard, ports)
        try:
            _wait_for(f"http://127.0.0.1:{dashboard}/api/version", head, log_file)
            # Jobs are started by the agent, which comes up later.
            _wait_for(f"http://127.0.0.1:{ports[2]}/api/local_raylet_healthz", head, log_file)
            break
        except RuntimeError:
            # On a busy machine Ray's agent may take longer to start than its raylet waits for it.
            _end(head)
            if is_last:
                raise
    try:
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        _end(head)


def _start_head(
    folder: Path, log_file: Path, dashboard: int, ports: Sequence[int]
) -> subprocess.Popen[bytes]:
    command = [
        *(forked_python(), "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *("--num-cpus=4", "--num-gpus=1", "--disable-usage-stats"),
        f"--object-store-memory={300 * 2**20}",
        *(f"--port={ports[0]}", f"--ray-client-server-port={ports[1]}"),
        *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={ports[2]}"),
        *("--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={folder}"),
        # Jobs bring files of their own: workers that are started before cannot serve them.
        '--system-config={"prestart_worker_first_driver": false}',
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    # Commands of jobs find the interpreter of these tests under the name python.
    environment["PATH"] = f"{Path(forked_python()).parent}:{environment['PATH']}"
    with log_file.open("w") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def _end(head: subprocess.Popen[bytes]) -> None:
    head.send_signal(signal.SIGTERM)
    head.wait(timeout=60)


def _wait_for(url: str, head: subprocess.Popen[bytes], log: Path) -> None:
    """Returns once a server answers; without a token it answers 401, which is an answer."""
    end = time.monotonic() + _HEAD_START_TIMEOUT_S
    while time.monotonic() < end:
        if head.poll() is not None:
            raise RuntimeError(f"Ray's head ended:\n{log.read_text()}")
        try:
            urlopen(url, timeout=5).close()
            return
        except HTTPError:
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"Ray's head does not answer:\n{log.read_text()}")
