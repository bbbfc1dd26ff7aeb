"""A small grid with Ray Tune: every combination, ranked, and the best one as a recipe."""

import csv
import json
import threading
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from pipelines.config.recipe import load_recipe
from pipelines.sweep import sweep
from sgmd_core.errors import ConfigError
from tests.e2e.conftest import MakeRecipe
from tests.helpers.shards import write_folder

GRID = (
    "sweep.grid={objective.lambda_nr: [0.05, 0.2], objective.lambda_rc: [0.5, 1.0]}",
    "sweep.iterations=2",
)


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
    result = sweep(config, on_progress=lambda *counted: heard.append(counted))
    assert heard == [("trials", done, 4) for done in range(5)]
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
    table = list(csv.DictReader((result.folder / "results.csv").open()))
    assert len(table) == 4
    stored = json.loads((result.folder / "results.json").read_text())
    assert stored["trials"][0]["figures"]["frechet"] == scores[0]
    low, high = stored["trials"][0]["intervals"]["frechet"]
    assert low <= scores[0] <= high
    # Two updates leave the trials all but equal, on 8 clips.
    assert stored["note"].startswith("trials (objective.lambda_nr=")
    assert "are not told apart by these clips: frechet" in stored["note"]
    assert result.best_recipe.read_text().startswith("# trials (objective.lambda_nr=")


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_may_have_pools_of_its_own(make_recipe: MakeRecipe, ray_cluster: None) -> None:
    config = make_recipe(
        "sweep.grid={objective.lambda_nr: [0.1]}", "sweep.iterations=1", "topology.mode=pools"
    )
    (trial,) = sweep(config).trials
    assert not trial.error
    assert trial.figures["frechet"] >= 0


def processes_of_trials() -> set[psutil.Process]:
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "".join(process.cmdline()).startswith("ray::ImplicitFunc"):
                found.add(process)
    return found


def kill_first_trial(earlier: set[psutil.Process], is_over: threading.Event) -> None:
    """Kills the first process of a trial as soon as there is one."""
    while not is_over.wait(0.01):
        for process in processes_of_trials() - earlier:
            process.kill()
            return


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_whose_process_dies_is_a_row_of_the_table_and_the_others_count(
    make_recipe: MakeRecipe, ray_cluster: None
) -> None:
    config = make_recipe(
        "sweep.grid={objective.lambda_nr: [0.1, 0.2]}", "sweep.iterations=1", "batch.size=2"
    )
    is_over = threading.Event()
    # Those of an earlier sweep of this session may still be there.
    killer = threading.Thread(target=kill_first_trial, args=(processes_of_trials(), is_over))
    killer.start()
    try:
        done, failed = sweep(config).trials
    finally:
        is_over.set()
        killer.join()
    assert not done.error
    assert failed.error
    tried = {trial.settings["objective.lambda_nr"] for trial in (done, failed)}
    assert tried == {0.1, 0.2}
    table = list(csv.DictReader((config.run_folder.parent / "small-sweep/results.csv").open()))
    assert [row["objective.lambda_nr"] for row in table] == [
        str(trial.settings["objective.lambda_nr"]) for trial in (done, failed)
    ]
