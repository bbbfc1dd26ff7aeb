"""A world in which everything is known in closed form: clean data are x0 ~ N(mean, std^2).

All elements of a latent are independent, so at noise level sigma, with alpha = 1 - sigma,

    variance of x_t    d        = alpha^2 std^2 + sigma^2
    E[x0    | x_t]              = mean + alpha std^2 / d * (x_t - alpha mean)
    E[noise | x_t]              = sigma / d * (x_t - alpha mean)
    velocity                    = E[noise - x0 | x_t]
    d velocity / d x_t          = (sigma - alpha std^2) / d

A caption says (mean, std) in the first two numbers of its first token.
"""

import torch
from torch import Tensor, nn

from sgmd_core.types import per_sample


def gaussian_text(mean: Tensor, std: Tensor) -> Tensor:
    """Captions (b, 1, 2) that say one mean and one standard deviation a sample."""
    return torch.stack([mean, std], dim=1)[:, None, :]


def gaussian_velocity(x_t: Tensor, sigma: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The exact velocity of N(mean, std^2); one value a sample for all but `x_t`."""
    gain = per_sample(velocity_gain(sigma, std), x_t)
    mean, alpha = per_sample(mean, x_t), per_sample(1 - sigma, x_t)
    return gain * (x_t - alpha * mean) - mean


def velocity_gain(sigma: Tensor, std: Tensor) -> Tensor:
    """d velocity / d x_t, one value a sample."""
    alpha = 1 - sigma
    return (sigma - alpha * std.square()) / (alpha.square() * std.square() + sigma.square())


def x0_gain(sigma: Tensor, std: Tensor) -> Tensor:
    """d E[x0 | x_t] / d x_t, one value a sample."""
    alpha = 1 - sigma
    return alpha * std.square() / (alpha.square() * std.square() + sigma.square())


class GaussianVelocity:
    """The exact `VelocityModel` of the world that the captions describe."""

    def __call__(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        return gaussian_velocity(x_t, sigma, text[:, 0, 0], text[:, 0, 1])


class LearnedGaussian(nn.Module):
    """A fake score that can be exact: the velocity of N(mean, std^2) with both to be learnt."""

    def __init__(self, mean: float, std: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=dtype))
        self.log_std = nn.Parameter(torch.tensor(std, dtype=dtype).log())

    def forward(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        mean, std = self.mean.expand(len(x_t)), self.log_std.exp().expand(len(x_t))
        return gaussian_velocity(x_t, sigma, mean, std)


class AffineGenerator(nn.Module):
    """A one-step generator of N(mean, std^2): from pure noise it leaves for mean + std * noise."""

    def __init__(self, mean: float, std: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=dtype))
        self.std = nn.Parameter(torch.tensor(std, dtype=dtype))

    def forward(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        return x_t - (self.mean + self.std * x_t)


def balanced_noises(num_samples: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two noises (b, 1, 1, 2, 2) whose four elements hold all combinations of +1 and -1.

    Their means, variances and correlation over a sample are exactly 0, 1 and 0, so the mean of any
    quadratic function of them is its expectation under standard normals, without a sampling error.
    """
    first = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=dtype)
    second = torch.tensor([[1.0, -1.0], [1.0, -1.0]], dtype=dtype)
    shape = (num_samples, 1, 1, 2, 2)
    return first.expand(shape).clone(), second.expand(shape).clone()
