"""A run that is asked to stop saves its state; the resumed run is the same."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.lease import hold
from pipelines.distillation.run import distill
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.run.stopping import StopNow, StopRequests, stop_requests
from sgmd_core.errors import StopRequestedError
from tests.e2e.conftest import MakeRecipe
from tests.e2e.processes import ROOT
from tests.e2e.test_equivalence import history, moments, state
from tests.helpers.forked_python import forked_process
from tests.helpers.moves import assert_moves

ENDLESS = 100_000


def run(config, tmp_path: Path) -> subprocess.Popen[str]:
    """The command, as the leader of a process group."""
    recipe = tmp_path / "endless.yaml"
    recipe.write_text(config.to_yaml())
    command = [sys.executable, "-m", "pipelines.cli", "distill", str(recipe)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Tests that run in the background of a shell ignore it, and their children would.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def start(config, tmp_path: Path) -> subprocess.Popen[str]:
    """The command, once it has trained two iterations."""
    process = run(config, tmp_path)
    metrics = RunFolder(config.run_folder).metrics
    deadline = time.monotonic() + 300
    while len(read_jsonl(metrics)) < 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "mode", "limit_s"),
    [
        (signal.SIGTERM, 143, "local", 300.0),
        (signal.SIGINT, 130, "local", 0.001),
        pytest.param(signal.SIGTERM, 143, "pools", 300.0, marks=pytest.mark.ray),
    ],
    ids=["finished", "given up", "on Ray, to the whole group"],
)
def test_a_stopped_run_saves_its_state_and_goes_on_with_the_same_bits(
    make_recipe: MakeRecipe,
    tmp_path: Path,
    number: signal.Signals,
    code: int,
    mode: str,
    limit_s: float,
) -> None:
    settings = (f"iterations={ENDLESS}", "checkpoint.every=0", f"topology.mode={mode}")
    config = make_recipe("name=stopped", *settings, f"checkpoint.stop_after_s={limit_s}")
    process = start(config, tmp_path)
    # As Ctrl-C in a terminal, `timeout` and `scancel` do it: Ray's processes are sent it too.
    os.killpg(forked_process(process.pid), number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    assert "Traceback" not in output
    assert f"--resume {config.run_folder}" in " ".join(output.split())
    reached = len(read_jsonl(RunFolder(config.run_folder).metrics))
    whole = make_recipe("name=whole", f"iterations={reached + 1}", "checkpoint.every=0")
    end = {"iterations": reached + 1, "topology.mode": "local"}
    before = moments(config, reached)
    distill(config.with_settings(end), resume=True)
    distill(whole)
    assert_moves(moments(whole, reached + 1), before)
    assert history(config) == history(whole)
    assert state(config, reached + 1) == state(whole, reached + 1)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["local", pytest.param("pools", marks=pytest.mark.ray)])
def test_a_run_that_is_stopped_while_its_roles_start_leaves_nothing_behind(
    make_recipe: MakeRecipe, tmp_path: Path, mode: str
) -> None:
    config = make_recipe("name=early", f"iterations={ENDLESS}", f"topology.mode={mode}")
    process = run(config, tmp_path)
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if "starting the roles" in line:
            break
    running = psutil.Process(forked_process(process.pid))
    deadline = time.monotonic() + 120
    while mode == "pools" and not any("raylet" in one.name() for one in running.children()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = running.children(recursive=True)
    process.send_signal(signal.SIGTERM)
    said += process.communicate(timeout=120)[0]
    assert process.returncode == 143, said
    assert "Traceback" not in said
    assert "no iteration was under way" in " ".join(said.split())
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    with hold(str(config.run_folder), "a test"):
        assert not read_jsonl(RunFolder(config.run_folder).metrics)


@pytest.mark.slow
def test_a_second_signal_ends_at_once() -> None:
    code = (
        "import signal, os, time\n"
        "from pipelines.run.stopping import stop_requests\n"
        "with stop_requests(print) as stops, stops.finishing_iterations():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert stops.received == 'SIGTERM'\n"
        "    time.sleep(1)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    began = time.monotonic()
    terminal, stderr = os.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=stderr,
            timeout=60,
        )
        told = os.read(terminal, 4096).decode()
    finally:
        os.close(terminal)
        os.close(stderr)
    assert done.returncode == 143
    assert time.monotonic() - began < 60
    assert "SIGTERM again: ended at once" in told
    assert told.startswith("\x1b[?25h"), "progress bars hide the cursor"


def test_the_error_says_where_the_state_is_and_with_which_code_the_process_ends() -> None:
    error = StopRequestedError("training a", "stopped by SIGTERM; the state is s", "", "--resume r")
    assert error.exit_code == 128 + signal.SIGTERM
    for name in ("SIGINT", "SIGUSR1", "SIGHUP"):
        found = StopRequestedError("", f"stopped by {name}; the state is s")
        assert found.exit_code == 128 + signal.Signals[name]


LOST = """
import os, signal, subprocess, sys, time
from contextlib import suppress
import psutil
from cluster.connection_watch import watch_cluster
from cluster.runtime import start_ray

