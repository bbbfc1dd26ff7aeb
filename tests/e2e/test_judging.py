"""Alarms of real runs, and their best checkpoints; both outlive an interruption."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipelines.config.figures import FIGURES
from pipelines.config.recipe import DistillConfig
from pipelines.distillation.run import distill
from pipelines.media.inference import read_inference_settings
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.run.observer import RunObserver
from pipelines.run.records import IterationRecord
from sgmd_core.errors import AlarmError, ConfigError
from tests.e2e.conftest import MakeRecipe
from workers.evaluator import Evaluator, Video
from workers.measures import MOTION_MEASURES
from workers.models.wan import load_transformer

# With a window of one iteration the tracking loss grows a little in every run.
TOUCHY = ["alarms.window=1", "alarms.tracking_growth=1.0001"]
VALIDATED = ["validation.every=2", "checkpoint.every=0", "checkpoint.keep=1"]
RANKED = [*VALIDATED, "checkpoint.keep_best=1", "checkpoint.score=sharpness_ratio"]


def alarms(config: DistillConfig) -> list[dict[str, object]]:
    return read_jsonl(RunFolder(config.run_folder).alarms)


def validations(config: DistillConfig) -> list[dict[str, object]]:
    """What was measured, without what depends on the clock."""
    lines = read_jsonl(RunFolder(config.run_folder).validation)
    return [{name: line[name] for name in ("iteration", "figures", "intervals")} for line in lines]


def ranking(config: DistillConfig) -> list[tuple[int, float, bool]]:
    content = json.loads(RunFolder(config.run_folder).ranking.read_text())
    return [
        (state["iteration"], state["score"], state["checkpoint"] is not None)
        for state in content["states"]
    ]


def steps(config: DistillConfig) -> set[str]:
    return {path.name for path in RunFolder(config.run_folder).checkpoints.iterdir()}


@pytest.fixture(scope="module")
def whole(module_recipe: MakeRecipe) -> DistillConfig:
    """A run of six iterations, three of them validated, that was never interrupted."""
    config = module_recipe("name=whole", "iterations=6", *RANKED, *TOUCHY)
    distill(config)
    return config


@pytest.mark.slow
def test_a_run_raises_its_alarms_and_goes_on(whole: DistillConfig) -> None:
    found = alarms(whole)
    assert {"tracking_growth"} <= {alarm["name"] for alarm in found}
    assert all(alarm["value"] != alarm["limit"] and alarm["message"] for alarm in found)
    assert len(read_jsonl(RunFolder(whole.run_folder).metrics)) == 6


@pytest.mark.slow
def test_a_run_takes_the_teachers_clips_of_another_one(
    whole: DistillConfig, module_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_teacher = []
    sample = Evaluator.sample

    def counted(self: Evaluator, *args: Any) -> Video:
        of_teacher.append(args[-1] is None)
        return sample(self, *args)

    monkeypatch.setattr(Evaluator, "sample", counted)
    settings = ("iterations=2", "validation.every=2", "generator.optimizer.lr=0.01")
    alone = module_recipe("name=alone", *settings)
    clips = f"validation.teacher_clips={RunFolder(whole.run_folder).teacher_clips}"
    beside = module_recipe("name=beside", *settings, clips)
    distill(alone)
    assert sum(of_teacher) == 2
    distill(beside)
    assert sum(of_teacher) == 2
    assert len(of_teacher) == 6
    assert validations(beside) == validations(alone)
    assert validations(alone)[0]["figures"] != validations(whole)[0]["figures"]
    assert not RunFolder(beside.run_folder).teacher_clips.exists()
    # Another teacher's clips are not taken for its own.
    guided = module_recipe("name=guided", *settings, clips, "teacher.guidance_scale=3.0")
    distill(guided)
    assert sum(of_teacher) == 4


@pytest.mark.slow
def test_a_validation_measures_motion_looks_and_diversity_beside_the_teachers(
    whole: DistillConfig,
) -> None:
    folder = RunFolder(whole.run_folder)
    for line in read_jsonl(folder.validation):
        assert {"frechet", "flow_top_ratio", "saturation_ratio", "diversity_ratio"} <= line[
            "figures"
        ].keys()
        of_sets = {f"{name}{end}" for name in MOTION_MEASURES for end in ("", "_ratio")}
        assert line["figures"].keys() <= set(FIGURES) | of_sets
        assert {"speed_distance", "direction_entropy", "still_share"} <= line["figures"].keys()
        # What is 0 for the teacher has no ratio.
        missing = set(FIGURES) - line["figures"].keys()
        assert all(name.endswith("_ratio") for name in missing)
        assert line["intervals"].keys() == line["figures"].keys()
        for name, (low, high) in line["intervals"].items():
            assert low <= line["figures"][name] <= high
        assert line["influences"].keys() == {"sharpness_ratio", "frechet"}
        num_clips = whole.validation.num_captions
        assert {len(each) for each in line["influences"].values()} == {num_clips}
        assert (folder.samples / line["sheet"]).exists()


@pytest.mark.slow
def test_the_best_and_the_newest_checkpoint_are_kept_and_the_best_is_exported(
    whole: DistillConfig,
) -> None:
    folder = RunFolder(whole.run_folder)
    scores = {line["iteration"]: line["figures"]["sharpness_ratio"] for line in validations(whole)}
    best = min(scores, key=scores.get)
    assert [entry[:2] for entry in ranking(whole)] == sorted(scores.items(), key=lambda i: i[1])
    assert steps(whole) == {f"step-{best:06d}", "step-000006"}
    assert {entry[0] for entry in ranking(whole) if entry[2]} == {best, 6}
    summary = json.loads(folder.summary.read_text())
    assert summary["best"][0]["iteration"] == best
    # After so few updates and with so few clips, the best one may be any of them.
    note = json.loads(folder.ranking.read_text())["note"]
    assert note.startswith(f"checkpoints {best}")
    assert "are not told apart by these clips: sharpness_ratio" in note
    assert summary["ranking_note"] == note
    kept = load_file(folder.checkpoints / f"step-{best:06d}" / "ema" / "weights.safetensors")
    exported = load_transformer(folder.best).state_dict()
    assert exported.keys() == kept.keys()
    assert all(torch.equal(exported[name], kept[name]) for name in kept)
    assert read_inference_settings(folder.best) == read_inference_settings(folder.generator)


PARTS = ["name=parts", *RANKED, *TOUCHY]


@pytest.fixture(scope="module")
def stopped(module_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the folder of a run that ended after four iterations of six."""
    # States are kept as long as their validations are under way.
    config = module_recipe("iterations=4", *PARTS, "checkpoint.keep=2")
    distill(config)
    return shutil.copytree(config.run_folder, tmp_path_factory.mktemp("stopped") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("num_lost", [1, 2])
def test_a_resumed_run_has_the_alarms_the_figures_and_the_ranking_of_one_never_stopped(
    whole: DistillConfig, stopped: Path, module_recipe: MakeRecipe, num_lost: int
) -> None:
    parts = module_recipe("iterations=6", *PARTS)
    shutil.rmtree(parts.run_folder)
    shutil.copytree(stopped, parts.run_folder)
    # As if it had been killed before its last validations were back.
    log = RunFolder(parts.run_folder).validation
    lines = log.read_text().splitlines(keepends=True)
    assert len(lines) == 2
    log.write_text("".join(lines[:-num_lost]))
    distill(parts, resume=True)
    assert validations(parts) == validations(whole)
    assert alarms(parts) == alarms(whole)
    assert ranking(parts) == ranking(whole)
    assert steps(parts) == steps(whole)


@pytest.mark.slow
def test_an_alarm_can_end_the_run_whose_state_stays_and_can_be_gone_on_with(
    make_recipe: MakeRecipe,
) -> None:
    config = make_recipe("iterations=6", *RANKED, *TOUCHY, "alarms.stop=[tracking_growth]")
    with pytest.raises(AlarmError, match=r"tracking growth at iteration (\d).*--resume") as caught:
        distill(config)
    folder = RunFolder(config.run_folder)
    done = len(read_jsonl(folder.metrics))
    assert 1 < done < 6
    assert f"step-{done:06d}" in str(caught.value)
    assert f"step-{done:06d}" in steps(config)
    (note,) = caught.value.__notes__
    # Iteration 2 was validated before any alarm: there is a best one.
    assert validations(config)[0]["iteration"] == 2
    assert str(folder.best) in note
    assert load_transformer(folder.best).state_dict().keys()
    distill(config, resume=True)
    assert len(read_jsonl(folder.metrics)) == 6


class Obstacle(RunObserver):
    """Puts a file where the validator's sheets are to go."""

    def __init__(self, samples: Path) -> None:
        self._samples = samples
        self.warnings: list[str] = []

    def iteration(self, record: IterationRecord) -> None:
        if record.iteration == 2:
            self._samples.rename(self._samples.with_name("moved"))
            self._samples.touch()

    def warning(self, text: str) -> None:
        self.warnings.append(text)


@pytest.mark.slow
def test_a_validator_that_fails_ends_the_validations_and_not_the_run(
    make_recipe: MakeRecipe,
) -> None:
    config = make_recipe("iterations=6", *RANKED)
    folder = RunFolder(config.run_folder)
    observer = Obstacle(folder.samples)
    summary = distill(config, observer=observer)
    assert [line["iteration"] for line in validations(config)] == [2]
    (told,) = observer.warnings
    assert "validation of iteration 4 failed" in told
    assert "FileExistsError" in told
    assert summary["iterations"] == 6
    assert json.loads(folder.summary.read_text())["validation_problem"] == told
    assert summary["best"][0]["iteration"] == 2
    assert load_transformer(folder.best).state_dict().keys()
    # What was to be judged is kept, so that it can still be.
    assert steps(config) == {"step-000002", "step-000004", "step-000006"}


def test_a_score_that_is_no_figure_is_refused_before_anything_starts(
    make_recipe: MakeRecipe,
) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.score.*sharpness_ratio"):
        make_recipe(*RANKED, "checkpoint.score=sharpnes_ratio")


@pytest.mark.slow
def test_the_folder_says_from_the_start_that_no_alarm_was_raised(
    make_recipe: MakeRecipe,
) -> None:
    config = make_recipe("iterations=1")
    distill(config)
    assert Path(RunFolder(config.run_folder).alarms).read_text() == ""
