"""Derivative of a network along a direction of its inputs, by one pass in forward mode.

    velocity, derivative = velocity_and_derivative(network, x_t, sigma, text, (dx_t, dsigma))

The pass keeps no graph and costs about three forward passes. It is made in float32 whatever the
role computes in: in bfloat16 a derivative is off by a hundredth, and a difference of two passes has
no digit of it, because the time embedding turns 1000 radians over the noise levels. Of attention
only torch's plain kernel has forward mode, which holds all pairs of tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sgmd_core.types import Latents, PerSample, Text
from workers.models.family import Denoiser
from workers.sharding import is_sharded


@torch.no_grad()
def velocity_and_derivative(
    network: Denoiser,
    x_t: Latents,
    sigma: PerSample,
    text: Text,
    direction: tuple[Latents, PerSample],
) -> tuple[Latents, Latents]:
    """Velocity at a state, and its derivative along a direction; both constants.

    Args:
        network: Whole in this process, with weights in float32 or wider.
        x_t: Noisy latents.
        sigma: Noise level of each sample.
        text: Caption of each sample.
        direction: Direction of the first two.
    """
    assert not is_sharded(network), "FSDP's hooks have no forward mode"

    def velocity(x_t: Tensor, sigma: Tensor) -> Tensor:
        return network(x_t, sigma, text)

    with in_full_precision(network), sdpa_kernel(SDPBackend.MATH):
        made, derivative, *_ = torch.func.jvp(velocity, (x_t, sigma), direction)
    return made, derivative


@contextmanager
def in_full_precision(network: Denoiser) -> Iterator[None]:
    """Matrix products of a network in the type of its weights inside."""
    dtype = network.autocast_dtype
    network.autocast_dtype = None
    try:
        yield
    finally:
        network.autocast_dtype = dtype
