"""Ray starts privately, or says why it does not. Each test has a process and a home of its own."""

import os
import socket
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import ray

from cluster.procfs import born, is_running
from cluster.runtime import start_ray
from cluster.tokens import asked_with
from tests.helpers.forked_python import PYTHON, forked_python, processes_below

REPORTS_ERRORS = """
import sys
from cluster.errors import RayStartError
from cluster.runtime import start_ray
for address in sys.argv[1:]:
    try:
        with start_ray(address or None):
            sys.exit("started")
    except RayStartError as error:
        print(error)
"""

STARTS_TWICE = """
import os, re, signal, sys
from pathlib import Path
import ray
from cluster.runtime import start_ray
from cluster.tokens import asked_with

def listening():
    # Sockets of this process and of all that know its token.
    sockets = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.environ["RAY_AUTH_TOKEN"] in (process / "environ").read_text() or (
                int(process.name) == os.getpid()
            ):
                links = [os.readlink(link) for link in (process / "fd").iterdir()]
                sockets |= {link[8:-1] for link in links if link.startswith("socket:[")}
        except (OSError, UnicodeDecodeError):
            continue
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                yield fields[1].rpartition(":")[0]

LOOPBACK = {"0100007F", "0" * 16 + "FFFF00000100007F", "0" * 24 + "01000000"}

@ray.remote
def mode_and_token():
    return os.environ["RAY_AUTH_TOKEN"]

with start_ray(num_cpus=2, object_store_memory=100 * 2**20, temp_dir=sys.argv[1]):
    with start_ray("auto"):
        assert ray.cluster_resources()["CPU"] == 2
    address = ray.get_runtime_context().gcs_address
    assert asked_with(address) == "refused"
    assert asked_with(address, "wrong") == "refused"
    assert asked_with(address, os.environ["RAY_AUTH_TOKEN"]) == "open"
    assert len(ray.get(mode_and_token.remote())) == 64
    # None of Ray's handlers in C is in place here: that of SIGTERM aborts the process.
    caught = re.search(r"SigCgt:.(\\w+)", Path("/proc/self/status").read_text())[1]
    assert not int(caught, 16) & 1 << signal.SIGTRAP - 1
    # The control service, two of the raylet, that worker.
    found = list(listening())
    assert len(found) > 3, found
    assert set(found) <= LOOPBACK, found
assert not ray.is_initialized()
"""


