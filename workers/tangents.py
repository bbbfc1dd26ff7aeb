"""Derivative of a network along a direction of its inputs, by one pass in forward mode.

    velocity, derivative = velocity_and_derivative(network, x_t, sigma, text, (dx_t, dsigma))

The pass keeps no graph and costs about three forward passes. It is made in float32 whatever the
role computes in: in bfloat16 a derivative is off by a hundredth, and a difference of two passes has
no digit of it, because the time embedding turns 1000 radians over the noise levels. Of attention
only torch's plain kernel has forward mode, which holds all pairs of tokens.

Sharded networks gather their weights as in any pass, and only those that gather them in bfloat16
cannot have the derivative in float32: `pipelines.config.consistency` refuses them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from sgmd_core.types import Latents, PerSample, Text
from sgmd_core.velocity import VelocityModel
from workers.models.family import Denoiser


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
        network: With weights in float32 or wider, whole or sharded.
        x_t: Noisy latents.
        sigma: Noise level of each sample.
        text: Caption of each sample.
        direction: Direction of the first two.
    """
    with in_full_precision(network), sdpa_kernel(SDPBackend.MATH):
        return derivative_along(network, x_t, sigma, text, direction)


@torch.no_grad()
def derivative_along(
    network: VelocityModel,
    x_t: Latents,
    sigma: PerSample,
    text: Text,
    direction: tuple[Latents, PerSample],
) -> tuple[Latents, Latents]:
    """As `velocity_and_derivative`, in the network's own precision and kernels."""
    pairs = zip((x_t, sigma), direction, strict=True)
    # Not torch.func.jvp, whose transform would take the collectives of FSDP in, too.
    with forward_ad.dual_level():
        state, level = (forward_ad.make_dual(*pair) for pair in pairs)
        made, derivative = forward_ad.unpack_dual(network(state, level, text))
    assert derivative is not None, "the network has cut its output off its inputs"
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
