"""A small study over real networks: killed, resumed, and a run of it that fails."""

import csv
import io
import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.config.recipe import DistillConfig
from pipelines.distillation.run import distill
from pipelines.run.folder import RunFolder
from pipelines.run.observer import RunObserver
from pipelines.run.progress import LineObserver
from pipelines.run.stop_rule import StopRule
from pipelines.study import run as study_run
from pipelines.study.judging import StudyEvaluator
from pipelines.study.measured_runs import Point
from pipelines.study.run import dry_run_study, study
from sgmd_core.errors import ConfigError, StopRequestedError
from sgmd_core.worlds import WorldName
from tests.e2e.conftest import MakeRecipe
from tests.e2e.processes import ROOT, TIMEOUT_S
from tests.helpers.records import iteration_record
from tests.helpers.s3_server import S3Server, use_server
from workers.build import build_evaluator
from workers.clip_sets import ClipRequest
from workers.evaluator import CHUNK_CLIPS
from workers.role_state import load_role
from workers.samplings import FLOOR, REFERENCE, TEACHER_FEW, Sampling
from workers.validation_evaluator import ValidationEvaluator

STUDY = (
    "study.variants={ours: {}, theirs: {objective.method: tsg_sim}}",
    "study.seeds=[1, 2]",
    "study.budget={unit: iterations, amount: 2}",
    "study.measurements=2",
    "study.num_captions=8",
    "study.hypotheses={h: {variant: ours, baseline: theirs, figure: flow_top, better: nearer}}",
)
ALONE = ("study.hypotheses={}", "study.seeds=[1]", "study.variants={ours: {}}")
RUNS = ("ours-seed1", "theirs-seed1", "ours-seed2", "theirs-seed2")

# Dies in the middle of the second run: its first iteration is saved, its second is not.
KILLED = """
import os, signal, sys
from contextlib import contextmanager, suppress
from pipelines.config.recipe import load_recipe
from pipelines.run.observer import RunObserver
from pipelines.study.run import study

class Killer(RunObserver):
    iterations = 0
    def iteration(self, record):
        Killer.iterations += 1
        if Killer.iterations == 4:
            os.kill(os.getpid(), signal.SIGKILL)

@contextmanager
def observer(rule, spent_s):
    yield Killer()

study(load_recipe(sys.argv[1]), print, observer)
"""


@contextmanager
def silent(rule: StopRule, spent_s: float):
    yield RunObserver()


def made(config: DistillConfig, notes: list[str] | None = None):
    return study(config, (notes if notes is not None else []).append, silent)


def figures(folder: Path) -> dict[tuple[str, str, str], str]:
    rows = csv.DictReader((folder / "results.csv").open())
    return {(row["variant"], row["seed"], row["iteration"]): row["frechet"] for row in rows}


@pytest.mark.slow
def test_a_study_killed_at_an_address_goes_on_there_and_ends_with_the_figures_of_a_disk(
    make_recipe: MakeRecipe, tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_server(server.environment, monkeypatch)
    config = make_recipe(*STUDY, "output=s3://runs/studies")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "lost"))
    recipe = tmp_path / "study.yaml"
    recipe.write_text(config.to_yaml())
    command = [sys.executable, "-c", KILLED, str(recipe)]
    dead = subprocess.run(command, cwd=ROOT, timeout=TIMEOUT_S, check=False, capture_output=True)
    assert dead.returncode == -signal.SIGKILL, dead.stderr.decode()

    folder = server.root / "runs" / "studies" / "small-study"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    first = folder / "runs" / RUNS[0]
    finished_at = (first / "summary.json").stat().st_mtime_ns
    notes: list[str] = []
    result = made(config, notes)
    assert (first / "summary.json").stat().st_mtime_ns == finished_at
    assert [note for note in notes if note.startswith("run ")] == [
        f"run {number}/4: {name}{', finished before' if number == 1 else ''}"
        for number, name in enumerate(RUNS, 1)
    ]
    sampled = [note for note in notes if note.startswith("sampling")]
    # The teacher's clips and those of the first run are remembered; six points, two seeds each.
    assert len(sampled) == 12
    assert not any("teacher's" in note or RUNS[0] in note for note in sampled)
    runs = [f"s3://runs/studies/small-study/runs/{name}" for name in RUNS]
    assert [run.run_folder for run in result.runs] == runs
    assert [len(run.points) for run in result.runs] == [2, 2, 2, 2]
    assert not any(run.error for run in result.runs)
    # Written down once, before the first run, and tested over both seeds.
    (version,) = json.loads((folder / "hypotheses.json").read_text())["versions"]
    assert version["finished_runs"] == 0
    (verdict,) = json.loads((folder / "results.json").read_text())["verdicts"]
    assert ([*verdict["gains"]], verdict["outcome"]) == (["1", "2"], "undecided")
    assert "## Hypotheses" in (folder / "results.md").read_text()
    for name in ("results.md", "results.json", "cost.csv", "quality-seconds.svg", "cost.svg"):
        assert (folder / name).stat().st_size > 0

    whole = made(make_recipe(*STUDY, "name=whole"))
    assert whole.teacher == result.teacher
    local = tmp_path / "runs" / "whole-study"
    assert figures(local) == figures(folder)
    files = [
        {path.relative_to(each).as_posix() for path in each.rglob("*") if path.is_file()}
        for each in (folder, local)
    ]
    # A run that is resumed has said so.
    assert {name for name in files[0] ^ files[1] if not name.endswith("events.jsonl")} == set()
    assert list((tmp_path / "new" / "sgmd" / "runs").iterdir()) == []


