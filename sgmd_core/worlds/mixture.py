"""Mixtures of equal Gaussians: a world with modes to lose, in which every score is exact.

    x0 = centre of a mode + spread * standard normal,   every mode with the same weight

With alpha = 1 - sigma, the noised samples of a mode have variance d = alpha^2 spread^2 + sigma^2
around alpha * centre, and

    r_k      = softmax_k( (alpha x_t . c_k - alpha^2 |c_k|^2 / 2) / d )      posterior of mode k
    m        = sum_k r_k c_k
    velocity = (sigma - alpha spread^2) / d * (x_t - alpha m) - m            E[noise - x0 | x_t]

One mode at the origin is the Gaussian of `sgmd_core.worlds.gaussian`.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sgmd_core.errors import ConfigError
from sgmd_core.types import Latents, PerSample, Text

Points = Float[Tensor, "n dim"]
Centres = Float[Tensor, "modes dim"]


@dataclass(frozen=True, slots=True)
class GaussianMixture:
    """A mixture of Gaussians of equal weight and spread; also the exact `VelocityModel` of it.

    Latents are (b, dim, 1, 1, 1).

    Attributes:
        centres: Where the modes are.
        spread: Standard deviation of a mode, in every direction.
    """

    centres: Centres
    spread: float

    def sample(self, count: int, stream: torch.Generator) -> Points:
        """Draws samples of the mixture from a random stream."""
        modes = torch.randint(len(self.centres), (count,), generator=stream)
        noise = torch.randn(count, self.centres.shape[1], generator=stream)
        return self.centres[modes] + self.spread * noise

    def nearest_mode(self, points: Points) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
        """The mode that is nearest to each point, and its distance."""
        distance, mode = torch.cdist(points, self.centres).min(dim=1)
        return mode, distance

    def __call__(self, x_t: Latents, sigma: PerSample, text: Text, /) -> Latents:
        """Predicts the velocity at `x_t`; there is one caption, so the text is not read."""
        points, alpha = x_t.flatten(1), (1 - sigma)[:, None]
        variance = alpha.square() * self.spread**2 + sigma.square()[:, None]
        centres = self.centres.to(points)
        half_squares = centres.square().sum(dim=1) / 2
        logits = (alpha * (points @ centres.T) - alpha.square() * half_squares) / variance
        centre = torch.softmax(logits, dim=1) @ centres
        gain = (sigma[:, None] - alpha * self.spread**2) / variance
        return (gain * (points - alpha * centre) - centre).reshape(x_t.shape)


def mixture_centres(dim: int, modes: int, radius: float, stream: torch.Generator) -> Centres:
    """Centres at one distance from the origin and as far as possible from each other.

    One mode is at the origin, two modes are opposite, more are equally spaced on a circle in two
    dimensions, and at right angles in random directions in more.

    Args:
        dim: Dimensions.
        modes: How many.
        radius: Distance from the origin.
        stream: Draws the directions in more than two dimensions.

    Raises:
        ConfigError: There are more modes than dimensions to put them in.
    """
    if modes == 1:
        return torch.zeros(1, dim)
    if dim == 2:
        angles = 2 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
        return radius * torch.stack([angles.cos(), angles.sin()], dim=1).float()
    needed = 1 if modes == 2 else modes
    if needed > dim:
        raise ConfigError(
            "placing the modes of a Gaussian mixture",
            f"{modes} modes in {dim} dimensions",
            "at most as many modes as dimensions, or 2 dimensions",
            "Raise dim, or lower modes",
        )
    directions = nn.init.orthogonal_(torch.empty(needed, dim), generator=stream)
    return radius * (torch.cat([directions, -directions]) if modes == 2 else directions)
