"""The mixture world: its velocity, its centres, and the distance that sees a lost mode."""

import math

import pytest
import torch

from sgmd_core.errors import ConfigError, ShapeError
from sgmd_core.metrics.energy import energy_distance
from sgmd_core.seeds import random_generator
from sgmd_core.worlds.gaussian import full_gaussian_velocity, gaussian_velocity
from sgmd_core.worlds.mixture import GaussianMixture, mixture_centres


def no_text(like: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(like), 1, 1)


def stream(name: str = "test") -> torch.Generator:
    return random_generator(0, name)


def as_latents(points: torch.Tensor) -> torch.Tensor:
    return points[:, :, None, None, None]


def test_a_full_gaussian_is_the_plain_one_along_its_axes_and_the_derivative_of_its_density():
    sigma = torch.linspace(0.02, 0.98, 6, dtype=torch.float64)
    points = torch.randn(6, 3, generator=stream(), dtype=torch.float64)
    mean = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    diagonal = torch.tensor([0.3, 1.2, 0.7], dtype=torch.float64)
    plain = torch.stack(
        [
            gaussian_velocity(
                as_latents(points[:, [axis]]), sigma, mean[axis].expand(6), std.expand(6)
            ).flatten()
            for axis, std in enumerate(diagonal)
        ],
        dim=1,
    )
    own = full_gaussian_velocity(points, sigma, mean, diagonal.square().diag())
    assert torch.allclose(own, plain, atol=1e-12)
    # E[noise | x_t] = -sigma d log p / d x_t, and velocity = (E[noise | x_t] - x_t) / (1 - sigma).
    matrix = torch.randn(3, 3, generator=stream("matrix"), dtype=torch.float64)
    covariance, alpha = matrix @ matrix.T, 1 - sigma[:, None]
    leaf = points.clone().requires_grad_()
    for row in range(6):
        noised = alpha[row] ** 2 * covariance + sigma[row] ** 2 * torch.eye(3, dtype=torch.float64)
        law = torch.distributions.MultivariateNormal(alpha[row] * mean, noised)
        law.log_prob(leaf[row]).backward()
    assert leaf.grad is not None
    noise = -sigma[:, None] * leaf.grad
    found = full_gaussian_velocity(points, sigma, mean, covariance)
    assert torch.allclose(found, (noise - points) / alpha, atol=1e-9)


def test_one_mode_at_the_origin_is_the_gaussian_world():
    x_t = as_latents(torch.randn(6, 3, generator=stream(), dtype=torch.float64))
    sigma = torch.linspace(0.02, 0.98, 6, dtype=torch.float64)
    mixture = GaussianMixture(torch.zeros(1, 3), 0.5)
    zero, half = torch.zeros_like(sigma), torch.full_like(sigma, 0.5)
    expected = gaussian_velocity(x_t, sigma, zero, half)
    assert torch.allclose(mixture(x_t, sigma, no_text(x_t)), expected, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.05, 0.4, 0.9])
def test_the_velocity_is_the_score_of_the_noised_density(sigma: float):
    """velocity = (x_t - x0) / sigma and x0 = (x_t + sigma^2 d log p / d x_t) / alpha."""
    centres = mixture_centres(2, 5, 2.0, stream())
    mixture, alpha = GaussianMixture(centres, 0.3), 1 - sigma
    x_t = torch.randn(8, 2, generator=stream(), dtype=torch.float64).requires_grad_()
    variance = alpha**2 * 0.3**2 + sigma**2
    distances = (x_t[:, None] - alpha * centres.double()).square().sum(dim=2)
    density = torch.logsumexp(-distances / (2 * variance), dim=1).sum()
    (score,) = torch.autograd.grad(density, x_t)
    expected = (x_t.detach() - (x_t.detach() + sigma**2 * score) / alpha) / sigma
    levels = torch.full((8,), sigma, dtype=torch.float64)
    found = mixture(as_latents(x_t.detach()), levels, no_text(x_t)).flatten(1)
    assert torch.allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize(("dim", "modes"), [(2, 8), (2, 2), (16, 2), (16, 8), (1, 2)])
def test_centres_are_at_one_distance_and_apart(dim: int, modes: int):
    centres = mixture_centres(dim, modes, 2.0, stream())
    assert centres.shape == (modes, dim)
    assert torch.allclose(centres.norm(dim=1), torch.full((modes,), 2.0), atol=1e-5)
    nearest = torch.pdist(centres).min().item()
    wanted = {(2, 8): 4 * math.sin(math.pi / 8), (16, 8): 2 * math.sqrt(2)}.get((dim, modes), 4.0)
    assert nearest == pytest.approx(wanted, rel=1e-5)


def test_more_modes_than_directions_are_refused():
    with pytest.raises(ConfigError, match="9 modes in 8 dimensions"):
        mixture_centres(8, 9, 1.0, stream())


def test_samples_have_the_weights_and_spread_of_the_mixture():
    mixture = GaussianMixture(mixture_centres(2, 4, 3.0, stream()), 0.2)
    points = mixture.sample(20_000, stream())
    mode, distance = mixture.nearest_mode(points)
    assert torch.bincount(mode).double() / 20_000 == pytest.approx([0.25] * 4, abs=0.015)
    assert distance.square().mean().sqrt().item() == pytest.approx(0.2 * 2**0.5, rel=0.02)


class TestEnergyDistance:
    def test_of_two_points_each_is_known(self):
        x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [4.0]])
        # The distances between the sets are 1, 4, 1 and 2.
        assert energy_distance(x, y).item() == pytest.approx(2 * 2.0 - 2 - 3)

    def test_of_shifted_gaussians_is_the_closed_form(self):
        """E|N(m, 2)| is known, so the distance of N(0, 1) and N(m, 1) is."""
        m, n = 1.0, 2000
        # Equally spaced quantiles stand for a normal better than draws do.
        quantiles = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        x = (math.sqrt(2) * torch.erfinv(2 * quantiles - 1))[:, None]
        folded = 2 / math.sqrt(math.pi) * math.exp(-(m**2) / 4) + m * math.erf(m / 2)
        expected = 2 * folded - 4 / math.sqrt(math.pi)
        assert energy_distance(x, x + m).item() == pytest.approx(expected, abs=3e-3)
        assert energy_distance(x, x).item() == pytest.approx(0, abs=3e-3)

    def test_sees_a_lost_mode_that_two_moments_do_not(self):
        """Eight modes against four of them: means and covariances agree."""
        ring = mixture_centres(2, 8, 2.0, stream())
        every, half = GaussianMixture(ring, 0.2), GaussianMixture(ring[::2], 0.2)
        truth, lost = every.sample(2000, stream("a")), half.sample(2000, stream("b"))
        floor = energy_distance(truth, every.sample(2000, stream("c"))).item()
        assert (truth.T.cov() - lost.T.cov()).abs().max() < 0.15
        assert energy_distance(truth, lost).item() > 10 * abs(floor)

    def test_needs_two_points_each(self):
        with pytest.raises(ShapeError, match="1 and 3 points"):
            energy_distance(torch.zeros(1, 2), torch.zeros(3, 2))
