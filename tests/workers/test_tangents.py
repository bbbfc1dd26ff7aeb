"""Forward mode through the tiny Wan: against reverse mode, and whatever the role computes in."""

import pytest
import torch

from sgmd_core.trigflow import (
    direction_weight,
    sigma_of_time,
    trig_state,
    trig_time,
    trig_velocity,
    velocity_derivative,
)
from sgmd_core.types import per_sample
from tests.helpers import tiny_wan
from workers.compute import prepare_network
from workers.network_settings import ComputeSettings
from workers.tangents import in_full_precision, velocity_and_derivative

SIGMA = torch.tensor([0.2, 0.5, 0.9])


@pytest.fixture(scope="module")
def inputs():
    stream = torch.Generator().manual_seed(3)
    x_t, path, cotangent = torch.randn(3, 3, *tiny_wan.LATENT_SHAPE, generator=stream)
    text = torch.randn(3, tiny_wan.TEXT_LENGTH, tiny_wan.TEXT_DIM, generator=stream)
    weight = direction_weight(SIGMA).float()
    return x_t, text, (per_sample(weight, path) * path, weight), cotangent


@pytest.fixture(scope="module")
def truth(inputs):
    x_t, text, direction, _ = inputs
    return velocity_and_derivative(tiny_wan.tiny_velocity(), x_t, SIGMA, text, direction)


def test_a_derivative_is_the_transpose_of_the_backward_pass(inputs, truth):
    x_t, text, direction, cotangent = inputs
    leaves = [x_t.clone().requires_grad_(), SIGMA.clone().requires_grad_()]
    velocity = tiny_wan.tiny_velocity()(*leaves, text)
    gradients = torch.autograd.grad(velocity, leaves, cotangent)
    by_input = (gradients[0] * direction[0]).flatten(1).sum(dim=1)
    by_level = gradients[1] * direction[1]
    assert by_level.abs().min() > 1e-3 * by_input.abs().max(), "both inputs count"
    found = (cotangent * truth[1]).flatten(1).sum(dim=1)
    torch.testing.assert_close(found, by_input + by_level, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(truth[0], velocity.detach(), rtol=1e-5, atol=1e-5)
    assert not truth[0].requires_grad
    assert not truth[1].requires_grad


def dense_attention(query, key, value, **_options):
    """Attention by its definition, all pairs of tokens held."""
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    return scores.softmax(dim=-1) @ value


def test_the_tangent_on_the_circle_is_that_of_dense_attention_in_float64(inputs, monkeypatch):
    """The wrapped network moved along the circle itself, by a transform of its own."""
    x_t, text, (path, _), _ = (
        each if isinstance(each, tuple) else each.double() for each in inputs
    )
    sigma, path = SIGMA.double(), path.double()
    # The network of diffusers takes norms and modulations in float32 whatever it is given.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    network, t = tiny_wan.tiny_velocity().double(), trig_time(sigma)
    weight = direction_weight(sigma)
    direction = per_sample(weight, path) * path, weight
    velocity, moved = velocity_and_derivative(network, x_t, sigma, text, direction)
    found = velocity_derivative(x_t, velocity, path, moved, t)

    def on_circle(state: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x_t = state / per_sample(t.cos() + t.sin(), state)
        return trig_velocity(x_t, network(x_t, sigma_of_time(t), text), t)

    # Both sides would round a velocity in float32 alike.
    assert velocity.dtype is moved.dtype is torch.float64
    calls = []

    def counted(**options: torch.Tensor) -> torch.Tensor:
        calls.append(options["query"].shape)
        return dense_attention(**options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    length = t.cos() * t.sin()
    along = per_sample(length, path) * trig_velocity(x_t, path, t)
    _, expected = torch.func.jvp(on_circle, (trig_state(x_t, t), t), (along, length))
    assert len(calls) == 2 * len(network.blocks), "to its own frames, and to the caption"
    assert (found - expected).norm() <= 1e-12 * expected.norm()
    assert moved.norm() > 1e-2 * expected.norm(), "the network's own derivative counts"


@pytest.mark.parametrize(
    "compute",
    [ComputeSettings(precision="bf16"), ComputeSettings(precision="bf16", checkpointing=True)],
    ids=["bf16", "checkpointed"],
)
def test_a_role_in_bfloat16_has_its_derivative_in_float32(inputs, truth, compute):
    x_t, text, direction, _ = inputs
    network = prepare_network(tiny_wan.tiny_velocity(), compute)
    with torch.no_grad():
        assert (network(x_t, SIGMA, text) - truth[0]).abs().max() > 1e-3
    found = velocity_and_derivative(network, x_t, SIGMA, text, direction)
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert network.autocast_dtype is torch.bfloat16


def test_the_precision_comes_back_after_an_error():
    network = prepare_network(tiny_wan.tiny_velocity(), ComputeSettings(precision="bf16"))
    with pytest.raises(RuntimeError), in_full_precision(network):
        raise RuntimeError
    assert network.autocast_dtype is torch.bfloat16
