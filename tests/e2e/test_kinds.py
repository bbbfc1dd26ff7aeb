"""Every kind of model that ships with us is distilled, exported and sampled by its own pipeline."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.distillation.run import distill, dry_run
from pipelines.generate import generate
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.shapes import ClipSplit, captions
from tests.e2e.conftest import MakeRecipe
from tests.helpers import tiny_ltx, tiny_wan
from workers.models.families import family_of

PROMPT = "a red circle moves left"


@dataclass(frozen=True)
class Kind:
    """A narrow model of a released kind, a clip that it makes, and the recipe of its real size."""

    write: Callable[[Path, Sequence[str]], Path]
    clip: tuple[int, int, int]
    recipes: tuple[str, ...]


KINDS = {
    "wan21": Kind(
        tiny_wan.write_tiny_wan, (9, 16, 16), ("wan21-1.3b", "wan21-1.3b-lora", "wan21-14b")
    ),
    "wan22-a14b": Kind(
        # Of the four steps at shift 3 two are on either side.
        partial(tiny_wan.write_tiny_experts, boundary=0.8),
        (9, 16, 16),
        ("wan22-a14b",),
    ),
    "ltx": Kind(tiny_ltx.write_tiny_ltx, (9, 32, 64), ("ltx-2b",)),
    "wan22-5b": Kind(tiny_wan.write_tiny_wan22_5b, (9, 32, 64), ("wan22-5b",)),
}
ALL = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    words = sorted({word for text in captions(ClipSplit.TRAIN) for word in text.split()})
    root = tmp_path_factory.mktemp("kinds")
    return {name: kind.write(root / name, words) for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def configs(module_recipe: MakeRecipe, folders: dict[str, Path]) -> dict[str, DistillConfig]:
    return {
        name: module_recipe(
            f"name={name}",
            "iterations=2",
            f"model.folder={folders[name]}",
            *(
                f"video.{key}={size}"
                for key, size in zip(("num_frames", "height", "width"), kind.clip, strict=True)
            ),
            # What the pipeline loads is to be compared to the last bit.
            "export.dtype=fp32",
        )
        for name, kind in KINDS.items()
    }


@pytest.fixture(scope="module")
def run_of(configs: dict[str, DistillConfig]) -> Callable[[str], RunFolder]:
    """Runs of two iterations in one process, made once each."""

    def run(kind: str) -> RunFolder:
        folder = RunFolder(configs[kind].run_folder)
        if not folder.generator.exists():
            distill(configs[kind])
        return folder

    return run


@pytest.mark.slow
@ALL
def test_two_iterations_are_exported_for_the_pipeline_of_the_kind(kind, run_of, folders, tmp_path):
    run, clip = run_of(kind), KINDS[kind].clip
    family = family_of(folders[kind])
    trained, base = (family.load_denoiser(path) for path in (run.generator, folders[kind]))
    weights = dict(base.named_parameters())
    moved = [not torch.equal(value, weights[name]) for name, value in trained.named_parameters()]
    assert all(moved)

    pipeline = DiffusionPipeline.from_pretrained(run.generator)
    assert type(pipeline).__name__ == family.traits.layout.pipeline_class
    index, before = (DiffusionPipeline.load_config(path) for path in (run.generator, folders[kind]))
    left = {"scheduler", "_name_or_path"}
    assert {key: index[key] for key in index if key not in left} == {
        key: before[key] for key in before if key not in left
    }
    pipeline.set_progress_bar_config(disable=True)
    frames, height, width = clip
    video = pipeline(
        PROMPT,
        num_frames=frames,
        height=height,
        width=width,
        num_inference_steps=4,
        guidance_scale=1.0,
        max_sequence_length=tiny_wan.TEXT_LENGTH,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).frames[0]
    folder = run.generator.parent
    ours, other = generate(folder, [PROMPT], output=tmp_path, seed=[3, 4], formats=["gif"])
    theirs = np.round(255 * video).astype(int)
    assert np.abs(ours.frames - theirs).max() <= 1
    assert np.abs(other.frames - theirs).mean() > 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "recipe"), [(name, recipe) for name, kind in KINDS.items() for recipe in kind.recipes]
)
def test_a_dry_run_of_its_recipe_takes_a_folder_of_the_kind(kind, recipe, folders, world, tmp_path):
    config = load_recipe(
        recipe,
        [
            f"model.folder={folders[kind]}",
            f"data.train={world / 'train'}",
            f"data.validation={world / 'held_out'}",
            f"output={tmp_path}",
            "validation.num_captions=8",
        ],
    )
    told = dry_run(config)
    channels, frames, height, width = told["latent_shape"]
    geometry = family_of(folders[kind]).read_shape(folders[kind]).geometry
    assert channels == geometry.latent_channels
    assert (frames - 1) * geometry.temporal_factor + 1 == config.video.num_frames
    assert height * geometry.spatial_factor == config.video.height
    assert width * geometry.spatial_factor == config.video.width


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "wan21"])
def test_adapters_of_the_kind_are_trained_and_merged_into_its_export(kind, configs, folders):
    lora = {"rank": 2, "alpha": 2}
    config = configs[kind].with_settings(
        {
            "name": f"{kind}-lora",
            "iterations": 1,
            "generator.lora": lora,
            "fake_score.lora": lora,
            # A first step of both experts, where there are two.
            "batch.micro_batches": 4,
        }
    )
    distill(config)
    family = family_of(folders[kind])
    trained = family.load_denoiser(RunFolder(config.run_folder).generator)
    base = dict(family.load_denoiser(folders[kind]).named_parameters())
    moved = {
        name
        for name, value in trained.named_parameters()
        if not torch.allclose(value, base[name], rtol=0, atol=1e-6)
    }
    layers = family.read_shape(folders[kind]).denoiser.projections
    assert moved
    assert all(any(f".{layer}.weight" in name for layer in layers) for name in moved)


@pytest.mark.parametrize(
    "pipeline",
    [
        "WanImageToVideoPipeline",
        "LTXImageToVideoPipeline",
        "LTXConditionPipeline",
        "HunyuanVideoImageToVideoPipeline",
    ],
)
def test_every_command_refuses_a_model_that_takes_an_image_in_one_sentence(pipeline, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    # As Wan 2.2 I2V-A14B has it.
    index = {"_class_name": pipeline, "boundary_ratio": 0.9, "transformer_2": ["diffusers", "X"]}
    (model / "model_index.json").write_text(json.dumps(index))
    out = f"output={tmp_path / 'runs'}"
    for arguments in (
        ["distill", "tiny", f"model.folder={model}", out],
        ["distill", "tiny", f"model.folder={model}", out, "--dry-run"],
        ["plan", "wan21-14b", f"model.folder={model}"],
        ["generate", str(model), "--prompt", PROMPT],
        ["encode", str(tmp_path), str(tmp_path / "to"), "--model", str(model)],
        ["check", str(tmp_path), "--model", str(model)],
        ["export", str(model), "--output", str(tmp_path / "export")],
        ["evaluate", str(model)],
    ):
        found = CliRunner().invoke(app, arguments)
        assert found.exit_code == 2, arguments
        words = " ".join(found.stderr.split())
        assert pipeline in words, (arguments, words)
        assert re.search("image-to-video model|takes images", words), arguments


@pytest.mark.slow
@pytest.mark.parametrize("config", [{"image_dim": 1280}, {"in_channels": 36}])
def test_a_pipeline_of_text_whose_denoiser_takes_an_image_is_refused_as_well(config, tmp_path):
    model = tiny_wan.write_tiny_wan(tmp_path / "model", ["a", "circle"])
    path = model / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    out = f"output={tmp_path / 'runs'}"
    (tmp_path / "captions.txt").write_text("a circle\n")
    for arguments in (
        ["distill", "tiny", f"model.folder={model}", out, "--dry-run"],
        ["distill", "tiny", f"teacher.model={model}", out, "--dry-run"],
        ["sweep", "tiny", f"model.folder={model}", out, "--dry-run"],
        ["plan", "wan21-14b", f"model.folder={model}"],
        ["generate", str(model), "--prompt", PROMPT],
        ["encode", str(tmp_path), str(tmp_path / "to"), "--model", str(model)],
        ["check", str(tmp_path / "captions.txt"), "--model", str(model)],
        ["experts", str(model), str(tmp_path / "experts"), "--boundary", "0.9"],
        ["transition", str(model), str(tmp_path / "t"), "--layers", "1", "--steps", "2"],
        ["import", str(tmp_path / "x.safetensors"), str(tmp_path / "y"), "--base", str(model)],
        ["doctor", "--model", str(model), "--json"],
    ):
        found = CliRunner().invoke(app, arguments)
        assert found.exit_code == (1 if arguments[0] == "doctor" else 2), arguments
        words = " ".join(found.output.replace("│", " ").split())
        assert "takes an image or a video besides the" in words, (arguments, words)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "wan21"])
def test_pools_make_the_generator_of_one_process(kind, run_of, configs):
    expected = run_of(kind)
    pools = configs[kind].with_settings({"name": f"{kind}-pools", "topology.mode": "pools"})
    distill(pools)
    found = RunFolder(pools.run_folder)
    losses = [[row["losses"] for row in read_jsonl(run.metrics)] for run in (found, expected)]
    assert losses[0] == losses[1]
    for part in family_of(found.generator).traits.layout.weights:
        for file in (expected.generator / part).glob("*.safetensors"):
            ours, theirs = load_file(found.generator / part / file.name), load_file(file)
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs), file
