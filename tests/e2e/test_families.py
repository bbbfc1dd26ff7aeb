"""A family that is nothing like Wan goes the whole way: distilled, exported, reloaded, sampled."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.distillation.run import distill, dry_run
from pipelines.evaluation.plan import EvaluationOptions
from pipelines.evaluation.run import evaluate
from pipelines.generate import generate
from pipelines.media.inference import read_inference_settings
from pipelines.planning.workload import Workload
from pipelines.run.folder import RunFolder, read_jsonl
from sgmd_core.errors import ConfigError, ModelFolderError
from tests.e2e.conftest import MakeRecipe
from tests.helpers.families import installed_family
from tests.helpers.toy_family import ToyShape, write_toy
from workers.models.families import family_of

FRAMES, SIDE = 5, 16
CLIP = (f"video.num_frames={FRAMES}", f"video.height={SIDE}", f"video.width={SIDE}")


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with installed_family(tmp_path_factory.mktemp("site")):
        yield write_toy(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture(scope="module")
def config(module_recipe: MakeRecipe, toy_folder: Path) -> DistillConfig:
    checkpointing = ("generator.compute.checkpointing=true", "generator.compute.precision=bf16")
    return module_recipe(
        "name=toy", "iterations=2", f"model.folder={toy_folder}", *CLIP, *checkpointing
    )


@pytest.fixture(scope="module")
def run(config: DistillConfig) -> RunFolder:
    distill(config)
    return RunFolder(config.run_folder)


@pytest.mark.slow
def test_two_iterations_train_it_and_export_a_folder_of_its_family(run, toy_folder):
    records = read_jsonl(run.metrics)
    assert [record["iteration"] for record in records] == [0, 1]
    assert all(record["grad_norms"][role] > 0 for record in records for role in ("generator",))
    family = family_of(run.generator)
    assert family.name == "toy"
    trained, base = (family.load_denoiser(path) for path in (run.generator, toy_folder))
    moved = [
        not torch.equal(value, base.get_parameter(name))
        for name, value in trained.named_parameters()
    ]
    assert all(moved)


@pytest.mark.slow
def test_the_run_can_be_resumed_sampled_and_evaluated(run, config, world, tmp_path):
    clips = tmp_path / "clips"
    generated = list(generate(config.run_folder, ["a red circle"], output=clips, seed=[0, 1]))
    assert [clip.frames.shape for clip in generated] == 2 * [(FRAMES, SIDE, SIDE, 3)]
    assert (generated[0].frames != generated[1].frames).any()
    assert all(path.stat().st_size for clip in generated for path in clip.paths)

    options = EvaluationOptions(
        num_captions=4, batch_size=2, teacher_steps=2, num_bootstraps=4, num_shown=2
    )
    evaluation = evaluate(config.run_folder, output=tmp_path / "evaluation", options=options)
    assert len(evaluation.rows) >= 4

    copy = shutil.copytree(config.run_folder, tmp_path / "runs" / "toy")
    longer = load_recipe(str(copy / "config.yaml"), ["iterations=3", f"output={tmp_path / 'runs'}"])
    distill(longer, resume=True)
    assert [record["iteration"] for record in read_jsonl(RunFolder(copy).metrics)] == [0, 1, 2]


def test_a_plan_reads_its_shape(config):
    work = Workload.of(config)
    assert work.shape == ToyShape(channels=4, width=16, num_layers=2, text_width=8)
    assert work.latent_shape == (4, FRAMES, 4, 4)


def test_a_folder_that_does_not_say_how_is_sampled_by_the_defaults_of_its_family(
    toy_folder, wan_folder
):
    found = [read_inference_settings(folder) for folder in (toy_folder, wan_folder)]
    assert [(each.num_frames, each.height, each.num_steps) for each in found] == [
        (5, 16, 8),
        (81, 480, 50),
    ]
    # The scheduler of the folder knows its own shift.
    assert [each.flow_shift for each in found] == [1.0, 5.0]


def test_settings_that_the_family_lacks_are_refused_before_anything_starts(config):
    wanted = config.with_settings({"name": "other", "fake_score.compute.compile": True})
    with pytest.raises(ConfigError, match=r"fake_score asks for compile") as caught:
        dry_run(wanted)
    assert "bf16, checkpointing" in str(caught.value)


def test_a_folder_of_a_family_that_is_not_installed_is_refused_before_anything_starts(
    config, tmp_path
):
    shutil.copytree(config.model_folder, tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(index.read_text().replace("ToyPipeline", "OtherPipeline"))
    wanted = config.with_settings({"name": "other", "model.folder": str(tmp_path / "model")})
    with pytest.raises(ModelFolderError, match=r"OtherPipeline.*wan.*toy"):
        dry_run(wanted)