@pytest.mark.slow
def test_a_run_that_fails_is_a_row_that_says_why_and_is_tried_again(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    broken_by = "{generator.optimizer.lr: 1.0e+30, guards.max_skipped: 0}"
    variants = f"study.variants={{ours: {{}}, broken: {broken_by}}}"
    short = (*STUDY, "study.hypotheses={}", variants, "study.seeds=[1]", "name=failing")
    result = made(make_recipe(*short))
    ours, broken = result.runs
    assert not ours.error
    assert "finite" in broken.error
    assert "**broken, seed 1** failed" in (tmp_path / "runs/failing-study/results.md").read_text()
    # The row names a file with the traceback and the notes, such as where the last state is.
    story = (tmp_path / "runs/failing-study/runs/broken-seed1/failure.txt").read_text()
    assert "broken-seed1/failure.txt" in broken.error
    assert "Traceback" in story
    assert "state" in story.splitlines()[-1]
    notes: list[str] = []
    made(make_recipe(*short), notes)
    assert [note for note in notes if "failed" in note]


@pytest.mark.slow
def test_a_study_by_the_clock_ends_its_runs_when_their_time_is_over(
    make_recipe: MakeRecipe,
) -> None:
    clock = "study.budget={unit: seconds, amount: 0.001}"
    config = make_recipe(*STUDY, clock, *ALONE)
    (run,) = made(config).runs
    assert [point.iteration for point in run.points] == [1]
    assert run.points[0].seconds >= 0.001
    # Nothing is left to do.
    notes: list[str] = []
    made(config, notes)
    assert not [note for note in notes if note.startswith("sampling")]


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["distill", "_measure"])
@pytest.mark.parametrize("swallowed", [False, True])
def test_a_stop_ends_a_study_also_where_a_library_swallows_it_or_fails_of_it(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, broken: str, swallowed: bool
) -> None:
    def broken_off(*_: object, **__: object) -> dict[int, Point]:
        with suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        if swallowed:
            return {}
        raise RuntimeError("broken off in the middle")

    clock = "study.budget={unit: seconds, amount: 0.001}"
    config = make_recipe(*STUDY, clock, *ALONE)
    monkeypatch.setattr(study_run, broken, broken_off)
    with pytest.raises(StopRequestedError, match="stopped by SIGTERM") as caught:
        made(config)
    assert caught.value.attempted.startswith("making and measuring")


@pytest.mark.slow
def test_a_study_by_the_clock_measures_on_the_way_and_makes_no_finished_run_again(
    make_recipe: MakeRecipe,
) -> None:
    clock = "study.budget={unit: seconds, amount: 2.5}"
    config = make_recipe(*STUDY, clock, *ALONE)
    opened: list[tuple[float | None, float]] = []

    class Slow(RunObserver):
        # What is written between two iterations is not training time.
        def iteration(self, record):
            time.sleep(0.5 if record.iteration == 0 else 0)

    @contextmanager
    def observer(rule: StopRule, spent_s: float):
        opened.append((rule.max_seconds, spent_s))
        yield Slow()

    (run,) = study(config, lambda _: None, observer).runs
    assert not run.error
    half, end = run.points
    assert half.iteration < end.iteration
    assert 1.25 <= half.seconds < 2.5 <= end.seconds
    summary = Path(run.run_folder) / "summary.json"
    written_at = summary.stat().st_mtime_ns
    (again,) = study(config, lambda _: None, observer).runs
    assert summary.stat().st_mtime_ns == written_at
    assert again.points == run.points
    assert opened == [(2.5, 0.0)]


