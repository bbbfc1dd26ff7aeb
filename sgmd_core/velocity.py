"""The velocity protocol of networks, and classifier-free guidance."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sgmd_core.types import Latents, PerSample, Text

NegativeText = Float[Tensor, "1 l d"]
GuidanceNorm = Literal["none", "layer_norm", "scalar"]
"""Bound of a guided velocity's length; see `renormalized`."""


@dataclass(frozen=True, slots=True)
class Guidance:
    """Classifier-free guidance of a model.

    Attributes:
        negative: One caption to be steered away from, shared by the batch (1, l, d).
        scale: Scale in `uncond + scale * (cond - uncond)`; 1 is the caption alone.
        batched: Whether both captions go through the model as one batch.
        norm: See `renormalized`.
    """

    negative: NegativeText
    scale: float
    batched: bool = True
    norm: GuidanceNorm = "none"


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
    guidance: Guidance,
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
        guidance: Scale and negative caption.

    Returns:
        Velocity, shaped like `x_t`.
    """
    if guidance.scale == 1.0:
        return model(x_t, sigma, text)
    _, guided = guided_velocities(model, x_t, sigma, text, guidance)
    return guided


def guided_velocities(
    model: VelocityModel,
    x_t: Latents,
    sigma: PerSample,
    text: Text,
    guidance: Guidance,
) -> tuple[Latents, Latents]:
    """Velocity with the caption alone, and that under guidance; arguments as `guided_velocity`.

    Returns:
        Conditional and guided velocity, shaped like `x_t`.
    """
    negative = guidance.negative.expand_as(text)
    if guidance.batched:
        both = model(
            torch.cat([x_t, x_t]),
            torch.cat([sigma, sigma]),
            torch.cat([text, negative]),
        )
        conditional, unconditional = both.chunk(2)
    else:
        unconditional = model(x_t, sigma, negative)
        conditional = model(x_t, sigma, text)
    guided = unconditional + guidance.scale * (conditional - unconditional)
    return conditional, renormalized(guided, conditional, guidance.norm)


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
