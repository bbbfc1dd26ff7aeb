"""The path from a state at one noise level to pure noise: what is left of it above that level.

    x_t  = alpha x_s + beta noise,   sigma_s <= sigma_t <= 1
    alpha  = (1 - sigma_t) / (1 - sigma_s)
    beta^2 = sigma_t^2 - alpha^2 sigma_s^2

If x_s is a state of the straight path from data to noise, so is x_t: its law is that of
(1 - sigma_t) x0 + sigma_t noise. Its velocity is not noise - x_s, because x_s is not clean:

    u = d x_t / d sigma_t = -x_s / (1 - sigma_s)
                            + [sigma_t + (1 - sigma_t) sigma_s^2 / (1 - sigma_s)^2] / beta * noise

whose mean, given x_t, is the velocity of the whole path there. With sigma_s = 0 it is noise - x0.
The coefficient of the noise grows without limit as sigma_t falls to sigma_s.

Source: Phased DMD (arXiv:2510.27684); limits of divisors and roots as in the released trainer.
"""

import torch
from jaxtyping import Float
from torch import Tensor

_LEAST = 1e-8

_State = Float[Tensor, "b *element"]
_Level = Float[Tensor, " b"]


def interval_scales(sigma: _Level, anchor_sigma: _Level) -> tuple[_Level, _Level]:
    """Factors of anchor and noise: `alpha` and `beta`.

    Args:
        sigma: Noise level of the state, at least that of the anchor.
        anchor_sigma: Noise level of the anchor, below 1.
    """
    alpha = (1 - sigma) / (1 - anchor_sigma).clamp_min(_LEAST)
    squared = sigma.square() - alpha.square() * anchor_sigma.square()
    return alpha, squared.clamp_min(_LEAST).sqrt()


def interval_state(anchor: _State, noise: _State, sigma: _Level, anchor_sigma: _Level) -> _State:
    """State at a noise level above that of the anchor: `alpha x_s + beta noise`.

    Args:
        anchor: State x_s (b, ...).
        noise: Standard normal, shaped like the anchor.
        sigma: Noise level to go to (b,), at least that of the anchor.
        anchor_sigma: Noise level of the anchor (b,), below 1.

    Returns:
        The state, shaped like the anchor.

    Source: Phased DMD (arXiv:2510.27684).
    """
    alpha, beta = interval_scales(sigma, anchor_sigma)
    return _wide(alpha, anchor) * anchor + _wide(beta, anchor) * noise


def interval_velocity(anchor: _State, noise: _State, sigma: _Level, anchor_sigma: _Level) -> _State:
    """Velocity of the path through the anchor, the target of a fake score of that interval.

    Args:
        anchor: State x_s (b, ...).
        noise: Standard normal, shaped like the anchor.
        sigma: Noise level of the state (b,), at least that of the anchor.
        anchor_sigma: Noise level of the anchor (b,), below 1.

    Returns:
        The velocity, shaped like the anchor.

    Source: Phased DMD (arXiv:2510.27684).
    """
    _, beta = interval_scales(sigma, anchor_sigma)
    clean = (1 - anchor_sigma).clamp_min(_LEAST)
    slope = (sigma + (1 - sigma) * anchor_sigma.square() / clean.square()) / beta
    return _wide(slope, anchor) * noise - anchor / _wide(clean, anchor)


def reverse_divergence_weight(sigma: _Level, anchor_sigma: _Level) -> _Level:
    """Weight under which a gap of velocities moves the anchor: `(1 - sigma_t) alpha / sigma_t`.

    The score of a state is -(x_t + (1 - sigma_t) velocity) / sigma_t, and x_t moves with the anchor
    by alpha; so the gradient of the reverse divergence at x_s is this times
    velocity_teacher - velocity_fake.

    Args:
        sigma: Noise level of the state.
        anchor_sigma: Noise level of the anchor.
    """
    alpha, _ = interval_scales(sigma, anchor_sigma)
    return (1 - sigma) * alpha / sigma


def _wide(values: _Level, like: _State) -> Tensor:
    return values.to(torch.promote_types(values.dtype, like.dtype)).reshape(
        -1, *([1] * (like.dim() - 1))
    )
