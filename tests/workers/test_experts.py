"""Two experts are one velocity model: each sample goes through that of its noise level."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from sgmd_core.errors import ModelFolderError
from sgmd_core.schedule import FlowMatchSchedule
from tests.helpers.tiny_wan import LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH, write_tiny_experts
from workers.models.experts import ExpertDenoiser
from workers.models.families import family_of
from workers.models.scheduler import build_scheduler
from workers.network_settings import OptimizerSettings
from workers.optimizer import RoleOptimizer

BOUNDARY = 0.5
SIGMA = torch.tensor([0.9, 0.2, BOUNDARY, 0.1, 1.0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_experts(tmp_path_factory.mktemp("a14b") / "model", ["a"], boundary=BOUNDARY)


@pytest.fixture
def pair(folder: Path) -> ExpertDenoiser:
    denoiser = family_of(folder).load_denoiser(folder)
    assert isinstance(denoiser, ExpertDenoiser)
    return denoiser.requires_grad_(True)


def inputs(num: int = len(SIGMA)) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(0)
    text = torch.randn(num, TEXT_LENGTH, TEXT_DIM, generator=drawn)
    return torch.randn(num, *LATENT_SHAPE, generator=drawn), text


@pytest.mark.slow
def test_a_sample_passes_through_the_expert_that_the_pipeline_would_ask(
    folder: Path, pair: ExpertDenoiser
) -> None:
    x_t, text = inputs()
    pipeline = WanPipeline.from_pretrained(folder)
    assert pipeline.config.boundary_ratio == BOUNDARY
    with torch.no_grad():
        found = pair(x_t, SIGMA, text)
        for index, sigma in enumerate(SIGMA):
            timestep = 1000 * sigma
            one, other = pipeline.transformer, pipeline.transformer_2
            if timestep < 1000 * pipeline.config.boundary_ratio:
                one, other = other, one
            expected, wrong = (
                network(
                    hidden_states=x_t[index : index + 1],
                    timestep=timestep.expand(1),
                    encoder_hidden_states=text[index : index + 1],
                    return_dict=False,
                )[0][0]
                for network in (one, other)
            )
            torch.testing.assert_close(found[index], expected, rtol=0, atol=1e-5)
            assert (wrong - expected).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(("sigma", "idle"), [(0.8, "low."), (0.3, "high.")])
def test_an_expert_without_a_sample_stays_as_it_is_and_a_state_of_it_goes_on(
    folder: Path, pair: ExpertDenoiser, sigma: float, idle: str
) -> None:
    settings = OptimizerSettings(lr=1e-2)
    x_t, text = inputs(1)

    def update(network: ExpertDenoiser, optimizer: RoleOptimizer, at: float) -> None:
        network(x_t, torch.tensor([at]), text).square().mean().backward()
        iteration = optimizer.updates
        optimizer.gradient_report(iteration)
        optimizer.step(iteration)

    optimizer = RoleOptimizer("generator", pair, settings)
    before = {name: value.detach().clone() for name, value in pair.named_parameters()}
    update(pair, optimizer, sigma)
    for name, value in pair.named_parameters():
        assert torch.equal(value, before[name]) == name.startswith(idle), name

    other = family_of(folder).load_denoiser(folder).requires_grad_(True)
    assert isinstance(other, ExpertDenoiser)
    again = RoleOptimizer("generator", other, settings)
    again.load_state(optimizer.state())
    for network, own in ((pair, optimizer), (other, again)):
        update(network, own, 1 - sigma)
    moved = dict(other.named_parameters())
    assert all(torch.equal(value, moved[name]) for name, value in pair.named_parameters())
    assert any(
        not torch.equal(moved[name], before[name]) for name in moved if name.startswith(idle)
    )


@pytest.mark.parametrize(
    ("index", "second", "words"),
    [
        ({"boundary_ratio": None}, {}, "a boundary_ratio of None"),
        ({"boundary_ratio": 1.5}, {}, "a boundary_ratio of 1.5"),
        ({"transformer_2": [None, None]}, {}, "transformer_2 is"),
        ({"_class_name": "WanImageToVideoPipeline"}, {}, "an image-to-video model"),
        ({}, {"ffn_dim": 64}, "ffn_dim is 32 in transformer and 64 in transformer_2"),
        ({}, {"image_dim": 8}, "takes an image"),
    ],
)
def test_a_folder_of_half_a_pair_is_refused_by_plans_and_checks_alike(
    folder: Path, tmp_path: Path, index: dict, second: dict, words: str
) -> None:
    broken = shutil.copytree(folder, tmp_path / "model")
    for file, changes in (("model_index.json", index), ("transformer_2/config.json", second)):
        path = broken / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    for look in ("inspect", "read_shape", "load_denoiser"):
        with pytest.raises(ModelFolderError, match=words):
            getattr(family_of(broken), look)(broken)


def test_an_exported_sampler_takes_every_step_with_the_expert_that_has_learned_it() -> None:
    # The recipe wan22-a14b has a step at exactly the boundary.
    for shift, boundary, steps in ((7.0, 0.875, 4), (12.0, 0.875, 4), (5.0, 0.875, 8)):
        scheduler = build_scheduler(shift)
        scheduler.set_timesteps(steps)
        sampled = scheduler.timesteps >= 1000 * boundary
        trained = FlowMatchSchedule(shift=shift).few_step_grid(steps)[:-1] >= boundary
        assert sampled.tolist() == trained.tolist()
        assert 0 < int(trained.sum()) < steps
