"""Weights of one's own: a fine-tuned teacher, and a generator that goes on from a checkpoint."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from pipelines.distillation.run import distill
from pipelines.exporting.export import ExportOptions, export
from pipelines.run.folder import RunFolder, read_jsonl
from tests.e2e.conftest import MakeRecipe
from tests.helpers.moves import assert_moves
from tests.helpers.tiny_wan import tiny_velocity
from workers.models.low_rank import approximate_all
from workers.models.wan import load_transformer
from workers.models.wan_exchange import WanExchange

# So small that no float32 weight is changed by it.
STILL = ("generator.optimizer.lr=1e-30", "generator.optimizer.weight_decay=0")


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_transformer(folder).state_dict()


@pytest.mark.slow
def test_a_generator_goes_on_from_a_checkpoint_of_another_run_under_the_old_teacher(
    make_recipe: MakeRecipe, wan_folder: Path
) -> None:
    first = make_recipe("name=first", "iterations=2", "generator.optimizer.lr=0.01")
    distill(first)
    start = export(
        first.run_folder, checkpoint="2", options=ExportOptions(dtype="fp32", components="copy")
    ).folder
    second = make_recipe(
        "name=second",
        "iterations=1",
        f"model.folder={start}",
        f"teacher.model={wan_folder}",
        "teacher.guidance_scale=1",
        *STILL,
    )
    distill(second)
    began, ended = state(start), state(RunFolder(second.run_folder).generator)
    assert_moves(began, state(wan_folder))
    assert all(torch.equal(began[name], ended[name]) for name in began)
    # Teacher and fake score are those of the base: at the start they agree.
    (record,) = read_jsonl(RunFolder(second.run_folder).metrics)
    assert record["losses"]["fisher"] < 1e-6


@pytest.mark.slow
def test_a_fine_tuned_teacher_is_distilled_as_its_tools_left_it(
    make_recipe: MakeRecipe, wan_folder: Path, tmp_path: Path
) -> None:
    """A LoRA of the user's own training, fused and saved by diffusers, is one more model folder."""
    base, tuned = state(wan_folder), tiny_velocity(seed=7).state_dict()
    factors = approximate_all(base, tuned, rank=4)
    lora = tmp_path / "mine.safetensors"
    WanExchange().write_low_rank("lora", {"": lora}, factors, torch.float32)
    pipeline = WanPipeline.from_pretrained(wan_folder)
    pipeline.load_lora_weights(tmp_path, weight_name=lora.name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    mine = tmp_path / "mine"
    pipeline.save_pretrained(mine)
    config = make_recipe("name=mine", "iterations=1", f"model.folder={mine}", *STILL)
    distill(config)
    found = state(RunFolder(config.run_folder).generator)
    assert_moves(found, base)
    for name, each in factors.items():
        expected = base[f"{name}.weight"] + each.up @ each.down
        torch.testing.assert_close(found[f"{name}.weight"], expected, rtol=0, atol=1e-6)
    shutil.rmtree(mine)