def test_progress_by_the_clock_tells_the_time_and_no_number_of_iterations() -> None:
    record = iteration_record(seconds_total=4.0, samples_seen=4, exit_steps=(1,))
    file = io.StringIO()
    console = Console(file=file, width=200)
    LineObserver(console, StopRule(1_000_000, max_seconds=60.0), spent_s=26.0).iteration(record)
    told = file.getvalue()
    assert told.startswith("iteration 1  ")
    assert "0:00:30 left" in told


@pytest.mark.slow
def test_a_study_does_not_go_on_with_runs_of_other_settings(make_recipe: MakeRecipe) -> None:
    made(make_recipe(*STUDY, *ALONE))
    with pytest.raises(ConfigError, match="made with other settings"):
        made(make_recipe(*STUDY, "objective.lambda_nr=0.3"))


@pytest.mark.slow
def test_a_dry_run_tells_forwards_and_time_and_makes_nothing(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    planned = dry_run_study(make_recipe(*STUDY, "generator.compute.precision=bf16"))
    assert planned["runs"] == 4
    assert [row["units_per_iteration"] for row in planned["variants"]] == pytest.approx(
        [10.363, 10.363], abs=0.001
    )
    assert planned["training_seconds"] > 0
    assert not (tmp_path / "runs").exists()
    # On a cluster nobody knows before a first run.
    assert dry_run_study(make_recipe(*STUDY, "topology.mode=pools"))["training_seconds"] is None
    with pytest.raises(ConfigError, match="choosing 5000 captions"):
        dry_run_study(make_recipe(*STUDY, "study.num_captions=5000"))


@pytest.mark.slow
def test_the_command_prints_the_plan_as_a_table_and_as_json(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = tmp_path / "study.yaml"
    recipe.write_text(make_recipe(*STUDY).to_yaml())
    shown = CliRunner().invoke(app, ["study", str(recipe), "--dry-run"])
    assert "predicted training time" in shown.stdout
    told = CliRunner().invoke(app, ["study", str(recipe), "--dry-run", "--json"])
    assert json.loads(told.stdout)["seeds"] == [1, 2]


@pytest.mark.slow
def test_diversity_means_two_seeds_of_a_caption_in_study_and_validation_alike(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    config = make_recipe("iterations=1", "study.num_captions=6")
    distill(config)
    checkpoint = str(RunFolder(config.run_folder).checkpoints / "step-000001")
    judge = StudyEvaluator(config, tmp_path / "study", lambda words: None)
    # Captions that do not repeat, and yet there is a diversity.
    judge.captions = tuple(dict.fromkeys(judge.captions))
    assert len(judge.captions) > 2
    found = judge.generator(config.schedule, checkpoint, "ema", "the generator")
    request = ClipRequest(
        captions=judge.captions,
        sampling=Sampling(config.generator.num_steps, 1.0, config.seed + 1),
        batch_size=CHUNK_CLIPS,
        fps=config.video.fps,
        world=WorldName.SHAPES,
    )
    reference = Sampling(
        config.validation.teacher_steps, config.teacher.guidance_scale, config.seed
    )
    evaluator = build_evaluator(config.model, config.video, config.schedule, num_threads=1)
    validated = ValidationEvaluator(evaluator, request, reference).validate(
        load_role(checkpoint, "ema").weights
    )
    assert found["diversity"] > 0
    assert found["diversity"] == pytest.approx(validated.figures["diversity"], rel=1e-6)
    # The teacher's two seeds are each other's.
    reference, floor = (judge.teacher[name]["diversity"] for name in (REFERENCE, FLOOR))
    assert reference == pytest.approx(floor, rel=1e-9)
    assert reference > 0
    assert judge.teacher[TEACHER_FEW]["diversity"] != pytest.approx(found["diversity"], rel=1e-4)
