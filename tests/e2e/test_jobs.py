"""`ray job submit` as an operator does it, on a cluster that asks for a token."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import WanPipeline

from pipelines.config import load_recipe
from pipelines.submit import submit
from sgmd_core.errors import ConfigError
from tests.e2e.processes import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_submitted_job_distils_and_leaves_its_run_behind(
    ray_head: str, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", ray_head]
    distil = ["python", "-m", "pipelines.cli", "distill", str(recipe_file)]
    settings = ["iterations=2", "topology.mode=pools", f"output={tmp_path / 'runs'}"]
    excludes = {"excludes": [".git/", ".venv/", "runs/", "data/"]}
    result = subprocess.run(
        [
            *ray,
            "--working-dir",
            str(ROOT),
            "--runtime-env-json",
            json.dumps(excludes),
            "--",
            *distil,
            *settings,
        ],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env=os.environ.copy(),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    run = tmp_path / "runs" / "small"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["iterations"] == 2
    assert summary["topology"] == "pools"
    assert (run / "checkpoints" / "step-000002" / "manifest.json").exists()
    assert WanPipeline.from_pretrained(run / "generator").transformer.config.num_layers == 2


def test_our_own_command_submits_and_follows(
    ray_head: str, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    inside = tmp_path / "tree"
    inside.mkdir()
    for name in ("pipelines", "workers", "cluster", "sgmd_core"):
        (inside / name).symlink_to(ROOT / name)
    (inside / "mine.yaml").write_text(recipe_file.read_text())
    printed: list[str] = []
    job = submit(
        str(inside / "mine.yaml"),
        ["iterations=1", "topology.mode=local", f"output={tmp_path / 'runs'}"],
        address=ray_head,
        working_dir=inside,
        on_log=printed.append,
    )
    assert job
    assert "iteration 1/1" in "".join(printed)
    assert load_recipe(str(tmp_path / "runs" / "small" / "config.yaml")).iterations == 1


def test_a_recipe_that_would_stay_at_home_is_refused(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"inside the folder that travels"):
        submit(str(recipe_file), address="http://127.0.0.1:9", working_dir=tmp_path)
