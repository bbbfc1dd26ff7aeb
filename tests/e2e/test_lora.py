"""Runs with adapters: resumed bit for bit, refused with others, exported, validated, on any map."""

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file
from torch import Tensor

from pipelines.distillation.run import distill
from pipelines.exporting.export import ExportOptions, export
from pipelines.run.folder import RunFolder, read_jsonl
from sgmd_core.errors import CheckpointError, ConfigError
from tests.e2e.conftest import MakeRecipe
from tests.e2e.test_equivalence import drop_checkpoint, history, moments, state
from tests.helpers.moves import assert_moves, relative_error
from tests.helpers.roles import text_batch
from tests.helpers.tiny_wan import LATENT_SHAPE
from workers.models.adapter_files import merged_weights
from workers.models.wan import WanVelocity, load_transformer
from workers.network_settings import LoraSettings

LORA = [
    "generator.lora={rank: 4, alpha: 8}",
    "fake_score.lora={rank: 2, alpha: 2}",
    "generator.optimizer.lr=1e-1",
    "fake_score.optimizer.lr=1e-2",
    "generator.compute.checkpointing=true",
    "fake_score.compute.checkpointing=true",
]
POOL = "cpus: 0.2"


@pytest.mark.slow
def test_a_run_is_resumed_bit_for_bit_and_exports_the_merged_average(
    make_recipe: MakeRecipe, wan_folder: Path
) -> None:
    settings = [*LORA, "checkpoint.every=1", "validation.every=2"]
    whole = make_recipe("name=whole", "iterations=2", *settings)
    distill(whole)
    distill(make_recipe("name=parts", "iterations=1", *settings))
    parts = make_recipe("name=parts", "iterations=2", *settings)
    distill(parts, resume=True)
    assert_moves(moments(whole, 2), moments(whole, 1))
    assert history(parts) == history(whole)
    assert state(parts, 2) == state(whole, 2)

    run = RunFolder(whole.run_folder)
    (validation,) = read_jsonl(run.validation)
    assert validation["figures"]["frechet"] > 0
    average = load_file(run.checkpoints / "step-000002" / "ema" / "weights.safetensors")
    expected = merged_weights(wan_folder, average, LoraSettings(rank=4, alpha=8))
    exported = load_transformer(run.generator)
    assert_moves(expected, load_transformer(wan_folder).state_dict(), tolerance=1e-2)
    # Exports are rounded to bfloat16.
    assert relative_error(exported.state_dict(), expected) < 1e-2
    exported_file = export(whole.run_folder, options=ExportOptions("lora", dtype="fp32")).folder
    card = (exported_file / "README.md").read_text()
    assert "LoRA of rank 4" in card
    assert "float32" not in card.partition("## Files")[2]
    with pytest.raises(ConfigError, match="adapters of 4"):
        export(whole.run_folder, options=ExportOptions("lora", rank=8))
    pipeline = WanPipeline.from_pretrained(wan_folder)
    pipeline.load_lora_weights(str(exported_file))
    merged = load_transformer(wan_folder)
    merged.load_state_dict(expected)
    assert_moves({"": predict(merged)}, {"": predict(load_transformer(wan_folder))}, 1e-5)
    loaded = predict(WanVelocity(pipeline.transformer))
    assert relative_error({"": loaded}, {"": predict(merged)}) < 1e-5

    other = make_recipe("name=parts", "iterations=3", *settings, "generator.lora.alpha=4")
    with pytest.raises(CheckpointError, match=r"generator\.lora\.alpha is 4\.0, and was 8\.0"):
        distill(other, resume=True)


@torch.no_grad()
def predict(network: WanVelocity) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn((1, *LATENT_SHAPE), generator=generator)
    return network(x_t, torch.tensor([0.5]), text_batch([0]).text)


