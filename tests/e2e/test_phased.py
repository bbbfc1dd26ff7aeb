"""Training in phases from end to end: one expert, then the other; across a resume; sampled."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipelines.config.recipe import DistillConfig
from pipelines.distillation.run import distill
from pipelines.generate import generate
from pipelines.run.folder import RunFolder
from pipelines.shapes import ClipSplit, captions
from tests.e2e.conftest import MakeRecipe
from tests.helpers.tiny_wan import write_tiny_experts

SETTINGS = [
    "objective={method: phased_dmd, high_iterations: 1, fake_updates: 2}",
    "fake_score.tracking=fresh",
    "checkpoint={every: 1, keep: 3}",
    "export.dtype=fp32",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = sorted({word for text in captions(ClipSplit.TRAIN) for word in text.split()})
    # Steps at 1 and 0.9 are the first expert's, those at 0.75 and 0.5 the second one's.
    return write_tiny_experts(tmp_path_factory.mktemp("phased") / "model", words, boundary=0.8)


def weights(config: DistillConfig, iteration: int, role: str) -> dict[str, torch.Tensor]:
    step = RunFolder(config.run_folder).checkpoints / f"step-{iteration:06d}"
    return load_file(step / role / "weights.safetensors")


@pytest.mark.slow
def test_each_phase_moves_its_own_expert_and_a_resume_between_them_changes_no_bit(
    make_recipe: MakeRecipe, folder: Path, tmp_path: Path
) -> None:
    model = f"model.folder={folder}"
    whole = make_recipe("name=whole", "iterations=2", model, *SETTINGS)
    distill(whole)
    first, second = (weights(whole, iteration, "generator") for iteration in (1, 2))
    moved = {name for name, value in first.items() if not torch.equal(value, second[name])}
    assert moved == {name for name in first if name.startswith("low.")}
    averaged = weights(whole, 1, "ema")
    assert averaged.keys() == first.keys()

    distill(make_recipe("name=parts", "iterations=1", model, *SETTINGS))
    parts = make_recipe("name=parts", "iterations=2", model, *SETTINGS)
    distill(parts, resume=True)
    for role in ("generator", "fake_score"):
        own = weights(parts, 2, role)
        assert all(torch.equal(own[name], value) for name, value in weights(whole, 2, role).items())

    one, other = generate(
        RunFolder(whole.run_folder).generator.parent,
        ["a red circle moves left"],
        output=tmp_path,
        seed=[3, 4],
        formats=["gif"],
    )
    assert np.abs(one.frames.astype(int) - other.frames).mean() > 1
