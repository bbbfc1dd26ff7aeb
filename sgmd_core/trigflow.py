"""A straight-path network as one on the circle: TrigFlow, in float64.

    t       = arctan(sigma / (1 - sigma))           x_trig = cos(t) x0 + sin(t) noise
    x_t     = x_trig / (cos(t) + sin(t))            sigma  = sin(t) / (cos(t) + sin(t))
    F       = (cos(t) x_trig - x0_hat) / sin(t)     the network's velocity on the circle
            = ((cos(t) - sin(t)) x_trig + velocity) / (cos(t) + sin(t))
    f       = cos(t) x_trig - sin(t) F              = x0_hat: the consistency function

The conditional value of F is cos(t) noise - sin(t) x0, and the probability-flow equation is
dx_trig / dt = F. In the flow's own time the same path is dx_t / dsigma = velocity, so a derivative
along it asks the network for the direction (velocity, 1):

    cos sin dF/dt = cos sin ((cos - sin) (F_path - F) / (cos + sin) - x_trig)
                    + sigma (1 - sigma) (J velocity_path + d velocity / d sigma) / (cos + sin)

Neither form divides by sin(t), so both hold at every noise level.

Source: sCM (arXiv:2410.11081), TrigFlow; rCM (arXiv:2510.08431), a flow model wrapped in it.
"""

import torch
from jaxtyping import Float64
from torch import Tensor

from sgmd_core.types import Latents, PerSample, per_sample

Angle = Float64[Tensor, " b"]


def trig_time(sigma: PerSample) -> Angle:
    """Angle of a noise level: 0 at data, pi/2 at pure noise."""
    sigma = sigma.double()
    return torch.atan2(sigma, 1 - sigma)


def sigma_of_time(t: Angle) -> Angle:
    """Noise level of an angle."""
    return t.sin() / (t.sin() + t.cos())


def trig_state(x_t: Latents, t: Angle) -> Float64[Tensor, "b c t h w"]:
    """State on the circle of a state on the straight path."""
    return per_sample(t.cos() + t.sin(), x_t) * x_t.double()


def trig_velocity(x_t: Latents, velocity: Latents, t: Angle) -> Float64[Tensor, "b c t h w"]:
    """Velocity on the circle of a velocity on the straight path.

    Args:
        x_t: State on the straight path.
        velocity: A network's velocity there.
        t: Angle of its noise level.
    """
    cos, sin = (per_sample(part, x_t) for part in (t.cos(), t.sin()))
    return (cos - sin) * x_t.double() + velocity.double() / (cos + sin)


def direction_weight(sigma: PerSample) -> Angle:
    """Length of the direction (velocity, 1) that makes a derivative cos(t) sin(t) d / dt."""
    sigma = sigma.double()
    return sigma * (1 - sigma)


def velocity_derivative(
    x_t: Latents, velocity: Latents, velocity_path: Latents, derivative: Latents, t: Angle
) -> Float64[Tensor, "b c t h w"]:
    """Returns cos(t) sin(t) dF/dt along a path.

    Args:
        x_t: State on the straight path.
        velocity: The network's velocity there.
        velocity_path: Velocity of the path, such as a teacher's.
        derivative: Derivative of the network along `direction_weight` times (velocity_path, 1).
        t: Angle of the noise level.
    """
    cos, sin = (per_sample(part, x_t) for part in (t.cos(), t.sin()))
    apart = (velocity_path.double() - velocity.double()) / (cos + sin)
    along = (cos - sin) / (cos + sin) * apart - trig_state(x_t, t)
    return cos * sin * along + derivative.double() / (cos + sin)
