"""The velocity protocol of networks, and classifier-free guidance."""

from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sgmd_core.types import Latents, PerSample, Text

NegativeText = Float[Tensor, "1 l d"]
GuidanceNorm = Literal["none", "layer_norm", "scalar"]
"""Bound of a guided velocity's length; see `renormalized`."""


# Checkable because the shape hook of the tests checks every argument against its annotation.
@runtime_checkable
class VelocityModel(Protocol):
    """Anything that predicts `noise - x0` from noisy latents, their noise level and a caption.

    Wan behind its adapter, a small network in a test and a closed-form Gaussian are examples. A
    model takes float32 latents (or float64, if it can) and computes in any type inside.
    """

    def __call__(self, x_t: Latents, sigma: PerSample, text: Text, /) -> Latents:
        """Predicts the velocity at `x_t`.

        Args:
            x_t: Noisy latents (b, c, t, h, w).
            sigma: Noise level of each sample (b,), in [0, 1].
            text: Caption embeddings (b, l, d).

        Returns:
            Velocity `noise - x0`, shaped like `x_t`.
        """
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
    norm: GuidanceNorm = "none",
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
        norm: See `renormalized`.

    Returns:
        Velocity, shaped like `x_t`.
    """
    if scale == 1.0:
        return model(x_t, sigma, text)
    _, guided = guided_velocities(
        model, x_t, sigma, text, negative, scale, batched=batched, norm=norm
    )
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
    norm: GuidanceNorm = "none",
) -> tuple[Latents, Latents]:
    """Velocity with the caption alone, and that under guidance; arguments as `guided_velocity`.

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
    guided = unconditional + scale * (conditional - unconditional)
    return conditional, renormalized(guided, conditional, norm)


def renormalized(guided: Latents, conditional: Latents, norm: GuidanceNorm) -> Latents:
    """Guided velocity, rescaled to the length of the conditional one.

        layer_norm  guided * |conditional| / max(|guided|, 1e-12), lengths along the last axis
        scalar      guided * min(1, |conditional| / |guided|), lengths of the whole tensor
        none        guided

    For latents the last axis is a row of pixels. `scalar` has one factor for all samples that are
    given together, so it depends on how a batch is split.

    Args:
        guided: Velocity under guidance (b, c, t, h, w).
        conditional: Velocity with the caption alone, of the same shape.
        norm: Rule, one of the three above.

    Returns:
        The rescaled velocity, of the same shape.

    Source: `cfg_norm` of the trainer that SGMD was released in, whose video recipes have none.
    """
    if norm == "none":
        return guided
    if norm == "layer_norm":
        wanted = conditional.square().sum(dim=-1, keepdim=True).sqrt()
        own = guided.square().sum(dim=-1, keepdim=True).sqrt()
        return guided * (wanted / own.clamp_min(1e-12))
    wanted, own = conditional.square().sum().sqrt(), guided.square().sum().sqrt()
    return guided * (wanted / own.clamp_min(1e-12)).clamp_max(1.0)
