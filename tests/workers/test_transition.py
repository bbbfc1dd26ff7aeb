"""A Wan with a flow head: it starts as its base, and samples and learns by its inner flow."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor

from pipelines.transition import make_transition
from sgmd_core.errors import ConfigError, ModelFolderError
from sgmd_core.rollout import euler_sample, rollout
from sgmd_core.schedule import FlowMatchSchedule
from tests.helpers.moves import assert_moves, relative_error
from tests.helpers.ranks import on_ranks
from tests.helpers.roles import gradients
from tests.helpers.tiny_ltx import write_tiny_ltx
from tests.helpers.tiny_wan import (
    LATENT_SHAPE,
    TEXT_DIM,
    TEXT_LENGTH,
    tiny_velocity,
    write_tiny_wan,
)
from workers.compute import prepare_network
from workers.evaluator import Evaluator, SampledNetworks
from workers.models.families import family_of
from workers.models.family import TransitionDenoiser
from workers.models.flow_head import FlowHead, with_first_weights
from workers.models.wan_transition import WanTransition, save_transition
from workers.models.weight_digests import require_same_weights
from workers.network_settings import ComputeSettings
from workers.sharding import full_tensor, shard

GRID = FlowMatchSchedule(shift=3.0).few_step_grid(2)


def untrained(num_steps: int = 2, num_layers: int = 1) -> WanTransition:
    head = with_first_weights(FlowHead(32, num_layers, num_steps, 10.0))
    return WanTransition(tiny_velocity(1), head).eval()


def trained(num_steps: int = 2) -> WanTransition:
    """One whose flow head takes part."""
    network, drawn = untrained(num_steps), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in network.head.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=drawn))
    return network


def inputs(count: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    x_t = torch.randn(count, *LATENT_SHAPE, generator=drawn)
    text = torch.randn(count, TEXT_LENGTH, TEXT_DIM, generator=drawn)
    return x_t, torch.linspace(0.3, 0.8, count), text


def noise_like(x_t: Tensor, seed: int = 1) -> Tensor:
    return torch.randn(x_t.shape, generator=torch.Generator().manual_seed(seed))


class TestTheStart:
    @pytest.mark.parametrize(("num_steps", "num_layers"), [(1, 1), (2, 1), (4, 2)])
    def test_it_is_its_base_to_the_bit_whatever_the_noise(self, num_steps, num_layers):
        given = inputs()
        with torch.no_grad():
            expected = tiny_velocity(1)(*given)
            network = untrained(num_steps, num_layers)
            for seed in (1, 2):
                assert torch.equal(network(*given, noise_like(given[0], seed)), expected)
            assert torch.equal(network(*given), expected)

    def test_so_is_its_head_at_every_inner_level(self):
        given = inputs()
        network, expected = untrained(), tiny_velocity(1)(*given).detach()
        levels = torch.tensor([[1.0, 0.9], [0.5, 0.3], [0.1, 0.0]])
        states = torch.stack([noise_like(given[0], seed) for seed in range(3)])
        answers = network(*given, states, levels, torch.tensor([0.5, 0.0]))
        assert all(torch.equal(answer.detach(), expected) for answer in answers)
        assert answers.requires_grad


class TestTheFlow:
    def test_its_samples_depend_on_inner_noise_and_on_the_number_of_steps(self):
        given = inputs()
        with torch.no_grad():
            one, other = (trained()(*given, noise_like(given[0], seed)) for seed in (1, 2))
            more = trained(3)(*given, noise_like(given[0]))
        assert (one - other).abs().mean() > 0.01
        assert (one - more).abs().mean() > 1e-3

    @pytest.mark.slow
    def test_a_rollout_reaches_backbone_and_head_through_all_inner_steps(self):
        network, (x_t, _, text) = trained(), inputs()
        network.double().requires_grad_(True)
        x_t, text = x_t.double(), text.double()

        def loss() -> Tensor:
            made = rollout(network, GRID.double(), x_t, text, 0, keep_graph=True)
            return made.double().square().mean()

        loss().backward()
        found = gradients(network)
        step = 1e-3
        for name in (
            "velocity.transformer.blocks.0.attn1.to_q.weight",
            "velocity.transformer.blocks.1.ffn.net.2.weight",
            "head.mlp.0.weight",
            "head.gate.weight",
            "head.stride_gain",
        ):
            value = network.get_parameter(name)
            at, values = int(found[name].abs().argmax()), []
            for move in (step, -2 * step):
                with torch.no_grad():
                    value.view(-1)[at] += move
                    values.append(loss().item())
            with torch.no_grad():
                value.view(-1)[at] += step
            expected = (values[0] - values[1]) / (2 * step)
            # Velocities are rounded to float32.
            assert found[name].view(-1)[at].item() == pytest.approx(expected, rel=2e-2), name

    def test_the_difference_of_two_answers_has_digits_where_products_are_in_bfloat16(self):
        network, given = trained(), inputs()
        state = noise_like(given[0])
        states = torch.stack([state, 0.9 * state, state])
        near = torch.stack([torch.full((2,), level) for level in (0.7, 0.695, 0.705)])
        with torch.no_grad():
            target = torch.zeros(2)
            exact = network(*given, states, near, target)
            prepare_network(network, ComputeSettings(precision="bf16"))
            rounded = network(*given, states, near, target)
        assert (rounded[0] - exact[0]).abs().max() > 1e-3
        differences = [made[2] - made[1] for made in (exact, rounded)]
        error = (differences[1] - differences[0]).norm() / differences[0].norm()
        assert error < 0.05

    def test_an_evaluator_samples_other_weights_by_the_same_steps(self):
        class Text:
            def encode(self, captions, sample_indices):
                raise NotImplementedError

        network, weights = trained(), dict(untrained().named_parameters())
        networks = SampledNetworks(network)
        evaluator = Evaluator(networks, Text(), None, FlowMatchSchedule(), LATENT_SHAPE)  # pyright: ignore[reportArgumentType]
        x_t, _, text = inputs()
        for given, model in ((None, trained()), (weights, untrained())):
            with evaluator._model(given) as sampled:  # pyright: ignore[reportPrivateUsage]
                found = euler_sample(sampled, GRID, x_t, text)
            with torch.no_grad():
                torch.testing.assert_close(found, euler_sample(model, GRID, x_t, text))


def sharded_gradients(rank: int, size: int) -> dict[str, Tensor]:
    network = trained().requires_grad_(True)
    shard(network, network.blocks, device="cpu")
    own = tuple(value[rank : rank + 1] for value in (*inputs(), noise_like(inputs()[0])))
    network(*own).square().sum().backward()
    return {name: full_tensor(value) for name, value in gradients(network).items()}


@pytest.mark.slow
def test_two_ranks_make_the_gradients_of_one_where_the_head_takes_part(tmp_path: Path):
    whole = trained().requires_grad_(True)
    given = inputs()
    whole(*given, noise_like(given[0])).square().sum().backward()
    half = trained().requires_grad_(True)
    half(*(value[:1] for value in (*given, noise_like(given[0])))).square().sum().backward()
    assert_moves(gradients(whole), gradients(half), 1e-4)
    for found in on_ranks(2, sharded_gradients, tmp_path):
        assert relative_error(found, gradients(whole)) < 1e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_wan(tmp_path_factory.mktemp("base") / "model", ["a"])


class TestTheFolder:
    @pytest.mark.slow
    def test_it_samples_what_its_base_samples(self, base: Path, tmp_path: Path):
        made = make_transition(base, tmp_path / "made", num_layers=1, num_steps=2)
        one, two = (family_of(folder).load_denoiser(folder) for folder in (base, made))
        assert isinstance(two, TransitionDenoiser)
        assert two.inner_steps == 2
        x_t, _, text = inputs()
        assert torch.equal(*(euler_sample(each, GRID, x_t, text) for each in (one, two)))
        require_same_weights(made)
        index = json.loads((made / "model_index.json").read_text())
        assert index["_class_name"] == "WanTransitionPipeline"

    @pytest.mark.slow
    def test_diffusers_refuses_it_instead_of_sampling_its_backbone(
        self, base: Path, tmp_path: Path
    ):
        made = make_transition(base, tmp_path / "made", num_layers=1, num_steps=2)
        save_transition(
            tmp_path / "trained",
            made,
            dict(family_of(made).load_denoiser(made).named_parameters()),
            flow_shift=3.0,
        )
        WanPipeline.from_pretrained(base)
        for folder in (made, tmp_path / "trained"):
            with pytest.raises((ValueError, AttributeError), match="WanTransitionBackbone"):
                WanPipeline.from_pretrained(folder)

    @pytest.mark.parametrize(
        ("layers", "steps", "shift", "words"),
        [
            (2, 2, 10.0, "--layers 2 of 2"),
            (0, 2, 10.0, "--layers 0"),
            (1, 4, 1.0, "starts below 0.5"),
            (1, 0, 10.0, "--steps 0"),
            (1, 1001, 10.0, "1 to 1000 steps"),
            (1, 2, float("inf"), "--shift inf"),
            (1, 2, float("nan"), "a finite shift"),
        ],
    )
    def test_other_numbers_are_refused(self, base, tmp_path, layers, steps, shift, words):
        with pytest.raises(ConfigError, match=words):
            make_transition(base, tmp_path / "made", layers, steps, shift)

    def test_so_are_models_without_a_place_for_it(self, base: Path, tmp_path: Path):
        other = write_tiny_ltx(tmp_path / "ltx", ["a"])
        made = make_transition(base, tmp_path / "made", num_layers=1, num_steps=2)
        for folder, name in ((other, "ltx"), (made, "wan-transition")):
            with pytest.raises(ConfigError, match=f"family {name}"):
                make_transition(folder, tmp_path / "other", 1, 2)

    @pytest.mark.slow
    def test_a_head_of_another_network_is_refused_by_name(self, base: Path, tmp_path: Path):
        made = make_transition(base, tmp_path / "made", num_layers=1, num_steps=2)
        file = made / "flow_head" / "config.json"
        config = json.loads(file.read_text())
        for changed in (
            {"width": 64},
            {"num_layers": 3},
            {"num_steps": 0},
            {"num_steps": True},
            {"num_steps": 10**11},
            {"shift": float("inf")},
            {"shift": "10"},
            {"_class_name": "X"},
        ):
            file.write_text(json.dumps({**config, **changed}))
            with pytest.raises(ModelFolderError, match="flow_head"):
                family_of(made).inspect(made)
