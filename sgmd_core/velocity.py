"""The velocity protocol of networks, and classifier-free guidance."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sgmd_core.types import Latents, PerSample, Text

NegativeText = Float[Tensor, "1 l d"]


# Checkable because the shape hook of the tests checks every argument against its annotation.
@runtime_checkable
class VelocityModel(Protocol):
    """Anything that predicts `noise - x0` from noisy latents, their noise level and a caption.

    Wan behind its adapter, a small network in a test and a closed-form Gaussian all fit. A model
    takes float32 latents (or float64, if it can) and computes inside in whatever it likes.
    """

    def __call__(self, x_t: Latents, sigma: PerSample, text: Text, /) -> Latents:
        """Predicts the velocity at `x_t`."""
        ...


def guided_velocity(
    model: VelocityModel,
    x_t: Latents,
    sigma: PerSample,
    text: Text,
    negative: NegativeText,
    scale: float,
    *,
    batched: bool = True,
) -> Latents:
    """Velocity under classifier-free guidance, in the standard form.

        velocity = uncond + scale * (cond - uncond)

    Scale 1 is the caption alone and costs one pass over the batch; any other scale costs one pass
    over twice the batch, so that a sharded model gathers its weights once, or two passes that need
    half the memory. Some trainers write `cond + w * (cond - uncond)` instead: w = scale - 1.

    Args:
        model: Predicts velocities.
        x_t: Noisy latents.
        sigma: Noise level of each sample.
        text: Caption of each sample.
        negative: One caption to be steered away from, shared by the batch.
        scale: Guidance scale, dimensionless.
        batched: Whether both captions go through the model as one batch.

    Returns:
        Velocity, shaped like `x_t`.
    """
    if scale == 1.0:
        return model(x_t, sigma, text)
    _, guided = guided_velocities(model, x_t, sigma, text, negative, scale, batched=batched)
    return guided


def guided_velocities(
    model: VelocityModel,
    x_t: Latents,
    sigma: PerSample,
    text: Text,
    negative: NegativeText,
    scale: float,
    *,
    batched: bool = True,
) -> tuple[Latents, Latents]:
    """Velocity with the caption alone, and that under guidance; see `guided_velocity`.

    Args:
        model: Predicts velocities.
        x_t: Noisy latents.
        sigma: Noise level of each sample.
        text: Caption of each sample.
        negative: One caption to be steered away from, shared by the batch.
        scale: Guidance scale, dimensionless.
        batched: Whether both captions go through the model as one batch.

    Returns:
        Conditional and guided velocity, shaped like `x_t`.
    """
    if batched:
        both = model(
            torch.cat([x_t, x_t]),
            torch.cat([sigma, sigma]),
            torch.cat([text, negative.expand_as(text)]),
        )
        conditional, unconditional = both.chunk(2)
    else:
        unconditional = model(x_t, sigma, negative.expand_as(text))
        conditional = model(x_t, sigma, text)
    return conditional, unconditional + scale * (conditional - unconditional)
