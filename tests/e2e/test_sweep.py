"""A small grid with Ray Tune: every combination, ranked, and the best one as a recipe."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.config.recipe import load_recipe
from pipelines.distillation.run import distill
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.run.stopping import STOP_SIGNALS
from pipelines.sweeping.run import sweep
from sgmd_core.errors import ConfigError
from tests.e2e.conftest import MakeRecipe
from tests.helpers.forked_python import processes_below
from tests.helpers.shards import write_folder

GRID = (
    "sweep.grid={objective.lambda_nr: [0.05, 0.2], objective.lambda_rc: [0.5, 1.0]}",
    "sweep.iterations=2",
)


@pytest.mark.slow
def test_an_empty_grid_is_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.grid"):
        sweep(make_recipe())


def test_a_value_that_does_not_fit_is_refused_before_any_trial(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ConfigError, match=r"lambda_nr"):
        make_recipe("sweep.grid={objective.lambda_nr: [0.1, minus]}")


def test_a_score_that_nothing_measures_is_refused_before_any_trial(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.score.*sharpness_ratio"):
        make_recipe(*GRID, "sweep.score=sharpnes_ratio")
    write_folder(tmp_path / "other", [16])
    settings = (f"data.validation={tmp_path / 'other'}", "sweep.score=speed_spearman")
    with pytest.raises(ConfigError, match=r"captions of `sgmd shapes`.*Set sweep\.score"):
        sweep(make_recipe(*GRID, *settings))


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_tries_every_combination_and_writes_the_best(
    make_recipe: MakeRecipe, ray_cluster: None
) -> None:
    config = make_recipe(*GRID)
    heard: list[tuple[str, int, int]] = []
    answers = [signal.getsignal(number) for number in STOP_SIGNALS]
    result = sweep(config, on_progress=lambda *counted: heard.append(counted))
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == answers
    assert list(dict.fromkeys(heard)) == [("trials", done, 4) for done in range(5)]
    tried = {
        (t.settings["objective.lambda_nr"], t.settings["objective.lambda_rc"])
        for t in result.trials
    }
    assert tried == {(0.05, 0.5), (0.05, 1.0), (0.2, 0.5), (0.2, 1.0)}
    assert not any(trial.error for trial in result.trials)
    scores = [trial.figures["frechet"] for trial in result.trials]
    assert scores == sorted(scores)
    best = load_recipe(str(result.best_recipe))
    assert best.objective.lambda_nr == result.trials[0].settings["objective.lambda_nr"]
    assert best.objective.lambda_rc == result.trials[0].settings["objective.lambda_rc"]
    assert best.iterations == config.iterations
    table = list(csv.DictReader((result.folder / "sweep.csv").open()))
    assert len(table) == 4
    low, high = result.trials[0].intervals["frechet"]
    assert low <= scores[0] <= high
    # Two updates leave the trials all but equal, on 8 clips.
    assert result.note.startswith("trials (objective.lambda_nr=")
    assert "are not told apart by these clips: frechet" in result.note
    assert result.best_recipe.read_text().startswith("# trials (objective.lambda_nr=")


def processes_of_trials() -> set[psutil.Process]:
    found = set()
    for process in processes_below(os.getpid()):
        with suppress(psutil.Error):
            if "".join(process.cmdline()).startswith("ray::ImplicitFunc"):
                found.add(process)
    return found


def kill_a_trial_that_has_saved(folder: Path, earlier: set[psutil.Process]) -> None:
    """Kills the process of a trial once there is a checkpoint of it, and it still runs."""
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s:
        if list(folder.glob("trials/*/checkpoints/*/manifest.json")):
            for process in processes_of_trials() - earlier:
                process.kill()
                return
        time.sleep(0.01)


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_whose_process_dies_goes_on_from_its_own_state_to_the_same_numbers(
    make_recipe: MakeRecipe, ray_cluster: None
) -> None:
    """Beside it, a trial that fails is a row with its own error, and none of its retries train."""
    config = make_recipe(
        # The second one: the norms of its gradients are no longer finite.
        "sweep.grid={generator.optimizer.lr: [1.0e-3, 1.0e+30]}",
        "sweep.iterations=8",
        "sweep.validate_every=2",
        "guards.max_skipped=0",
    )
    folder = config.run_folder.parent / "small-sweep"
    earlier = processes_of_trials()
    killer = threading.Thread(target=kill_a_trial_that_has_saved, args=(folder, earlier))
    killer.start()
    try:
        done, failed = sweep(config).trials
    finally:
        killer.join()
    assert (done.state, failed.state) == ("done", "failed")
    assert "NonFiniteError" in failed.error
    assert [iteration for iteration, _ in done.curve] == [2, 4, 6, 8]
    events = read_jsonl(RunFolder(done.run_folder).events)
    assert [event["kind"] for event in events].count("restarted") == 1
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert [row["state"] for row in rows] == ["done", "failed"]
    assert rows[1]["error"] == failed.error
    calm = make_recipe("name=calm", "iterations=8", "validation.every=2")
    summary = distill(calm)
    assert done.figures["frechet"] == summary["validation"]["frechet"]
    # The same data in the same order: what was used, line by line.
    assert cursors(Path(done.run_folder)) == cursors(calm.run_folder)


def cursors(run: Path) -> list[dict[str, int]]:
    return [line["cursor"] for line in read_jsonl(RunFolder(run).metrics)]


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_whose_processes_are_all_killed_goes_on_and_runs_no_finished_trial_again(
    recipe_file: Path, tmp_path: Path
) -> None:
    """TPE and ASHA, killed with -9 as a whole, trial processes included, and taken up again."""
    settings = [
        "sweep.space={objective.lambda_nr: {log_uniform: [0.01, 1.0]}}",
        "sweep.search=tpe",
        "sweep.trials=3",
        "sweep.iterations=4",
        "sweep.validate_every=2",
        "sweep.scheduler={method: asha, grace_iterations: 2, reduction_factor: 2}",
        f"output={tmp_path / 'runs'}",
    ]
    command = [sys.executable, "-m", "pipelines.cli", "sweep", str(recipe_file), *settings]
    folder = tmp_path / "runs" / "small-sweep"
    # Tune saves what it knows after each event: a trial here is over within the usual second.
    environment = {**os.environ, "COLUMNS": "80", "TUNE_GLOBAL_CHECKPOINT_S": "0"}
    first = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        wait_until(
            lambda: states(folder)[:1] in (["done"], ["stopped"]) and len(states(folder)) > 1
        )
        second = trials_of(folder)[1]["run_folder"]
        wait_until(lambda: list(Path(second).glob("checkpoints/*/manifest.json")))
    finally:
        kill_tree(first.pid)
    ended = trials_of(folder)[0]
    before = Path(ended["run_folder"], "metrics.jsonl").stat().st_mtime_ns
    # Refused before Ray starts, and so in this process.
    asked = ["sweep", str(recipe_file), *settings]
    refused = CliRunner().invoke(app, asked)
    assert refused.exit_code == 2
    assert "go on with --resume" in refused.stderr
    refused = CliRunner().invoke(app, [*asked, "sweep.trials=5", "--resume"])
    assert "sweep.trials" in refused.stderr
    command.append("--resume")
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "trials: 3/3" in again.stderr
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert len(rows) == 3
    assert {row["state"] for row in rows} <= {"done", "stopped"}
    assert len(list((folder / "trials").iterdir())) == 3
    assert Path(ended["run_folder"], "metrics.jsonl").stat().st_mtime_ns == before
    assert (folder / "report.html").exists()
    taken_up = read_jsonl(RunFolder(second).events)
    assert [event["kind"] for event in taken_up] == ["restarted"]
    assert load_recipe(str(folder / "best.yaml")).objective.lambda_nr == pytest.approx(
        float(rows[0]["objective.lambda_nr"])
    )


def states(folder: Path) -> list[str]:
    return [each["state"] for each in trials_of(folder)]


def trials_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "trials.json"
    return json.loads(path.read_text())["trials"] if path.exists() else []


def wait_until(is_so: Callable[[], object], timeout_s: float = 180.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def kill_tree(pid: int) -> None:
    """Kills a process and all below it, as a machine does that loses its power."""
    tree = [psutil.Process(pid), *processes_below(pid)]
    for process in tree:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(tree)
