"""Searches that propose points, several seeds, a population, and a teacher that trials share."""

import csv
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import ray

from pipelines.distillation.run import distill
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.sweeping.run import sweep
from pipelines.sweeping.search import require_pb2
from sgmd_core.errors import ConfigError
from tests.e2e.conftest import MakeRecipe
from tests.helpers.forked_python import processes_below

ROOT = Path(__file__).parents[2]
# Not in the environment, where transformers would load scipy in every process.
PB2_LIBRARIES = Path(sys.prefix) / "pb2"


@pytest.mark.ray
@pytest.mark.slow
def test_points_of_several_figures_and_seeds_are_means_with_intervals_and_a_front(
    make_recipe: MakeRecipe, ray_cluster: None
) -> None:
    result = sweep(
        make_recipe(
            "sweep.space={objective.lambda_nr: {log_uniform: [0.01, 1.0]}}",
            "sweep.search=tpe",
            "sweep.trials=2",
            "sweep.seeds=[0, 1]",
            "sweep.tradeoffs={flow_top_ratio: max}",
            "sweep.iterations=1",
        )
    )
    assert len(result.points) == 2
    best, other = result.points
    assert [trial.seed for trial in best.trials] == [0, 1]
    assert best.settings != other.settings
    spread = best.spread("frechet")
    values = [trial.figures["frechet"] for trial in best.trials]
    assert spread is not None
    assert spread.interval is not None
    assert spread.mean == pytest.approx(sum(values) / 2)
    assert spread.interval[0] < min(values) < max(values) < spread.interval[1]
    assert values[0] != values[1]
    assert spread.mean <= other.value("frechet")
    # The other one is on the front if it moves more.
    is_better = other.value("flow_top_ratio") > best.value("flow_top_ratio")
    assert len(result.front) == 1 + is_better
    page = (result.folder / "report.html").read_text()
    assert "Pareto front" in page
    assert "2 seeds a point" in page


def test_a_population_without_its_libraries_is_refused() -> None:
    if find_spec("scipy") and find_spec("sklearn"):
        pytest.skip("they are in this environment")
    with pytest.raises(ConfigError, match=r"pip install 'sgmd\[pb2\]'"):
        require_pb2()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(not PB2_LIBRARIES.exists(), reason="no libraries of PB2: `make setup`")
def test_the_worst_of_a_population_goes_on_from_the_state_of_a_better_one(
    recipe_file: Path, tmp_path: Path
) -> None:
    settings = [
        # Far apart, so that it is clear who is worst.
        "sweep.space={generator.optimizer.lr: {log_uniform: [1.0e-6, 1.0]}}",
        "seed=2",
        "sweep.search=pb2",
        "sweep.trials=4",
        # Three times to branch: the worst trial does not where it is the first to be measured.
        "sweep.iterations=8",
        "sweep.validate_every=2",
        "sweep.concurrent_trials=4",
        f"output={tmp_path}",
    ]
    path = os.pathsep.join([str(PB2_LIBRARIES), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "sweep", str(recipe_file), *settings],
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "small-sweep"
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert [row["state"] for row in rows] == ["done"] * 4
    assert {row["iteration"] for row in rows} == {"8"}
    branched = [Path(row["run_folder"]) for row in rows if "-from-trial-" in row["run_folder"]]
    assert branched
    for run in branched:
        # Iterations of the state's own run, and those with new settings.
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 8


def service_processes() -> list[psutil.Process]:
    found = []
    for process in processes_below(os.getpid()):
        with suppress(psutil.Error):
            if "".join(process.cmdline()).startswith("ray::ServiceHost"):
                found.append(process)
    return found


def kill_shared_roles(folder: Path) -> None:
    """Kills every process that trials share, once a trial has made an iteration."""
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s:
        if list(folder.glob("trials/*/metrics.jsonl")):
            for process in service_processes():
                process.kill()
            return
        time.sleep(0.01)


@pytest.mark.ray
@pytest.mark.slow
def test_trials_that_share_a_teacher_make_the_bits_of_their_own_also_when_it_is_lost(
    make_recipe: MakeRecipe, ray_cluster: None
) -> None:
    config = make_recipe(
        "sweep.grid={objective.lambda_nr: [0.05, 0.5]}",
        "sweep.settings={topology.mode: pools}",
        "sweep.share_teacher=true",
        "sweep.concurrent_trials=2",
        "sweep.iterations=6",
    )
    folder = config.run_folder.parent / "small-sweep"
    free_cpus = ray.available_resources()["CPU"]
    killer = threading.Thread(target=kill_shared_roles, args=(folder,))
    killer.start()
    try:
        trials = sweep(config).trials
    finally:
        killer.join()
    kinds = []
    for trial in trials:
        nr = trial.settings["objective.lambda_nr"]
        calm = make_recipe(f"name=calm-{nr}", "iterations=6", f"objective.lambda_nr={nr}")
        distill(calm)
        run = RunFolder(trial.run_folder)
        own, separate = (
            [line["losses"] for line in read_jsonl(each.metrics)]
            for each in (run, RunFolder(calm.run_folder))
        )
        assert own == separate
        kinds += [event["kind"] for event in read_jsonl(run.events)]
    assert "recovered" in kinds
    assert service_processes() == []
    deadline_s = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0.0) < free_cpus:
        assert time.monotonic() < deadline_s, f"not given back: {_held()}"
        time.sleep(0.2)


def _held() -> list[object]:
    """Placement groups and actors that are still there."""
    from ray.util.state import list_actors, list_placement_groups

    groups = [each for each in list_placement_groups(detail=True) if each.state != "REMOVED"]
    actors = [each for each in list_actors(detail=True) if each.state != "DEAD"]
    return [*groups, *actors]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("sweep.settings={topology.mode: fused}",), "topology.mode fused"),
        (
            ("sweep.settings={topology.mode: pools, topology.teacher.ranks: 2}",),
            "which run collectives",
        ),
    ],
)
def test_a_teacher_that_cannot_serve_several_runs_is_not_shared(
    make_recipe: MakeRecipe, settings: tuple[str, ...], words: str
) -> None:
    grid = "sweep.grid={objective.lambda_nr: [0.05]}"
    with pytest.raises(ConfigError, match=words):
        sweep(make_recipe(grid, "sweep.share_teacher=true", *settings))
