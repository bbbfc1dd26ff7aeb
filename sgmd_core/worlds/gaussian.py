"""The Gaussian world: clean data are x0 ~ N(mean, std^2), and every score is exact.

All elements of a latent are independent, so at noise level sigma, with alpha = 1 - sigma,

    variance of x_t    d        = alpha^2 std^2 + sigma^2
    E[x0    | x_t]              = mean + alpha std^2 / d * (x_t - alpha mean)
    E[noise | x_t]              = sigma / d * (x_t - alpha mean)
    velocity                    = E[noise - x0 | x_t]
    d velocity / d x_t          = (sigma - alpha std^2) / d

A caption says (mean, std) in the first two numbers of its first token.
"""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sgmd_core.types import Latents, PerSample, Scalar, Text, per_sample


def gaussian_text(mean: PerSample, std: PerSample) -> Text:
    """Makes captions that tell `GaussianVelocity` the distribution of each sample.

    Args:
        mean: Mean of all elements of each sample (b,).
        std: Their standard deviation (b,).

    Returns:
        Captions (b, 1, 2): mean and standard deviation.
    """
    return torch.stack([mean, std], dim=1)[:, None, :]


def gaussian_velocity(x_t: Latents, sigma: PerSample, mean: PerSample, std: PerSample) -> Latents:
    """Exact velocity of N(mean, std^2) at `x_t`."""
    gain = per_sample(velocity_gain(sigma, std), x_t)
    mean, alpha = per_sample(mean, x_t), per_sample(1 - sigma, x_t)
    return gain * (x_t - alpha * mean) - mean


def velocity_gain(sigma: PerSample, std: PerSample | Scalar) -> PerSample:
    """Derivative d velocity / d x_t of each sample."""
    alpha = 1 - sigma
    return (sigma - alpha * std.square()) / (alpha.square() * std.square() + sigma.square())


def x0_gain(sigma: PerSample, std: PerSample | Scalar) -> PerSample:
    """Derivative d E[x0 | x_t] / d x_t of each sample."""
    alpha = 1 - sigma
    return alpha * std.square() / (alpha.square() * std.square() + sigma.square())


class GaussianVelocity:
    """The exact `VelocityModel` of N(mean, std^2), with mean and std read from the captions.

    A teacher whose answers are known in closed form, for tests and examples. `gaussian_text` makes
    the captions; `examples/gaussian.py` distils it in thirty lines.
    """

    def __call__(self, x_t: Latents, sigma: PerSample, text: Text, /) -> Latents:
        """Predicts the velocity at `x_t`."""
        return gaussian_velocity(x_t, sigma, text[:, 0, 0], text[:, 0, 1])


def full_gaussian_velocity(
    points: Float[Tensor, "n dim"],
    sigma: Float[Tensor, " n"],
    mean: Float[Tensor, " dim"],
    covariance: Float[Tensor, "dim dim"],
) -> Float[Tensor, "n dim"]:
    """Exact velocity of a Gaussian whose elements are not independent.

        velocity = (sigma I - alpha C) (alpha^2 C + sigma^2 I)^-1 (x_t - alpha mean) - mean

    Args:
        points: States x_t.
        sigma: Their noise levels.
        mean: Of the clean data.
        covariance: C, of the clean data.
    """
    # Torch has no type for it.
    decompose = cast(Any, torch.linalg.eigh)  # pyright: ignore[reportUnknownMemberType]
    values, directions = cast(tuple[Tensor, Tensor], decompose(covariance))
    alpha = 1 - sigma[:, None]
    gain = (sigma[:, None] - alpha * values) / (alpha.square() * values + sigma[:, None].square())
    return (gain * ((points - alpha * mean) @ directions)) @ directions.T - mean


class LearnedGaussian(nn.Module):
    """Velocity of N(mean, std^2) with trainable mean and std: a fake score that can be exact.

    Args:
        mean: Initial mean.
        std: Initial standard deviation; positive.
        dtype: Of the two parameters.
    """

    def __init__(self, mean: float, std: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=dtype))
        self.log_std = nn.Parameter(torch.tensor(std, dtype=dtype).log())

    def forward(self, x_t: Latents, sigma: PerSample, text: Text) -> Latents:
        """Predicts the velocity at `x_t`."""
        mean, std = self.mean.expand(len(x_t)), self.log_std.exp().expand(len(x_t))
        return gaussian_velocity(x_t, sigma, mean, std)


class AffineGenerator(nn.Module):
    """One-step generator of N(mean, std^2): at sigma 1 its x0 is mean + std * noise.

    Args:
        mean: Initial mean.
        std: Initial standard deviation.
        dtype: Of the two parameters.
    """

    def __init__(self, mean: float, std: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=dtype))
        self.std = nn.Parameter(torch.tensor(std, dtype=dtype))

    def forward(self, x_t: Latents, sigma: PerSample, text: Text) -> Latents:
        """Predicts the velocity at `x_t`, which is pure noise."""
        return x_t - (self.mean + self.std * x_t)
