"""Parameters and operations are counted exactly, bytes of graphs within some per cent."""

import warnings
from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from workers.compute import ComputeSettings, prepare_network
from workers.models.wan import WanVelocity
from workers.models.wan_arithmetic import WanShape

TEXT_LENGTH, LATENTS = 16, (4, 3, 8, 8)
LONG = (4, 9, 32, 32)
"""2,304 tokens, where attention is most of a pass; `LATENTS` are 48."""
SMALL = WanShape(
    num_layers=2,
    width=64,
    ffn_width=160,
    text_width=24,
    freq_width=16,
    in_channels=4,
    out_channels=4,
)


def network(shape: WanShape, head_size: int = 32) -> WanVelocity:
    transformer = WanTransformer3DModel(
        patch_size=shape.patch_size,
        num_attention_heads=shape.width // head_size,
        attention_head_dim=head_size,
        in_channels=shape.in_channels,
        out_channels=shape.out_channels,
        text_dim=shape.text_width,
        freq_dim=shape.freq_width,
        ffn_dim=shape.ffn_width,
        num_layers=shape.num_layers,
        rope_max_seq_len=32,
        cross_attn_norm=shape.cross_attn_norm,
    )
    return WanVelocity(transformer)


def inputs(
    shape: WanShape, latents: tuple[int, int, int, int] = LATENTS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(1, *latents), torch.tensor([0.5]), torch.randn(1, TEXT_LENGTH, 24)


@pytest.mark.parametrize(
    ("shape", "billions"),
    [
        (WanShape(num_layers=30, width=1536, ffn_width=8960), 1.42),
        (WanShape(num_layers=40, width=5120, ffn_width=13824), 14.29),
        (SMALL, 0.0),
        (replace(SMALL, cross_attn_norm=False), 0.0),
    ],
)
def test_parameters_are_those_of_the_network(shape, billions):
    with torch.device("meta"):
        made = network(shape, head_size=32)
    assert shape.num_parameters == sum(value.numel() for value in made.parameters())
    assert shape.num_parameters / 1e9 == pytest.approx(billions, abs=0.01)
    in_layer = sum(value.numel() for value in made.blocks[0].parameters())
    assert shape.parameters_per_layer == in_layer
    assert WanShape.from_config(made.transformer.config) == shape


@pytest.fixture
def plain_attention():
    """The fused attention of a CPU is not counted, the plain one is."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


BOTH_LENGTHS = pytest.mark.parametrize(("latents", "share"), [(LATENTS, 0.14), (LONG, 0.87)])
"""Latents, and attention's share of the forward pass of `SMALL` over them."""


@pytest.mark.slow
@BOTH_LENGTHS
@pytest.mark.usefixtures("plain_attention")
def test_operations_are_those_that_a_network_makes(latents, share):
    expected = SMALL.pass_flops(latents, TEXT_LENGTH)
    assert expected.attention / expected.forward == pytest.approx(share, abs=0.01)
    with FlopCounterMode(display=False) as forward:
        loss = network(SMALL)(*inputs(SMALL, latents)).sum()
    with FlopCounterMode(display=False) as to_parameters:
        loss.backward()
    assert forward.get_total_flops() == expected.forward
    assert forward.get_total_flops() == SMALL.forward_flops(latents, TEXT_LENGTH)
    assert to_parameters.get_total_flops() == expected.to_parameters


@pytest.mark.slow
@BOTH_LENGTHS
@pytest.mark.usefixtures("plain_attention")
def test_a_backward_pass_to_the_input_makes_products_of_attention_twice(latents, share):
    expected, made = SMALL.pass_flops(latents, TEXT_LENGTH), network(SMALL)
    x_t, sigma, text = inputs(SMALL, latents)
    loss = made(x_t.requires_grad_(), sigma, text).sum()
    with FlopCounterMode(display=False) as to_input:
        torch.autograd.grad(loss, x_t, retain_graph=True)
    assert to_input.get_total_flops() == expected.to_input
    # A product of two activations costs the input twice, one with a weight once; what is made of
    # the text alone leads to no input, which shows where there are few tokens.
    assert expected.to_input / expected.forward == pytest.approx(1 + share, abs=0.12)
    # The graph is walked a second time for the parameters, as with shared tracking.
    with FlopCounterMode(display=False) as to_parameters:
        loss.backward(inputs=list(made.parameters()))
    assert to_parameters.get_total_flops() == expected.to_parameters


def test_attention_is_what_makes_a_backward_pass_to_the_input_dearer_at_full_size():
    shape = WanShape(num_layers=30, width=1536, ffn_width=8960)
    passes = shape.pass_flops((16, 21, 60, 104), 512)
    assert passes.to_input / passes.forward == pytest.approx(
        1 + passes.attention / passes.forward, rel=0.03
    )
    assert passes.to_input / passes.forward > 1.6


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bytes_of_a_graph_are_near_those_that_a_network_keeps(bf16, checkpointing):
    made = network(SMALL)
    prepare_network(made, ComputeSettings("bf16" if bf16 else "fp32", checkpointing))
    weights = {value.untyped_storage().data_ptr() for value in made.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return value

    with warnings.catch_warnings(), torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
        warnings.simplefilter("ignore")
        made(*inputs(SMALL))
    counted = sum(storage.nbytes() for storage in kept.values())
    assert (
        SMALL.graph_bytes(LATENTS, TEXT_LENGTH, bf16=bf16, checkpointing=checkpointing)
    ) == pytest.approx(counted, rel=0.15)