@pytest.mark.slow
def test_adapters_come_back_where_the_last_iteration_was_lost(make_recipe: MakeRecipe) -> None:
    settings = [*LORA, "checkpoint.every=2", "fake_score.tracking=fresh"]
    distill(make_recipe("name=parts", "iterations=3", *settings))
    parts = make_recipe("name=parts", "iterations=4", *settings)
    drop_checkpoint(parts, 3)
    distill(parts, resume=True)
    whole = make_recipe("name=whole", "iterations=4", *settings)
    distill(whole)
    assert state(parts, 4) == state(whole, 4)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["fake_score.ida_decay=0.9", "fake_score.tracking=fresh"], "ida_decay"),
        (["teacher.compute.weights=bf16"], "share one base"),
        (["generator.lora.rank=0"], "rank"),
        (["generator.lora.dropout=0.1"], "dropout"),
    ],
)
def test_settings_that_do_not_go_with_adapters_are_refused_by_name(
    make_recipe: MakeRecipe, settings: list[str], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        make_recipe(*LORA, "objective={method: dmd2, fake_updates: 1}", *settings)


def test_weights_that_are_trained_stay_in_float32(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ConfigError, match=r"generator\.compute\.weights.*generator\.lora is null"):
        make_recipe("generator.compute.weights=bf16")


def test_a_projection_that_the_model_lacks_is_found_before_a_network_is_read(
    make_recipe: MakeRecipe,
) -> None:
    config = make_recipe("generator.lora.targets=[to_z]")
    with pytest.raises(ConfigError, match=r"to_z.*attn1\.to_q"):
        distill(config)
    assert not config.run_folder.exists()


@pytest.mark.slow
def test_a_base_in_bfloat16_trains_all_three_roles_over_one_set_of_weights(
    make_recipe: MakeRecipe,
) -> None:
    bf16 = [f"{role}.compute.weights=bf16" for role in ("generator", "fake_score", "teacher")]
    rounded = make_recipe("name=bf16", "iterations=2", *LORA, *bf16)
    exact = make_recipe("name=fp32", "iterations=2", *LORA)
    for config in (rounded, exact):
        distill(config)
    found, expected = (moments_of_average(config) for config in (rounded, exact))
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert found.keys() == expected.keys()


@pytest.mark.slow
def test_adapters_are_exported_as_they_are_where_their_base_is_rounded_by_more(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    bf16 = [f"{role}.compute.weights=bf16" for role in ("generator", "fake_score", "teacher")]
    slow = [each for each in LORA if not each.startswith("generator.optimizer")]
    config = make_recipe("name=slow", "iterations=1", *slow, "generator.optimizer.lr=1e-5", *bf16)
    distill(config)
    options = ExportOptions("lora", dtype="fp32")
    figures = export(config.run_folder, output=tmp_path / "lora", options=options).figures
    # The merged weights that were validated lie on the rounded base, the file's on the folder's.
    assert figures.lost > 0.1
    assert figures.share_kept == 1


def moments_of_average(config):
    run = RunFolder(config.run_folder)
    return load_file(run.checkpoints / "step-000002" / "ema" / "weights.safetensors")


@pytest.mark.ray
@pytest.mark.slow
def test_roles_of_one_process_on_ray_share_a_base_and_make_the_bits_of_one_process(
    make_recipe: MakeRecipe, ray_cluster: None
) -> None:
    settings = [*LORA, "iterations=2", "validation.every=2"]
    local = make_recipe("name=local", *settings)
    fused = make_recipe(
        "name=fused", "topology.mode=fused", f"topology.fused={{{POOL}}}", *settings
    )
    for config in (local, fused):
        distill(config)
    assert_moves(moments(local, 2), moments(make_other(make_recipe, settings), 2))
    assert history(fused) == history(local)
    assert state(fused, 2) == state(local, 2)


def make_other(make_recipe: MakeRecipe, settings: list[str]):
    """The same run of other samples."""
    other = make_recipe("name=other", *settings, "seed=1")
    distill(other)
    return other
