"""Processes of tests are forked with their libraries; where that cannot be, they are started.

Either way they are what a new interpreter would be to whoever starts, signals or kills them.
"""

import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from tests.helpers.forked_python import (
    PYTHON,
    forked_process,
    forked_python,
    kept_environment,
    kill,
    processes_below,
    starting_forks,
)
from tests.helpers.machines import ROOT, why_no_machines
from tests.helpers.namespaces import python_of

LOADED = "import sys; print('torch' in sys.modules)"
WAITING = """
import os, signal, sys, time
def heard(number, frame):
    # Not by print: the signal may come while the line below is being written.
    os.write(1, b"heard %d\\n" % number)
    sys.exit(7)
signal.signal(signal.SIGTERM, heard)
print("ready", flush=True)
time.sleep(60)
"""

pytestmark = pytest.mark.slow


def output(*arguments: str | Path, **settings: Any) -> str:
    return subprocess.run(
        [forked_python(), *arguments], capture_output=True, text=True, check=True, **settings
    ).stdout


def waiting() -> subprocess.Popen[str]:
    """A process that ends with 7 when it is asked to end."""
    # A shell's job in the background ignores SIGINT, and what it starts does so too.
    own = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [forked_python(), "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    signal.signal(signal.SIGINT, own)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def wait_for_end_of(pid: int) -> None:
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid):
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(
    "code",
    [
        "import os; print(os.getcwd(), sorted(os.environ), os.sysconf('SC_OPEN_MAX'))",
        "import sys; print(sys.argv, sys.stdin.read(), file=sys.stderr); sys.exit(3)",
        "import os; os.write(1, b'x' * 200_000); os._exit(5)",
        "import atexit, sys, threading; atexit.register(print, 'last'); "
        "threading.Timer(0.1, print, ['before']).start(); sys.exit('a reason')",
        "import sys; sys.exit(300)",
        "raise KeyboardInterrupt",
        "raise ValueError('wrong')",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import sys, signal; print(signal.getsignal(signal.SIGINT), sys.flags.dev_mode, __name__)",
        "import __main__; print(sorted(name for name in vars(__main__) if name[0] != '_'))",
    ],
)
def test_a_fork_ends_says_and_sees_what_a_new_interpreter_does(code: str, tmp_path: Path):
    forked, fresh = (
        subprocess.run(
            [python, "-c", code, "-x", "two words"],
            cwd=tmp_path,
            env={"PATH": "/bin", **{name: os.environ[name] for name in os.environ if "_" in name}},
            input="given",
            capture_output=True,
            text=True,
            check=False,
        )
        for python in (forked_python(), PYTHON)
    )
    assert forked.returncode == fresh.returncode
    assert forked.stdout == fresh.stdout
    # Of a traceback, the lines of what was asked for.
    assert forked.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


@pytest.mark.parametrize(
    ("option", "code"),
    [
        ("-P", "import sys; print(sys.path[0] in ('', sys.argv[1]))"),
        ("-u", "import os, sys; print('said'); print('told', file=sys.stderr); os._exit(3)"),
    ],
)
def test_options_of_an_interpreter_are_those_of_a_fork(
    option: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)

    def told(python: str, *options: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [python, *options, "-c", code, tmp_path],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    assert told(forked_python(), option) == told(PYTHON, option) != told(PYTHON)
    assert output(option, "-c", LOADED) == "True\n"


def test_a_signal_to_the_client_is_one_to_the_fork_and_so_is_the_way_that_it_ends():
    process = waiting()
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=20)
    assert said == f"heard {signal.SIGTERM:d}\n"
    assert process.returncode == 7
    process = waiting()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert errors.endswith("KeyboardInterrupt\n")


def test_who_is_killed_is_gone_whether_it_is_the_client_or_the_fork():
    process = waiting()
    forked = forked_process(process.pid)
    assert forked != process.pid
    assert forked in {each.pid for each in processes_below(os.getpid())}
    kill(process)
    assert process.returncode == -signal.SIGKILL
    assert not psutil.pid_exists(forked)
    process = waiting()
    forked = forked_process(process.pid)
    process.kill()
    process.wait(20)
    wait_for_end_of(forked)


def test_a_fork_and_its_client_that_are_killed_at_one_moment_leave_the_server_alive():
    process = waiting()
    fork = psutil.Process(forked_process(process.pid))
    server = psutil.Process(fork.ppid())
    server.suspend()
    try:
        fork.kill()
        while fork.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.001)
        process.kill()
        process.wait(30)
    finally:
        server.resume()
    assert output("-c", "import os; print(os.getppid())") == f"{server.pid}\n"
    assert not fork.is_running()


def test_what_a_library_writes_into_the_environment_is_taken_back():
    assert output("-c", LOADED) == "True\n"
    with kept_environment():
        # As torch does when it compiles; who sees it reads it at import.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = "/tmp/somewhere"
        assert output("-c", LOADED) == "False\n"
    assert output("-c", LOADED) == "True\n"


