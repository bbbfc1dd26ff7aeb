"""A sweep whose folder is an address: killed as a whole, and taken up from another empty disk."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.config.recipe import load_recipe
from pipelines.run.folder import read_jsonl
from pipelines.sweeping.run import sweep
from tests.e2e.conftest import MakeRecipe
from tests.e2e.processes import ROOT, run_cli
from tests.e2e.test_sweep import kill_tree, states, wait_until
from tests.helpers.s3_server import S3Server, use_server

SETTINGS = (
    "sweep.grid={objective.lambda_nr: [0.05, 0.8]}",
    "sweep.iterations=4",
    "sweep.validate_every=2",
)


def rows_of(table: str) -> list[dict[str, str]]:
    """Rows of sweep.csv, without what differs from run to run."""
    own = ("seconds", "name", "run_folder")
    rows = csv.DictReader(io.StringIO(table))
    return [{key: value for key, value in row.items() if key not in own} for row in rows]


def files_below(folder: Path) -> list[str]:
    """Files of a sweep, with trials by their places; what Tune writes has names of the time."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(
        "/".join(["trials", *path.parts[2:]]) if path.parts[0] == "trials" else path.as_posix()
        for path in found
        if path.parts[0] != "tune"
    )


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_at_an_address_is_that_of_a_disk_also_after_kill_9_of_everything(
    server: S3Server,
    make_recipe: MakeRecipe,
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ray_cluster: None,
) -> None:
    disk = make_recipe(*SETTINGS)
    sweep(disk)
    use_server(server.environment, monkeypatch)
    place, there = "s3://runs/sweeps/small-sweep", server.root / "runs/sweeps/small-sweep"
    settings = (*SETTINGS, "output=s3://runs/sweeps")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "sweep", str(recipe_file), *settings],
        env={**environment, "XDG_CACHE_HOME": str(tmp_path / "lost")},
        start_new_session=True,
    )
    try:
        wait_until(lambda: states(there)[:1] == ["done"] and len(states(there)) > 1)
        second = json.loads((there / "trials.json").read_text())["trials"][1]["run_folder"]
        assert second.startswith(f"{place}/trials/")
        state = there / "trials" / second.rpartition("/")[2] / "checkpoints"
        wait_until(lambda: list(state.glob("*/manifest.json")))
    finally:
        kill_tree(first.pid)
    ended = there / "trials" / json.loads((there / "trials.json").read_text())["trials"][0]["name"]
    before = (ended / "metrics.jsonl").stat().st_mtime_ns

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    told: Any = run_cli("sweep", str(recipe_file), *settings, "--resume-auto")
    assert (told["folder"], told["best_recipe"]) == (place, f"{place}/best.yaml")
    local = disk.run_folder.parent / "small-sweep"
    rows = [rows_of((each / "sweep.csv").read_text()) for each in (there, local)]
    assert rows[0] == rows[1]
    assert (ended / "metrics.jsonl").stat().st_mtime_ns == before
    assert "restarted" in [event["kind"] for event in read_jsonl(state.parent / "events.jsonl")]
    taken_up = {"trials/events.jsonl", "trials/log.jsonl"}
    assert {*files_below(there)} - taken_up == {*files_below(local)} - taken_up
    assert list((tmp_path / "new" / "sgmd" / "runs").iterdir()) == []

    best = load_recipe(f"{place}/best.yaml")
    assert best.objective == load_recipe(str(local / "best.yaml")).objective
    page = CliRunner().invoke(
        app, ["report", place, "--output", str(tmp_path / "page.html"), "--json"]
    )
    assert json.loads(page.stdout)["bytes"] == (tmp_path / "page.html").stat().st_size
    key, secret = (environment[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    for path in there.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for each in (key.encode(), secret.encode()):
                # Tune writes pickles as hexadecimal digits.
                assert each not in content
                assert each.hex().encode() not in content
