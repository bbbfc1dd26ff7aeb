"""Ray starts privately, or says why it does not. Each test has a process and a home of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from cluster.runtime import start_ray

REPORTS_ERRORS = """
import sys
from cluster.errors import RayStartError
from cluster.runtime import start_ray
for address in sys.argv[1:]:
    try:
        with start_ray(address):
            sys.exit("started")
    except RayStartError as error:
        print(error)
"""

STARTS_TWICE = """
import os, sys
import ray
from cluster.runtime import start_ray

@ray.remote
def mode_and_token():
    return os.environ["RAY_AUTH_TOKEN"]

with start_ray(num_cpus=2, object_store_memory=100 * 2**20, temp_dir=sys.argv[1]):
    with start_ray("auto"):
        assert ray.cluster_resources()["CPU"] == 2
    assert len(ray.get(mode_and_token.remote())) == 64
assert not ray.is_initialized()
"""


def _run(program: str, *arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**environment, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_told_at_once(tmp_path):
    addresses = ("127.0.0.1:9", "ray://127.0.0.1:10001", "no address")
    result = _run(REPORTS_ERRORS, *addresses, home=tmp_path)
    assert result.returncode == 0, result.stderr
    refused, client, nonsense = result.stdout.splitlines()
    assert "connecting to the Ray cluster at 127.0.0.1:9: ConnectionRefusedError" in refused
    assert "Ray Client" in client
    assert "no address" in nonsense
    assert "RAY_AUTH_TOKEN" in refused


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_process_that_is_connected_stays_so():
    with start_ray():
        assert ray.cluster_resources()["CPU"] == 4
    assert ray.is_initialized()


@pytest.mark.ray
@pytest.mark.slow
def test_a_private_cluster_asks_for_a_token_and_leaves_no_file_with_it(tmp_path, ray_folder):
    result = _run(STARTS_TWICE, str(ray_folder / "token"), home=tmp_path)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / ".ray").exists()
    assert result.stderr == ""


@pytest.mark.slow
def test_a_ray_that_cannot_start_says_why(tmp_path):
    program = REPORTS_ERRORS.replace("start_ray(address)", "start_ray(temp_dir=address)")
    result = _run(program, "/tmp/" + "x" * 120, home=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "While starting Ray on this machine" in result.stdout
    assert "short path" in result.stdout


STARTS_LATE = """
import subprocess, sys
import ray
from cluster.errors import RayStartError
from cluster.runtime import start_ray

# A machine that is busy for exactly as long cannot be had, so this stands for Ray.
late, tries = int(sys.argv[1]), []

parts = []

def init_late(*arguments, **options):
    assert all(part.poll() is not None for part in parts), "the first start still runs"
    tries.append(options)
    if len(tries) <= late:
        parts.append(subprocess.Popen(["sleep", "600"]))
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
def test_a_start_that_comes_too_late_is_tried_once_more(tmp_path, late, told):
    result = _run(STARTS_LATE, str(late), home=tmp_path)
    assert result.stdout.strip() == told, result.stderr
