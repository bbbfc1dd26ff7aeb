"""A secret of the environment is in nothing that a run writes."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.config.recipe import load_recipe
from pipelines.distillation.run import distill
from pipelines.run.folder import RunFolder, append_jsonl
from pipelines.run.records import RunEvent
from sgmd_core.errors import ConfigError
from tests.e2e.conftest import MakeRecipe
from tests.e2e.processes import ROOT
from tests.helpers.secrets import PLANTED, files_with, plant


@pytest.mark.slow
def test_a_planted_secret_is_in_no_file_of_a_run_and_its_report(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_recipe("iterations=2", "validation.every=2", "checkpoint.keep_best=1")
    secrets = plant(monkeypatch)
    distill(config)
    event = RunEvent(kind="worker_died", cause="planted-session-token", last_lines=tuple(secrets))
    append_jsonl(RunFolder(config.run_folder).events, event.to_json())
    reported = CliRunner().invoke(app, ["report", str(config.run_folder)])
    assert reported.exit_code == 0, reported.output
    assert (config.run_folder / "report.html").exists()
    assert files_with(secrets, tmp_path) == []
    # The search finds what is there.
    (tmp_path / "left").write_text(f"key={PLANTED['WANDB_API_KEY']}")
    assert len(files_with(secrets, tmp_path)) == 1


@pytest.mark.ray
@pytest.mark.slow
def test_a_planted_secret_is_in_no_file_of_a_sweep_nor_in_what_it_prints(
    recipe_file: Path, tmp_path: Path, ray_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep with a cluster of its own; `test_jobs.py` has the same of a submitted job."""
    secrets = plant(monkeypatch)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(ray_folder / "sweep"))
    (ray_folder / "sweep").mkdir()
    options = ["sweep.iterations=2", "batch.size=2", f"output={tmp_path / 'runs'}"]

    # Refused before Ray starts, by a server that is not there.
    elsewhere = "sweep.grid={data.train: [s3://planted-bucket/train]}"
    refused = CliRunner().invoke(app, ["sweep", str(recipe_file), elsewhere, *options])
    assert refused.exit_code == 2
    assert "s3://planted-bucket/train" in refused.stderr
    # The second trial fails, and writes why.
    grid = "sweep.grid={generator.optimizer.lr: [1.0e-4, 1.0e+30]}"
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "sweep", str(recipe_file), grid, *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    rows = list(csv.DictReader((tmp_path / "runs" / "small-sweep" / "sweep.csv").open()))
    assert [bool(row["error"]) for row in rows] == [False, True]
    assert list((ray_folder / "sweep").rglob("*.out"))
    printed += refused.output + refused.stderr
    assert [secret for secret in secrets if secret in printed] == []
    assert files_with(secrets, tmp_path, ray_folder / "sweep") == []


@pytest.mark.parametrize(
    "setting",
    [
        "data.train=s3://AKIAPLANTED:planted/secret@bucket/train",
        "data.validation=s3://planted:secret@bucket",
        "output=https://planted-secret@host/runs",
        "model.folder=hf://user:planted-secret@org/name",
        "sweep.grid={data.train: ['s3://a:planted-secret@bucket']}",
    ],
)
def test_a_key_in_an_address_is_refused_and_not_repeated(setting: str) -> None:
    with pytest.raises(ConfigError, match="settings are not the place for secrets") as caught:
        load_recipe("tiny", [setting])
    assert "secret@" not in str(caught.value)
    load_recipe("tiny", ["data.train=s3://bucket/a@b", "data.validation=http://host:9000/a@b"])