def _run(
    program: str, *arguments: str, home: Path, python: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a program with a home of its own; forked unless an interpreter is given."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    # What is forked shares libraries that have read another home; Ray is none of them.
    at_home = f"import os\nos.environ['HOME'] = {str(home)!r}\n"
    return subprocess.run(
        [python or forked_python(), "-c", at_home + program, *arguments],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_told_at_once(tmp_path):
    addresses = ("127.0.0.1:9", "ray://127.0.0.1:10001", "no address", "")
    result = _run(REPORTS_ERRORS, *addresses, home=tmp_path, RAY_ADDRESS="127.0.0.1:9")
    assert result.returncode == 0, result.stderr
    refused, client, nonsense, from_environment = result.stdout.splitlines()
    assert "at 127.0.0.1:9 (RAY_ADDRESS)" in from_environment
    assert "or unset it to start a private cluster" in from_environment
    assert "connecting to the Ray cluster at 127.0.0.1:9: ConnectionRefusedError" in refused
    assert "Ray Client" in client
    assert "no address" in nonsense
    assert "RAY_AUTH_TOKEN" in refused


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_token_that_a_cluster_refuses_is_told_before_ray_tries_it(tmp_path):
    address = ray.get_runtime_context().gcs_address
    wrong = _run(REPORTS_ERRORS, address, home=tmp_path, RAY_AUTH_TOKEN="wrong")
    none = _run(REPORTS_ERRORS, address, home=tmp_path)
    # Ray itself would replace the loopback address by another one, at which nobody listens.
    named = {"RAY_ADDRESS": address, "RAY_AUTH_TOKEN": "wrong"}
    found = _run(REPORTS_ERRORS, "auto", home=tmp_path, **named)
    for result, name, cause in (
        (wrong, address, "it refuses this token"),
        (none, address, "refuses to answer without one"),
        (found, "auto", "it refuses this token"),
    ):
        assert result.returncode == 0, result.stderr
        (told,) = result.stdout.splitlines()
        assert f"connecting to the Ray cluster at {name}: PermissionError: " in told
        assert cause in told
        assert "RAY_AUTH_TOKEN" in told
        # Ray says more where it has tried.
        assert result.stderr == ""


OTHER_SERVERS = """
import http.server, socket, sys, threading
from cluster.errors import RayStartError
from cluster.runtime import start_ray

def tell(address):
    try:
        with start_ray("{}:{}".format(*address)):
            print("connected")
    except RayStartError as error:
        print(error)

with socket.create_server(("127.0.0.1", 0)) as server:
    tell(server.getsockname())
with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tell(server.server_address)
    server.shutdown()
"""


@pytest.mark.slow
def test_a_server_that_never_answers_or_is_another_one_is_given_up(tmp_path):
    result = _run(OTHER_SERVERS, home=tmp_path)
    assert result.returncode == 0, result.stderr
    silent, other = result.stdout.splitlines()
    assert "takes connections and does not answer" in silent
    assert "is not a control service of Ray" in other


@pytest.mark.parametrize(
    ("value", "answer"), [("1", "unknown"), ("True", "unknown"), ("0", "none"), ("", "none")]
)
def test_a_cluster_with_tls_is_asked_nothing_in_clear(monkeypatch, value, answer):
    monkeypatch.setenv("RAY_USE_TLS", value)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2 if answer == "unknown" else 10.0)
        seen: list[bytes] = []

        def hang_up() -> None:
            with suppress(TimeoutError):
                connection, _ = server.accept()
                # No service of Ray: it takes what comes and ends.
                seen.append(connection.recv(2**16))
                connection.sendall(b"HTTP/1.0 400\r\n\r\n")
                connection.close()

        listener = threading.Thread(target=hang_up)
        listener.start()
        assert asked_with("{}:{}".format(*server.getsockname()), "a-secret-token") == answer
        listener.join()
    assert bool(seen) == (answer != "unknown")


JOINS = """
import sys, ray
from cluster.runtime import start_ray

with start_ray(sys.argv[1]):
    print(ray.cluster_resources()["CPU"], ray.get_runtime_context().gcs_address)
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_process_with_the_token_joins_a_private_cluster(tmp_path):
    address = ray.get_runtime_context().gcs_address
    joined = _run(JOINS, address, home=tmp_path, RAY_AUTH_TOKEN=os.environ["RAY_AUTH_TOKEN"])
    assert joined.stdout.split() == ["4.0", address], joined.stderr


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_process_that_is_connected_stays_so():
    with start_ray():
        assert ray.cluster_resources()["CPU"] == 4
    assert ray.is_initialized()


ASKS_FOR_NONE = """
import os, sys
import ray
from cluster.runtime import start_ray
from cluster.tokens import warn_without_token

with start_ray(num_cpus=1, object_store_memory=100 * 2**20, temp_dir=sys.argv[1]):
    address = ray.get_runtime_context().gcs_address
    warn_without_token(address)
    print("chosen")
    del os.environ["RAY_AUTH_MODE"]
    warn_without_token(address)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_without_a_token_is_warned_of_unless_that_was_chosen(tmp_path, ray_folder):
    program = f"import os\nos.environ['RAY_AUTH_MODE'] = 'disabled'\n{ASKS_FOR_NONE}"
    result = _run(program, str(ray_folder / "none"), home=tmp_path)
    assert (result.returncode, result.stdout) == (0, "chosen\n"), result.stderr
    assert result.stderr.count("asks for no token") == 1


@pytest.mark.ray
@pytest.mark.slow
def test_a_private_cluster_is_on_loopback_asks_for_a_token_and_leaves_no_file_with_it(
    tmp_path, ray_folder
):
    # The environment that the kernel shows of a forked process is that of its server.
    result = _run(STARTS_TWICE, str(ray_folder / "token"), home=tmp_path, python=PYTHON)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / ".ray").exists()
    assert result.stderr == ""