heard = []
with start_ray(num_cpus=1):
    for number, name in enumerate(("gcs_server", "raylet"), start=1):
        with watch_cluster(heard.append, limit_s=3.0 if number == 1 else 60.0):
            for child in psutil.Process().children(recursive=True):
                # Others end by themselves, now that the service is gone.
                with suppress(psutil.NoSuchProcess):
                    if name in child.name():
                        child.kill()
            deadline = time.monotonic() + 40
            while len(heard) < number and time.monotonic() < deadline:
                time.sleep(0.1)
    print(heard, flush=True)
    os._exit(0)
"""


def test_one_signal_that_comes_twice_is_one_and_one_before_training_ends_at_once() -> None:
    stops = StopRequests()
    with stops.finishing_iterations():
        stops.handle(signal.SIGTERM, None)
        stops.handle(signal.SIGTERM, None)
    assert stops.received == "SIGTERM"
    early = StopRequests()
    with pytest.raises(StopNow):
        early.handle(signal.SIGUSR1, None)
    assert early.received == "SIGUSR1"


@pytest.mark.parametrize("comes", [signal.SIGTERM, None], ids=["a stop", "no stop"])
def test_what_a_library_makes_of_a_stop_is_still_the_stop(comes: signal.Signals | None) -> None:
    stops = StopRequests()

    def broken_off() -> None:
        """As torch does where its stack of modes is left in the middle."""
        try:
            if comes is not None:
                stops.handle(comes, None)
        finally:
            raise RuntimeError("trying to pop from empty mode stack")

    with pytest.raises(RuntimeError if comes is None else StopRequestedError) as caught:  # noqa: SIM117
        with stops.ending_in(lambda: stops.error("starting", "nothing is lost", "")):
            broken_off()
    assert ("stopped by SIGTERM" in str(caught.value)) == (comes is not None)
    assert stops.broke_off == (comes is not None)


def test_what_runs_a_run_learns_of_a_stop_that_came_while_it_closed() -> None:
    with stop_requests(print) as outer:
        with stop_requests(print) as inner:
            inner.end()
            signal.raise_signal(signal.SIGTERM)
        assert outer.received == inner.received == "SIGTERM"
    assert not outer.broke_off


def test_a_stop_while_a_run_closes_changes_neither_its_result_nor_its_error() -> None:
    heard: list[str] = []
    stops = StopRequests(heard.append)
    stops.end()
    stops.handle(signal.SIGTERM, None)
    assert stops.received == "SIGTERM"
    assert heard == ["SIGTERM: closing; once more ends the process at once"]


def test_only_the_wait_for_an_iteration_is_broken_off_when_the_time_after_a_stop_is_over() -> None:
    stops = StopRequests(stop_after_s=3600.0)

    def iterations() -> Iterator[int]:
        yield 1
        stops.give_up(signal.SIGALRM, None)
        yield 2

    with stops.finishing_iterations():
        stops.handle(signal.SIGINT, None)
        found = stops.bounded(iterations(), interrupts=True)
        assert next(found) == 1
        with pytest.raises(StopNow):
            next(found)
        # An update in this process is finished; the next call is not made.
        stops = StopRequests(stop_after_s=3600.0)
        found = stops.bounded(iterations(), interrupts=False)
        assert [next(found), next(found)] == [1, 2]
        with pytest.raises(StopNow):
            stops.require_time()


@pytest.mark.ray
@pytest.mark.slow
def test_a_lost_cluster_is_told_before_ray_ends_the_process() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", LOST],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "does not answer" in done.stdout, done.stderr
    assert "the raylet of this machine, Ray's daemon" in done.stdout, done.stderr
    assert done.stdout.count("--resume") == 2
