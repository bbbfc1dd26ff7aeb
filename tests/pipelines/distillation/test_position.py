"""Another model or other settings are not gone on with; the same model at another path is."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cluster.checkpoints import Checkpoints
from pipelines.config.recipe import PROJECT_ROOT, DistillConfig, load_recipe
from pipelines.distillation.position import Position, identity, resume_position
from pipelines.run.folder import RunFolder
from sgmd_core.errors import CheckpointError
from workers.models.content import model_digests


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return shutil.copytree(PROJECT_ROOT / "assets" / "tiny-wan", tmp_path / "model")


@pytest.fixture
def run(tmp_path: Path, model: Path) -> RunFolder:
    folder, config = RunFolder(tmp_path / "run"), load_recipe("tiny", [f"model.folder={model}"])
    folder.create(config.to_yaml())
    folder.identity.write_text(json.dumps(identity(config, model_digests(model))))
    return folder


def resumed(run: RunFolder, model: Path, *overrides: str) -> Position:
    config: DistillConfig = load_recipe("tiny", [f"model.folder={model}", *overrides])
    checkpoints = Checkpoints(str(run.checkpoints))
    return resume_position(config, model_digests(model), run, checkpoints)


def test_the_same_model_at_another_path_is_resumed(run, model, tmp_path) -> None:
    assert resumed(run, model.rename(tmp_path / "moved"), "iterations=7") == Position()


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_another_model_at_the_same_path_is_refused_by_component(run, model, part) -> None:
    before = model_digests(model)[part]
    (weights,) = (model / part).glob("*.safetensors")
    save_file({name: 1.05 * value for name, value in load_file(weights).items()}, weights)
    after = model_digests(model)[part]
    with pytest.raises(CheckpointError) as caught:
        resumed(run, model)
    assert f'the {part} in model.folder has content "{after}", and had "{before}"' in str(
        caught.value
    )


def test_every_setting_that_differs_is_named_with_both_values(run, model) -> None:
    with pytest.raises(CheckpointError) as caught:
        resumed(run, model, "teacher.guidance_scale=2.5", "objective.lambda_nr=0.2")
    assert "teacher.guidance_scale is 2.5, and was " in str(caught.value)
    assert "objective.lambda_nr is 0.2, and was 0.1" in str(caught.value)
