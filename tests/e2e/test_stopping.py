"""A run that is asked to stop saves its state; the resumed run is the same."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.distillation.run import distill
from pipelines.run.folder import RunFolder, read_jsonl
from sgmd_core.errors import StopRequestedError
from tests.e2e.conftest import MakeRecipe
from tests.e2e.processes import ROOT
from tests.e2e.test_equivalence import history, moments, state
from tests.helpers.moves import assert_moves

ENDLESS = 100_000


def start(config, tmp_path: Path) -> subprocess.Popen[str]:
    recipe = tmp_path / "endless.yaml"
    recipe.write_text(config.to_yaml())
    command = [sys.executable, "-m", "pipelines.cli", "distill", str(recipe)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = RunFolder(config.run_folder).metrics
    deadline = time.monotonic() + 300
    while len(read_jsonl(metrics)) < 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "mode"),
    [
        (signal.SIGTERM, 143, "local"),
        (signal.SIGINT, 130, "local"),
        pytest.param(signal.SIGTERM, 143, "pools", marks=pytest.mark.ray),
    ],
)
def test_a_stopped_run_saves_its_state_and_goes_on_with_the_same_bits(
    make_recipe: MakeRecipe, tmp_path: Path, number: signal.Signals, code: int, mode: str
) -> None:
    settings = (f"iterations={ENDLESS}", "checkpoint.every=0", f"topology.mode={mode}")
    config = make_recipe("name=stopped", *settings)
    process = start(config, tmp_path)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
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
def test_a_second_signal_ends_at_once() -> None:
    code = (
        "import signal, os, time\n"
        "from pipelines.run.stopping import stop_requests\n"
        "with stop_requests(print) as stops:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert stops.received == 'SIGTERM'\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 143
    assert time.monotonic() - began < 60


def test_the_error_says_where_the_state_is_and_with_which_code_the_process_ends() -> None:
    error = StopRequestedError("training a", "stopped by SIGTERM; the state is s", "", "--resume r")
    assert error.exit_code == 128 + signal.SIGTERM
    assert StopRequestedError("", "stopped by SIGINT").exit_code == 128 + signal.SIGINT


LOST = """
import os, signal, subprocess, sys, time
import psutil
from cluster.runtime import start_ray, watch_gcs

heard = []
with start_ray(num_cpus=1):
    with watch_gcs(heard.append, limit_s=3.0):
        for child in psutil.Process().children(recursive=True):
            if "gcs_server" in child.name():
                child.kill()
        deadline = time.monotonic() + 40
        while not heard and time.monotonic() < deadline:
            time.sleep(0.1)
    print(heard, flush=True)
    os._exit(0)
"""


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
    assert "--resume" in done.stdout
