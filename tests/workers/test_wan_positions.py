"""Positions turned by complex products: the numbers of diffusers' own attention."""

import platform
from collections.abc import Mapping

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanRotaryPosEmbed
from torch import Tensor

from tests.helpers.moves import assert_moves, relative_error
from tests.helpers.tiny_wan import LATENT_CHANNELS, TEXT_DIM, TEXT_LENGTH, tiny_velocity
from workers.compute import prepare_network
from workers.models.wan import WanVelocity
from workers.network_settings import ComputeSettings

SIZES = [(3, 4, 4), (1, 6, 2), (2, 4, 8)]
SAME_BITS = platform.machine() in ("x86_64", "AMD64")


def of_diffusers(network: WanVelocity) -> WanVelocity:
    """The same network with attention and tables as diffusers has them."""
    own = network.transformer
    own.set_attn_processor({name: WanAttnProcessor() for name in own.attn_processors})
    rope = WanRotaryPosEmbed(own.rope.attention_head_dim, own.rope.patch_size, own.rope.max_seq_len)
    own.rope = rope.to(own.rope.freqs_cos.dtype)
    return network


def walked(
    network: WanVelocity, sizes: list[tuple[int, int, int]], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Velocities of some sizes one after another, then the gradients of all of them."""
    stream = torch.Generator().manual_seed(3)
    found: dict[str, Tensor] = {}
    loss = torch.zeros((), dtype=dtype)
    inputs = [torch.randn(2, LATENT_CHANNELS, *size, generator=stream).to(dtype) for size in sizes]
    for place, x_t in enumerate(inputs):
        text = torch.randn(2, TEXT_LENGTH, TEXT_DIM, generator=stream).to(dtype)
        velocity = network(x_t.requires_grad_(), torch.tensor([0.3, 0.8]), text)
        found[f"velocity {place}"] = velocity.detach()
        loss = loss + (velocity * torch.randn(velocity.shape, generator=stream)).sum()
    loss.backward()
    found |= {
        f"input {place}": x_t.grad for place, x_t in enumerate(inputs) if x_t.grad is not None
    }
    for name, value in network.named_parameters():
        assert value.grad is not None
        found[name] = value.grad
    return found


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], other: float) -> None:
    """The same bits on x86, the same numbers elsewhere."""
    assert found.keys() == expected.keys()
    if SAME_BITS:
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    else:
        assert relative_error(found, expected) < other


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_velocities_and_gradients_of_several_sizes_are_those_of_diffusers(
    checkpointing: bool,
) -> None:
    compute = ComputeSettings(checkpointing=checkpointing)
    expected = walked(prepare_network(of_diffusers(tiny_velocity()), compute), SIZES)
    found = walked(prepare_network(tiny_velocity(), compute), SIZES)
    still = tiny_velocity()
    still.transformer.rope.freqs_sin.zero_()
    assert_moves(expected, walked(prepare_network(still, compute), SIZES), 1e-3)
    assert_same(found, expected, 1e-5)


@pytest.mark.slow
def test_with_products_in_bfloat16_gradients_differ_by_less_than_their_rounding() -> None:
    compute = ComputeSettings(precision="bf16")
    exact = walked(of_diffusers(tiny_velocity()), SIZES)
    theirs = walked(prepare_network(of_diffusers(tiny_velocity()), compute), SIZES)
    found = walked(prepare_network(tiny_velocity(), compute), SIZES)
    velocities = [name for name in exact if name.startswith("velocity")]
    assert_same({n: found[n] for n in velocities}, {n: theirs[n] for n in velocities}, 1e-2)
    # The largest errors are those of the products, which both make alike.
    assert 0 < relative_error(found, theirs) < 0.5 * relative_error(theirs, exact)
    assert relative_error(found, exact) <= relative_error(theirs, exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_of_another_type_is_turned_in_that_type(dtype: torch.dtype) -> None:
    inputs = torch.float64 if dtype == torch.float64 else torch.float32
    expected = walked(of_diffusers(tiny_velocity().to(dtype)), SIZES, inputs)
    found = walked(tiny_velocity().to(dtype), SIZES, inputs)
    assert_same(found, expected, 1e-13 if dtype == torch.float64 else 1e-2)


def test_tables_are_made_once_for_passes_of_one_size() -> None:
    network = tiny_velocity()
    rope = network.transformer.rope
    clips = torch.zeros(1, LATENT_CHANNELS, *SIZES[0])
    first, again = rope(clips), rope(clips.expand(2, -1, -1, -1, -1))
    assert first is again
    assert rope(torch.zeros(1, LATENT_CHANNELS, *SIZES[1]))[0].shape != first[0].shape
    assert rope(clips.double())[0].dtype == torch.float32
    assert network.double().transformer.rope(clips)[0].dtype == torch.float64
    network.transformer.rope.freqs_cos.zero_()
    assert not network.transformer.rope(clips)[0].any()
    assert not [name for name in network.state_dict() if "rope" in name]