def test_variables_of_commands_of_scikit_learn_and_of_gpus_are_no_other_environment(monkeypatch):
    assert CliRunner().invoke(app, ["recipes", "list", "--json"]).exit_code == 0
    assert output("-c", LOADED) == "True\n"
    monkeypatch.setenv("KMP_INIT_AT_FORK", "FALSE")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert output("-c", LOADED) == "True\n"
    monkeypatch.setenv("TORCH_LOGS", "")
    assert output("-c", LOADED) == "False\n"


def spawned() -> bool:
    """Answer of a process of `multiprocessing` whether it began with the libraries."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(eval, ("'torch' in __import__('sys').modules",))


def test_processes_of_multiprocessing_are_forked_until_the_block_ends():
    assert not spawned()
    with starting_forks():
        assert sys.executable == forked_python()
        assert spawned()
    assert sys.executable == PYTHON
    assert not spawned()


def test_a_worker_of_a_job_is_forked_in_the_folder_of_its_files(tmp_path: Path):
    folder = tmp_path / "a job's files"
    folder.mkdir()
    worker = tmp_path / "default_worker.py"
    worker.write_text(f"{LOADED}; import os; print(os.getcwd(), os.environ['GIVEN'], sys.argv[1:])")
    context = {
        "command_prefix": ["cd", shlex.quote(str(folder)), "&&"],
        "env_vars": {"GIVEN": "x"},
    }
    told = output(
        tmp_path / "setup_worker.py",
        worker,
        "--number=1",
        f"--serialized-runtime-env-context={json.dumps(context)}",
        "--language=PYTHON",
    )
    assert told == f"True\n{folder} x ['--number=1']\n"


def test_ray_is_imported_before_the_fork_with_the_settings_of_the_process_and_not_for_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "site-packages" / "ray"
    folder.mkdir(parents=True)
    told = "import sys; print('ray' in sys.modules)"
    setting = "from ray._raylet import Config; print(Config.max_grpc_message_size())"
    for name in ("told.py", "default_worker.py"):
        (folder / name).write_text(f"{told}\n{setting}\n")
    monkeypatch.delenv("RAY_max_grpc_message_size", raising=False)
    _, default = output(folder / "told.py").splitlines()
    # Ray keeps what it has read when it was imported: another setting needs another server.
    monkeypatch.setenv("RAY_max_grpc_message_size", "12345678")
    assert default != "12345678"
    assert output(folder / "told.py") == "True\n12345678\n"
    assert output(folder / "default_worker.py") == "False\n12345678\n"
    monkeypatch.delenv("RAY_max_grpc_message_size")
    assert output(folder / "told.py") == f"True\n{default}\n"
    assert output("-c", told) == "False\n"


@pytest.fixture
def network() -> Iterator[str]:
    if why := why_no_machines():
        pytest.skip(why)
    name = f"sgmd-{os.getpid()}-one"
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield name
    subprocess.run(["ip", "netns", "del", name], check=True)


ON_A_MACHINE = """
import os, pathlib, subprocess, sys, time
def told():
    return "torch" in sys.modules, os.stat("/proc/self/ns/net").st_ino, os.readlink("/proc/self")
if __name__ == "__main__":
    print(*told(), sep="\\n")
    pathlib.Path("{disk}", "written").touch()
    again = [sys.executable, "-c", "import sys, time; print('torch' in sys.modules, flush=True)"]
    print(subprocess.run(again, stdout=subprocess.PIPE, text=True).stdout, end="", flush=True)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    {end}
"""


@pytest.mark.parametrize(
    ("end", "code"), [("sys.exit(7)", 7), ("os.kill(os.getppid(), 9); time.sleep(60)", 1)]
)
def test_what_a_machine_starts_is_forked_in_its_namespaces_and_ends_with_it(
    network: str, tmp_path: Path, end: str, code: int
) -> None:
    files, disk = tmp_path / "files", tmp_path / "disk"
    files.mkdir()
    disk.mkdir()
    command = [python_of(disk), "-c", ON_A_MACHINE.format(disk=disk, end=end)]
    apart = [forked_python(), "-m", "tests.helpers.namespaces", PYTHON]
    machine = subprocess.run(
        [*apart, network, files, disk, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert machine.returncode == code
    loaded, space, pid, also_loaded = machine.stdout.split()
    assert (loaded, also_loaded) == ("True", "True")
    assert int(space) == Path("/run/netns", network).stat().st_ino
    assert int(pid) < 50
    assert (files / "written").is_file()
    assert not (disk / "written").exists()
    left = subprocess.run(["ip", "netns", "pids", network], capture_output=True, check=True)
    assert not left.stdout


def test_a_script_for_the_bare_interpreter_runs_in_the_client_itself(tmp_path: Path):
    script = tmp_path / "bare.py"
    script.write_text(
        "import os, sys\n"
        "print(__name__, sys.argv[1:], sys.flags.isolated, sys.flags.no_site, sys.executable)\n"
        "print(os.getpid(), 'torch' in sys.modules, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [forked_python(), "-I", "-S", script, "a b"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        # What it becomes by `exec` of its interpreter asks the server.
        assert process.stdout.readline() == f"__main__ ['a b'] 1 1 {forked_python()}\n"
        assert process.stdout.readline() == f"{process.pid} False\n"
        assert forked_process(process.pid) == process.pid
        process.communicate()
    assert process.returncode == 0
