"""Ray starts privately, or says why it does not. Each test has a process and a home of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPORTS_ERROR = """
import sys
from cluster.errors import RayStartError
from cluster.runtime import start_ray
try:
    with start_ray(sys.argv[1]):
        pass
except RayStartError as error:
    sys.exit(str(error))
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


def _run(program: str, argument: str, home: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", program, argument],
        env={**environment, "HOME": str(home), **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("127.0.0.1:9", "ConnectionRefusedError"),
        ("ray://127.0.0.1:10001", "Ray Client"),
        ("no address", "no address"),
    ],
)
def test_a_cluster_that_is_not_there_is_told_at_once(tmp_path, address, found):
    result = _run(REPORTS_ERROR, address, tmp_path)
    assert result.returncode == 1
    assert f"While connecting to the Ray cluster at {address}" in result.stderr
    assert found in result.stderr
    assert "RAY_AUTH_TOKEN" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.ray
def test_a_private_cluster_asks_for_a_token_and_leaves_no_file_with_it(tmp_path, ray_folder):
    result = _run(STARTS_TWICE, str(ray_folder / "token"), tmp_path)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / ".ray").exists()
    assert result.stderr == ""


@pytest.mark.ray
def test_a_ray_that_cannot_start_says_why(tmp_path):
    program = REPORTS_ERROR.replace("sys.argv[1]", "temp_dir=sys.argv[1]")
    result = _run(program, "/tmp/" + "x" * 120, tmp_path)
    assert result.returncode == 1
    assert "While starting Ray on this machine" in result.stderr
    assert "short path" in result.stderr
