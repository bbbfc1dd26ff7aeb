"""Training in phases from end to end: one expert, then the other; across a resume; sampled."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipelines.config.recipe import DistillConfig
from pipelines.distillation.run import distill
from pipelines.generate import generate
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.shapes import ClipSplit, captions
from sgmd_core.errors import ConfigError
from tests.e2e.conftest import MakeRecipe
from tests.e2e.test_equivalence import history, moments, state
from tests.e2e.test_maps import TWO
from tests.helpers.moves import assert_moves
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


DIVERSITY = "generator.diversity={weight: 0.5, teacher_steps: 4, anchor_step: 1}"


@pytest.mark.slow
def test_a_diversity_loss_trains_the_first_step_in_the_high_phase_alone(
    make_recipe: MakeRecipe, folder: Path
) -> None:
    model = f"model.folder={folder}"
    plain = make_recipe("name=plain", "iterations=1", model, *SETTINGS)
    diverse = make_recipe("name=diverse", "iterations=2", model, *SETTINGS, DIVERSITY)
    for config in (plain, diverse):
        distill(config)
    high, other, low = (
        weights(config, iteration, "generator")
        for config, iteration in ((plain, 1), (diverse, 1), (diverse, 2))
    )
    first, rest = (
        {n for n in high if n.startswith("low.") is low_one} for low_one in (False, True)
    )
    assert_moves({n: other[n] for n in first}, {n: high[n] for n in first})
    assert all(torch.equal(high[name], other[name]) for name in rest)
    assert all(torch.equal(low[name], other[name]) for name in first)
    assert any(not torch.equal(low[name], other[name]) for name in rest)
    lines = read_jsonl(RunFolder(diverse.run_folder).metrics)
    assert ["diversity" in line["losses"] for line in lines] == [True, False]
    # The loss alone trains the very first step, so the phase leaves at its second.
    assert lines[0]["exit_steps"] == [1] * len(lines[0]["exit_steps"])
    with pytest.raises(ConfigError, match="the whole high phase"):
        make_recipe(model, *SETTINGS, DIVERSITY, "objective.boundary=750")


@pytest.mark.ray
@pytest.mark.slow
def test_phases_on_ray_make_the_bits_of_one_process(
    make_recipe: MakeRecipe, ray_cluster: None, folder: Path
) -> None:
    settings = [f"model.folder={folder}", "iterations=2", *SETTINGS, DIVERSITY]
    local = make_recipe("name=local", *settings)
    pools = make_recipe("name=pools", *settings, "topology.mode=pools")
    mapped = make_recipe("name=map", *settings, *TWO)
    for config in (local, pools, mapped):
        distill(config)
    assert_moves(moments(local, 2), {key: 0 * value for key, value in moments(local, 2).items()})
    for config in (pools, mapped):
        assert history(config) == history(local)
        assert state(config, 2) == state(local, 2)
