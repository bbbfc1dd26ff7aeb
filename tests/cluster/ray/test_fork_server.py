"""Workers of a private cluster start with their libraries, and else as a new interpreter does."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from cluster.procfs import born, is_running, process_state
from cluster.ray.fork_client import SERVER
from cluster.ray.fork_server import serve_forks
from tests.cluster.toys import WAIT_S
from tests.helpers.forked_python import PYTHON, forked_python

SHOWN = "import sys; print(sys.argv[1:], 'torch' in sys.modules)"


def send_request(
    server: socket.socket, python: Path, request: Mapping[str, object], stream: int
) -> None:
    """Sends what a client does, with one file for all standard streams."""
    body = json.dumps(request).encode()
    server.connect(str(python.with_name("socket")))
    socket.send_fds(server, [len(body).to_bytes(8, "big")], [stream] * 3)
    server.sendall(body)
    server.settimeout(WAIT_S)


def wait_until_all_have_ended(server: int) -> None:
    """Waits until a server has no process of those that it has forked."""
    end_s = time.monotonic() + WAIT_S
    while psutil.Process(server).children():
        assert time.monotonic() < end_s
        time.sleep(0.05)


@ray.remote(num_cpus=0.1)
class Newborn:
    """Answers what a process is like before it has done anything."""

    def look(self) -> dict[str, object]:
        return {
            "process": os.getpid(),
            "session": os.getsid(0),
            "loaded": "workers.models.wan" in sys.modules,
            "folder": str(Path.cwd()),
            "interpreter": sys.executable,
            "draws": (random.random(), float(np.random.rand())),
            "variable": os.environ.get("GIVEN"),
            "exit code of a child": subprocess.run(["false"], check=False).returncode,
        }


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_workers_have_the_libraries_of_the_networks_and_nothing_else_in_common():
    newborn: Any = Newborn
    actors = [newborn.remote(), newborn.options(runtime_env={"env_vars": {"GIVEN": "x"}}).remote()]
    first, second = ray.get([actor.look.remote() for actor in actors])
    assert first["loaded"]
    assert second["loaded"]
    assert (first["variable"], second["variable"]) == (None, "x")
    assert first["draws"][0] != second["draws"][0]
    assert first["draws"][1] != second["draws"][1]
    for process in (first, second):
        assert process["session"] == process["process"]
        assert process["folder"] == str(Path.cwd())
        # The one that the cluster was started by.
        assert process["interpreter"] == forked_python()
        assert process["exit code of a child"] == 1


@pytest.mark.slow
def test_what_is_no_worker_is_run_by_the_interpreter_itself(tmp_path):
    with serve_forks(["json"]) as python:
        command = [str(python), "-c", SHOWN, "a b", "$HOME"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert told == "['a b', '$HOME'] False\n"


@pytest.mark.slow
def test_a_worker_is_forked_with_its_arguments_streams_and_folder(tmp_path):
    script = tmp_path / "default_worker.py"
    script.write_text(
        "import os, sys\n"
        "print(sys.argv[1:], 'colorsys' in sys.modules, os.environ['GIVEN'], os.getcwd())\n"
        "print('wrong', file=sys.stderr)\n"
    )
    with serve_forks(["colorsys"]) as python:
        run = subprocess.run(
            [str(python), str(script), "a b"],
            env={"GIVEN": "ü"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
    assert run.stdout == f"['a b'] True ü {tmp_path}\n"
    assert run.stderr == "wrong\n"


@pytest.mark.slow
def test_without_its_server_a_worker_starts_as_always(tmp_path):
    script = tmp_path / "default_worker.py"
    script.write_text("import sys\nprint('colorsys' in sys.modules)\n")
    # Ray reads the environment when it is imported, so nothing is forked with it.
    with serve_forks(["colorsys", "ray"]) as python:
        command = [str(python), str(script)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told == "False\n"


@pytest.mark.parametrize("modules", [["colorsys"], []])
def test_the_files_of_a_long_run_do_not_grow_old(modules):
    with serve_forks(modules, touch_every_s=0.1) as python:
        paths = [python, python.parent, *([python.with_name("socket")] if modules else [])]
        for path in paths:
            os.utime(path, (0.0, 0.0))
        end_s = time.monotonic() + WAIT_S
        while any(not path.stat().st_mtime for path in paths):
            assert time.monotonic() < end_s, "they are as old as before"
            time.sleep(0.05)


@pytest.mark.slow
def test_a_client_that_asks_for_nothing_holds_nobody_up(tmp_path, monkeypatch):
    script = tmp_path / "default_worker.py"
    script.write_text("import sys\nprint('colorsys' in sys.modules)\n")
    with serve_forks(["colorsys"]) as python, socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(python.with_name("socket")))
        command = [str(python), str(script)]
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=WAIT_S)
    assert told.stdout == "True\n"


@pytest.mark.slow
def test_while_its_server_is_stopped_a_worker_starts_as_always_and_once(tmp_path):
    script, ran = tmp_path / "default_worker.py", tmp_path / "ran"
    script.write_text(
        f"import sys\nwith open({str(ran)!r}, 'a') as file:\n"
        "    print('colorsys' in sys.modules, file=file)\n"
    )
    with serve_forks(["colorsys"]) as python:
        server = int(python.with_name(SERVER).read_text())

        def start() -> None:
            subprocess.run([str(python), str(script)], check=True, timeout=WAIT_S)

        start()
        os.kill(server, signal.SIGSTOP)
        try:
            start()
        finally:
            os.kill(server, signal.SIGCONT)
        # What has waited for the server meanwhile is not served once more: its request comes before
        # this one, and a process that it got would be a child of the server.
        start()
        wait_until_all_have_ended(server)
    assert ran.read_text().split() == ["True", "False", "True"]


@pytest.mark.slow
def test_a_client_that_goes_once_it_is_offered_a_process_gets_none(tmp_path):
    script, ran = tmp_path / "default_worker.py", tmp_path / "ran"
    script.write_text(f"open({str(ran)!r}, 'a').write('x')\n")
    request = {
        "arguments": [str(script)],
        "environment": {},
        "variables": {},
        "folder": str(tmp_path),
    }
    with serve_forks(["colorsys"]) as python, (tmp_path / "told").open("w") as stream:
        for accepts in (False, True):
            with socket.socket(socket.AF_UNIX) as server:
                send_request(server, python, request, stream.fileno())
                assert server.recv(1) == b"1"
                if accepts:
                    server.sendall(b"1")
                    assert (server.recv(1), server.recv(1)) == (b"1", b"")
        wait_until_all_have_ended(int(python.with_name(SERVER).read_text()))
    assert ran.read_text() == "x"


@pytest.mark.slow
def test_a_stopped_server_ends_with_its_controller():
    code = """