@pytest.mark.slow
def test_a_ray_that_cannot_start_says_why(tmp_path):
    program = REPORTS_ERRORS.replace("address or None", "temp_dir=address")
    result = _run(program, str(tmp_path / ("x" * 120)), home=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"({tmp_path}" in result.stdout
    assert "While starting Ray on this machine" in result.stdout
    assert "short path" in result.stdout


STARTS_LATE = """
import signal, subprocess, sys
import ray
from cluster.errors import RayStartError
from cluster.runtime import start_ray

# A machine that is busy for exactly as long cannot be had, so this stands for Ray.
late, tries = int(sys.argv[1]), []

parts = []

def heed_stops():
    signal.pthread_sigmask(signal.SIG_SETMASK, [])

def init_late(*arguments, **options):
    assert all(part.poll() is not None for part in parts), "the first start still runs"
    tries.append(options)
    if len(tries) <= late:
        # One that ends when it is asked to, and one that has to be killed: it inherits a mask.
        heeding = heed_stops if late == 1 else None
        parts.append(subprocess.Popen(["sleep", "600"], preexec_fn=heeding))
        raise Exception("The current node timed out during startup.")

ray.init = init_late
try:
    with start_ray(num_cpus=2):
        print("started", len(tries))
except RayStartError as error:
    print("refused", len(tries))
    parts.pop().kill()
"""


@pytest.mark.parametrize(("late", "told"), [(1, "started 2"), (2, "refused 2")])
@pytest.mark.slow
def test_a_start_that_comes_too_late_is_tried_once_more(tmp_path, late, told):
    result = _run(STARTS_LATE, str(late), home=tmp_path)
    assert result.stdout.strip() == told, result.stderr


BROKEN_WORKERS = """
import os, sys
if b"default_worker.py" in open("/proc/self/cmdline", "rb").read():
    sys.stderr.write("libfoo.so: undefined symbol\\n")
    sys.stderr.flush()
    os.abort()
"""
"""A `sitecustomize`, which every interpreter imports: as a library that does not fit here."""

STARTS_BROKEN_WORKERS = """
import sys
import ray
from cluster.errors import StartTimeoutError
from cluster.ray.group import RayWorkerGroup
from cluster.ray.pools import Pool
from cluster.ray.topology import reserve
from cluster.runtime import start_ray
from tests.cluster.toys import make_toy

sizes = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "temp_dir": sys.argv[1]}
with (
    start_ray(**sizes),
    reserve([Pool("broken", cpus_per_rank=0.1)], timeout_s=60) as placement,
    RayWorkerGroup("broken", make_toy, (1,), placement) as group,
):
    try:
        group.wait_ready(15)
    except StartTimeoutError as error:
        print(error)
assert not ray.is_initialized()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_workers_that_abort_as_they_start_are_told_with_what_they_printed(tmp_path, ray_folder):
    (tmp_path / "sitecustomize.py").write_text(BROKEN_WORKERS)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    folder = str(ray_folder / "broken")
    result = _run(STARTS_BROKEN_WORKERS, folder, home=tmp_path, PYTHONPATH=path)
    assert result.returncode == 0, result.stderr
    assert "its process has not started" in result.stdout
    assert "/logs/raylet.err, ends in: " in result.stdout
    assert "libfoo.so: undefined symbol" in result.stdout


HAS_A_CLUSTER = """
import sys, time
import ray
from cluster.runtime import start_ray

@ray.remote
def work():
    pass

with start_ray(num_cpus=1, object_store_memory=100 * 2**20, temp_dir=sys.argv[1]):
    ray.get(work.remote())
    print("started", flush=True)
    time.sleep(600)
"""
PATIENCE_S = 30.0
"""Ray's own agents would stay for a minute."""


@pytest.mark.ray
@pytest.mark.slow
def test_nothing_of_a_private_cluster_outlives_its_killed_driver(ray_folder):
    command = [forked_python(), "-c", HAS_A_CLUSTER, str(ray_folder / "killed")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "started\n"
        left = {each.pid: born(each.pid) for each in processes_below(driver.pid)}
        assert len(left) > 5
        driver.kill()
        end_s = time.monotonic() + PATIENCE_S
        while left and time.monotonic() < end_s:
            left = {one: since for one, since in left.items() if is_running(one, since)}
            time.sleep(0.05)
    assert not left
