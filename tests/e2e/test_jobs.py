"""`ray job submit` as an operator does it, on a cluster that asks for a token."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import WanPipeline
from ray.job_submission import JobSubmissionClient
from ray.util.state import list_actors

from cluster.jobs import follow_job, submit_job
from pipelines.config.recipe import load_recipe
from pipelines.submit import submit
from sgmd_core.errors import ConfigError
from tests.e2e.processes import ROOT
from tests.helpers import tiny_wan
from tests.helpers.secrets import files_with, plant

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_submitted_job_distils_and_leaves_its_run_behind(
    ray_head: str, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", ray_head]
    distil = ["python", "-m", "pipelines.cli", "distill", str(recipe_file)]
    settings = ["iterations=2", "topology.mode=pools", f"output={tmp_path / 'runs'}"]
    excludes = {"excludes": [".git/", ".venv/", "/runs/", "/data/"]}
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


def test_our_own_command_submits_and_follows_and_leaves_no_secret_anywhere(
    ray_head: str,
    ray_folder: Path,
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    secrets = plant(monkeypatch)
    inside = tmp_path / "tree"
    inside.mkdir()
    for name in ("sgmd", "pipelines", "workers", "cluster", "sgmd_core"):
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
    # The endpoint went along, without its user.
    record = str(JobSubmissionClient(ray_head).get_job_info(job))
    assert "127.0.0.1:9" in record
    assert [secret for secret in secrets if secret in record + "".join(printed)] == []
    assert files_with(secrets, tmp_path, ray_folder / "head") == []


_LIST_SOURCES = """
from pathlib import Path
for package in ("sgmd", "pipelines", "workers", "cluster", "sgmd_core"):
    for path in Path(package).rglob("*.[pyj]*"):
        print("source", path.as_posix())
"""


def sources_in(listed: str) -> set[str]:
    found = re.findall(r"^source (.+)$", listed, re.MULTILINE)
    return {name for name in found if not name.endswith(".pyc")}


def test_all_of_the_sources_travel(ray_head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation beside these tests would stand in for what was left at home."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    printed: list[str] = []
    job = submit_job(ray_head, ["python", "-c", _LIST_SOURCES], ROOT)
    follow_job(ray_head, job, printed.append)
    # Jobs before it have left compiled files: Ray unpacks the same sources once.
    arrived = sources_in("".join(printed))
    here = subprocess.run(
        [sys.executable, "-c", _LIST_SOURCES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert arrived == sources_in(here.stdout)
    assert "pipelines/data/stream/feed.py" in arrived


def test_actors_that_encode_share_a_gpu(
    ray_head: str, world: Path, wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    clip = ("--num-frames", tiny_wan.NUM_FRAMES, "--height", tiny_wan.HEIGHT)
    clip += ("--width", tiny_wan.WIDTH, "--fps", 8, "--text-length", tiny_wan.TEXT_LENGTH)
    shares = ("--video-encoders", 2, "--video-gpus", 0.25, "--text-gpus", 0.5)
    command = ("encode", world / "held_out", tmp_path / "set", "--model", wan_folder)
    argv = ["python", "-m", "pipelines.cli", *map(str, (*command, *clip, *shares))]
    printed: list[str] = []
    follow_job(ray_head, submit_job(ray_head, argv, ROOT), printed.append)
    assert (tmp_path / "set" / "_index.json").exists(), "".join(printed)
    granted = [
        (stage, actor.required_resources["GPU"])
        for actor in list_actors(address=ray_head, detail=True, limit=1000)
        for stage in ("EncodeVideos", "EncodeCaptions")
        if stage in actor.class_name
    ]
    shares_by_stage = [("EncodeCaptions", 0.5), ("EncodeVideos", 0.25), ("EncodeVideos", 0.25)]
    assert sorted(granted) == shares_by_stage


def test_a_recipe_that_would_stay_at_home_is_refused(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"inside the folder that travels"):
        submit(str(recipe_file), address="http://127.0.0.1:9", working_dir=tmp_path)


def test_a_job_whose_output_would_go_with_its_package_is_refused_before_the_upload(
    tmp_path: Path,
) -> None:
    for output, words in (
        ("runs", "would lie in the job's package"),
        ("s3://bucket/runs", "an address of an object store"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            submit("tiny", [f"output={output}"], address="http://127.0.0.1:9")
        assert "output=/mnt/runs" in str(caught.value)