import time
from cluster.ray.fork_server import serve_forks
with serve_forks(["colorsys"]) as python:
    print(python.with_name("server").read_text(), flush=True)
    time.sleep(600)
"""
    controller = subprocess.Popen([PYTHON, "-c", code], stdout=subprocess.PIPE, text=True)
    assert controller.stdout is not None
    server = int(controller.stdout.readline())
    since, end_s = born(server), time.monotonic() + WAIT_S
    while "fork_server" not in Path(f"/proc/{server}/cmdline").read_text():
        assert time.monotonic() < end_s
    # It has asked for the end of its parent by the time that it waits for requests.
    while process_state(server) != "S":
        assert time.monotonic() < end_s
        time.sleep(0.05)
    os.kill(server, signal.SIGSTOP)
    controller.kill()
    controller.wait()
    while is_running(server, since):
        assert time.monotonic() < end_s, "it is left behind"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_worker_that_cannot_be_prepared_ends_and_serves_nobody(tmp_path):
    script = tmp_path / "default_worker.py"
    script.write_text("print('ran')\n")
    request = {"arguments": [str(script)], "environment": {}, "variables": {}, "folder": "/nowhere"}
    told = tmp_path / "told"
    with serve_forks(["colorsys"]) as python:
        with socket.socket(socket.AF_UNIX) as server, told.open("w") as stream:
            send_request(server, python, request, stream.fileno())
            assert server.recv(1) == b"1"
            server.sendall(b"1")
            # A process was forked, and has ended.
            assert (server.recv(1), server.recv(1)) == (b"1", b"")
        after = subprocess.run([str(python), str(script)], capture_output=True, text=True)
    assert "FileNotFoundError" in told.read_text()
    assert "ran" not in told.read_text()
    assert after.stdout == "ran\n"


@pytest.mark.slow
def test_a_client_whose_folder_is_gone_starts_the_interpreter(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    script = tmp_path / "default_worker.py"
    script.write_text("import sys\nprint('colorsys' in sys.modules)\n")
    with serve_forks(["colorsys"]) as python:
        command = f"cd {gone} && rmdir {gone} && exec {python} {script}"
        run = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_what_is_started_ends_with_its_parent():
    with serve_forks([]) as python:
        # A shell that starts a process, says which, and is killed.
        command = f"{python} -c 'import time; time.sleep(600)' & echo $!; wait"
        parent = subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, text=True)
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        since = born(child)
        time.sleep(1.0)
        assert is_running(child, since)
        parent.kill()
        parent.wait()
        end_s = time.monotonic() + WAIT_S
        while is_running(child, since) and time.monotonic() < end_s:
            time.sleep(0.05)
        assert not is_running(child, since)


@pytest.mark.slow
def test_the_folder_of_a_killed_controller_goes_with_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    code = """
import time
from cluster.ray.fork_server import serve_forks
with serve_forks([]) as python:
    print(python.parent, flush=True)
    time.sleep(600)
"""
    killed, living = (
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    )
    try:
        streams = [each.stdout for each in (killed, living) if each.stdout is not None]
        folders = [Path(stream.readline().strip()) for stream in streams]
        killed.kill()
        killed.wait()
        assert all((folder / "python").exists() for folder in folders)
        with serve_forks([]) as python:
            assert [folder.exists() for folder in folders] == [False, True]
            assert python.exists()
    finally:
        for each in (killed, living):
            each.kill()
            each.communicate()
