"""Parameters and operations are counted exactly, bytes of graphs within some per cent."""

import warnings

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from workers.compute import ComputeSettings, prepare
from workers.models.wan import WanVelocity
from workers.models.wan_arithmetic import WanShape

TEXT_LENGTH, LATENTS = 16, (4, 3, 8, 8)
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
    )
    return WanVelocity(transformer)


def inputs(shape: WanShape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(1, *LATENTS), torch.tensor([0.5]), torch.randn(1, TEXT_LENGTH, 24)


@pytest.mark.parametrize(
    ("shape", "billions"),
    [
        (WanShape(num_layers=30, width=1536, ffn_width=8960), 1.42),
        (WanShape(num_layers=40, width=5120, ffn_width=13824), 14.29),
        (SMALL, 0.0),
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


def test_operations_are_those_that_a_network_makes():
    # The fused attention of a CPU is not counted, the plain one is.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        loss = network(SMALL)(*inputs(SMALL)).sum()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        loss.backward()
    assert forward.get_total_flops() == SMALL.forward_flops(LATENTS, TEXT_LENGTH)
    # Once for inputs and once for parameters; the network's own input needs no gradient.
    assert backward.get_total_flops() == pytest.approx(2 * forward.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bytes_of_a_graph_are_near_those_that_a_network_keeps(bf16, checkpointing):
    made = network(SMALL)
    prepare(made, ComputeSettings("bf16" if bf16 else "fp32", checkpointing))
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
