"""Killed in the middle and taken up again: every sample once, and the command says so."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.config.recipe import DistillConfig
from pipelines.data.stream.ledger import Ledger
from pipelines.distillation.audit import audit
from pipelines.distillation.run import distill
from pipelines.run.folder import RunFolder, read_jsonl
from tests.e2e.conftest import MakeRecipe
from tests.e2e.processes import ROOT, run_cli
from tests.helpers.faulty_proxy import ProxyBook, Trouble, every, serve_faulty
from tests.helpers.forked_python import kill
from tests.helpers.s3_server import serve_s3, use_server

ITERATIONS = 18
TIMEOUT_S = 240


def used(config: DistillConfig) -> list[tuple[str, ...]]:
    entries = Ledger(RunFolder(config.run_folder).ledger).entries()
    return [entry.sample_ids for entry in entries]


def start_and_kill(config: DistillConfig, after_iterations: int) -> None:
    """Runs the command in a process of its own and ends it as a power cut would."""
    recipe = config.run_folder.parent / f"{config.name}.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(config.to_yaml())
    log = recipe.with_suffix(".log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "distill", str(recipe)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=log,
        stderr=log,
    )
    end = time.monotonic() + TIMEOUT_S
    while len(read_jsonl(RunFolder(config.run_folder).metrics)) < after_iterations:
        assert process.poll() is None, recipe.with_suffix(".log").read_text()
        assert time.monotonic() < end
        time.sleep(0.02)
    kill(process)


@pytest.fixture
def busy_s3(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, ProxyBook]]:
    """The training shards on an S3 server that is busy, slow and breaks off; and its proxy."""
    shutil.copytree(world, tmp_path / "s3" / "clips" / "shapes")
    troubles = (Trouble.SLOW_DOWN, Trouble.RESET, Trouble.INTERNAL, Trouble.DRIBBLE)
    with (
        serve_s3(tmp_path / "s3") as server,
        serve_faulty(server.environment["AWS_ENDPOINT_URL"], every(3, *troubles)) as proxy,
    ):
        use_server(server.environment | {"AWS_ENDPOINT_URL": proxy.endpoint}, monkeypatch)
        yield "s3://clips/shapes/train", proxy


@pytest.mark.slow
def test_a_run_from_a_busy_s3_killed_in_the_middle_uses_every_sample_once(
    make_recipe: MakeRecipe, busy_s3: tuple[str, ProxyBook]
) -> None:
    settings = [f"iterations={ITERATIONS}", "checkpoint.every=4", "data.shuffle.shards=2"]
    whole = make_recipe("name=whole", *settings)
    distill(whole)
    folder, proxy = busy_s3
    settings += [f"data.train={folder}", "data.s3.backoff_s=0.05"]
    killed = make_recipe("name=killed", *settings)
    start_and_kill(killed, after_iterations=6)
    made = len(read_jsonl(RunFolder(killed.run_folder).metrics))
    assert made < ITERATIONS, "the run ended before it was killed"
    # With other micro-batches: they decide who works on a sample, not which samples come.
    other = make_recipe("name=killed", *settings, "batch.micro_batches=4")
    distill(other, resume=True)
    assert used(killed) == used(whole)
    verdict = audit(Path(killed.run_folder))
    assert verdict.is_clean
    assert verdict.samples == ITERATIONS * 4
    assert [epoch.used_once for epoch in verdict.epochs[:-1]] == [48] * (len(verdict.epochs) - 1)
    assert sum(count for kind, count in proxy.troubles.items() if kind is not Trouble.NONE) >= 3
    told = run_cli("ledger", str(killed.run_folder))
    assert told["clean"] is True
    assert told["epochs"] == [epoch.to_json() for epoch in verdict.epochs]


@pytest.mark.slow
def test_a_ledger_whose_end_is_lost_is_told_with_exit_code_1(make_recipe: MakeRecipe) -> None:
    config = make_recipe("iterations=4", "checkpoint.every=2")
    distill(config)
    folder = RunFolder(config.run_folder)
    assert audit(config.run_folder).is_clean
    begun = config.run_folder.with_name("begun")
    begun.mkdir()
    shutil.copy(folder.config, begun)
    told = CliRunner().invoke(app, ["ledger", str(begun)])
    assert (told.exit_code, "nothing yet" in told.output) == (0, True)
    # A checkpoint that a kill cut short: a resume goes back before it, as the ledger did.
    cut_short = config.run_folder / "checkpoints" / "step-000006"
    shutil.copytree(cut_short.with_name("step-000004"), cut_short)
    (cut_short / "manifest.json").unlink()
    assert audit(config.run_folder).is_clean
    folder.metrics.unlink()
    told = CliRunner().invoke(app, ["ledger", str(config.run_folder)])
    assert "metrics.jsonl is not there" in told.output
    (path,) = folder.ledger.iterdir()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]))
    # The checkpoint after the fourth iteration knows better.
    assert audit(config.run_folder).iterations_missing == 2
    path.write_bytes(bytes(range(256)))
    told = CliRunner().invoke(app, ["ledger", str(config.run_folder)])
    assert told.exit_code == 1
    assert "4 iterations were made of which the ledger has none" in told.output


@pytest.mark.slow
def test_a_ledger_with_a_hole_is_told_with_exit_code_1(make_recipe: MakeRecipe) -> None:
    config = make_recipe("iterations=4")
    distill(config)
    path = next(RunFolder(config.run_folder).ledger.iterdir())
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[2], lines[3]]) + "\n")
    result = CliRunner().invoke(app, ["ledger", str(config.run_folder), "--json"])
    assert result.exit_code == 1, result.stderr
    told = json.loads(result.stdout)
    assert told["clean"] is False
    assert told["iterations_follow"] is False
    assert told["epochs"][0]["missing"] == 4


@pytest.mark.slow
def test_epoch_and_position_are_known_at_every_iteration(make_recipe: MakeRecipe) -> None:
    config = make_recipe("iterations=14")
    distill(config)
    lines = read_jsonl(RunFolder(config.run_folder).metrics)
    assert [line["samples_seen"] for line in lines] == [4 * n for n in range(1, 15)]
    assert [line["cursor"]["epoch"] for line in lines] == [0] * 12 + [1] * 2
    # The negative prompt is embedded once a run.
    embedded = ["text.encode_negative" in line["seconds"] for line in lines]
    assert embedded == [True] + [False] * 13
    assert [line["epoch"] for line in lines] == pytest.approx([n / 12 for n in range(1, 15)])
