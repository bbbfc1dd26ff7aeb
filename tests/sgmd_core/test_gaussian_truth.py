"""The objective where every answer is known: Gaussian teacher, Gaussian generator, exact scores.

    teacher    N(mu, s^2)          generator  x0 = m + a * z, with an ideally tracking fake score
    alpha = 1 - sigma              d(std) = alpha^2 std^2 + sigma^2
    k(std) = alpha std^2 / d(std)  the gain of E[x0 | x_t] over x_t

    gap       x0_fake - x0_teacher = (m - mu) (1 - alpha k_s) + (k_a - k_s) (x_t - alpha m)
    residual  x0 - x0_fake         = (1 - alpha k_a) a z - k_a sigma noise

The noises of `balanced_noises` have exact moments, so means over a sample are expectations.
"""

import pytest
import torch

from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.rollout import rollout
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.worlds.gaussian import (
    AffineGenerator,
    GaussianVelocity,
    LearnedGaussian,
    gaussian_text,
    gaussian_velocity,
    x0_gain,
)
from tests.helpers.noises import balanced_noises
from tests.helpers.queries import make_query

MU, S = 0.7, 0.5
SIGMAS = torch.tensor([0.02, 0.3, 0.5, 0.8, 0.98], dtype=torch.float64)
ALPHAS = 1 - SIGMAS
EXACT = {"atol": 1e-12, "rtol": 1e-9}


def full(value: float, like: torch.Tensor = SIGMAS) -> torch.Tensor:
    return torch.full_like(like, value)


def column(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, 1, 1, 1, 1)


class World:
    """One sample a noise level from a generator N(m, a^2), scored by it and by the teacher."""

    def __init__(self, m: float, a: float, sigma: torch.Tensor = SIGMAS):
        self.z, self.noise = balanced_noises(len(sigma), torch.float64)
        self.m = torch.tensor(m, dtype=torch.float64, requires_grad=True)
        self.a = torch.tensor(a, dtype=torch.float64, requires_grad=True)
        self.x0 = self.m + self.a * self.z
        self.query = make_query(self.x0, self.noise, sigma)
        x_t = self.query.x_t
        self.velocity_fake = gaussian_velocity(x_t, sigma, full(m, sigma), full(a, sigma))
        text = gaussian_text(full(MU, sigma), full(S, sigma))
        self.velocity_teacher = GaussianVelocity()(x_t, sigma, text)
        self.gain_fake = x0_gain(sigma, full(a, sigma))
        self.gain_teacher = x0_gain(sigma, full(S, sigma))

    def loss(self, **settings):
        objective = SgmdObjective(**settings)
        return objective.generator_loss(self.query, self.velocity_fake, self.velocity_teacher)

    def gradients(self, **settings) -> tuple[float, float]:
        """Derivatives of the loss with respect to the generator's mean and spread."""
        loss = self.loss(**settings).value
        return tuple(g.item() for g in torch.autograd.grad(loss, [self.m, self.a]))

    def gap(self) -> torch.Tensor:
        alpha, fake, teacher = map(
            column, (1 - self.query.sigma, self.gain_fake, self.gain_teacher)
        )
        shift = (self.m - MU) * (1 - alpha * teacher)
        return (shift + (fake - teacher) * (self.query.x_t - alpha * self.m)).detach()

    def residual(self) -> torch.Tensor:
        alpha, fake = column(1 - self.query.sigma), column(self.gain_fake)
        own = (1 - alpha * fake) * self.a * self.z
        return (own - fake * column(self.query.sigma) * self.noise).detach()


@pytest.mark.parametrize("form", ["released", "paper"])
def test_a_generator_that_is_the_teacher_has_no_fisher_loss_and_no_fisher_gradient(form):
    world = World(m=MU, a=S)
    assert world.loss(form=form, lambda_nr=0.0).value.item() == 0
    assert world.gradients(form=form, lambda_nr=0.0) == (0, 0)


def test_the_paper_fisher_loss_is_the_expected_squared_score_difference():
    world = World(m=1.2, a=0.8)
    scores = [
        -(world.query.x_t - column(ALPHAS) * mean)
        / column(ALPHAS.square() * std**2 + SIGMAS.square())
        for mean, std in ((1.2, 0.8), (MU, S))
    ]
    expected = 0.5 * (scores[0] - scores[1]).square().mean()
    torch.testing.assert_close(world.loss(form="paper", lambda_nr=0.0).value, expected, **EXACT)


def test_the_paper_fisher_loss_has_its_closed_form():
    m, a = 1.2, 0.8
    world = World(m, a)
    shift = (m - MU) ** 2 * (1 - ALPHAS * world.gain_teacher).square()
    variance = ALPHAS.square() * a**2 + SIGMAS.square()
    spread = (world.gain_fake - world.gain_teacher).square() * variance
    expected = (0.5 * ALPHAS.square() / SIGMAS**4 * (shift + spread)).mean()
    fisher = world.loss(form="paper").terms["fisher"]
    torch.testing.assert_close(fisher, expected, **EXACT)


def test_the_released_fisher_loss_divides_by_the_mean_distance_to_the_teacher():
    world = World(m=1.2, a=0.8)
    gap, residual = world.gap(), world.residual()
    distance = (residual + gap).abs().mean(dim=(1, 2, 3, 4))  # x0 - x0_teacher
    expected = (0.5 * gap.square().mean(dim=(1, 2, 3, 4)) / (distance + 1e-8)).mean()
    torch.testing.assert_close(world.loss().terms["fisher"], expected, **EXACT)


def test_the_negative_residual_of_an_exact_score_is_the_noise_that_cannot_be_removed():
    a = 0.8
    world = World(m=1.2, a=a)
    posterior_variance = a**2 * SIGMAS.square() / (ALPHAS.square() * a**2 + SIGMAS.square())
    paper = world.loss(form="paper").terms["negative_residual"]
    torch.testing.assert_close(paper, -0.5 * posterior_variance.mean(), **EXACT)
    released = world.loss(form="released").terms["negative_residual"]
    expected = -0.5 * (posterior_variance / SIGMAS.square()).mean()
    torch.testing.assert_close(released, expected, **EXACT)


@pytest.mark.parametrize("lambda_nr", [0.0, 0.1])
@pytest.mark.parametrize("form", ["released", "paper"])
def test_the_gradient_reaches_x0_through_the_fake_scores_input(form, lambda_nr):
    world = World(m=1.2, a=0.8)
    gap, residual = world.gap(), world.residual()
    if form == "paper":
        fisher_weight, residual_weight = column(ALPHAS.square() / SIGMAS**4), 1.0
    else:
        distance = (residual + gap).abs().mean(dim=(1, 2, 3, 4))
        fisher_weight, residual_weight = column(1 / (distance + 1e-8)), column(1 / SIGMAS)
    upstream = fisher_weight * gap + lambda_nr * residual_weight * residual
    # d x0_fake / d x0 = alpha * k: the noising, then the fake score's own Jacobian.
    expected = column(ALPHAS * world.gain_fake) * upstream / upstream.numel()
    loss = world.loss(form=form, lambda_nr=lambda_nr).value
    (gradient,) = torch.autograd.grad(loss, world.x0)
    torch.testing.assert_close(gradient, expected, **EXACT)


@pytest.mark.parametrize("form", ["released", "paper"])
@pytest.mark.parametrize(("m", "a"), [(1.2, 0.8), (1.2, 0.3), (-0.4, 0.8), (-0.4, 0.3)])
@pytest.mark.parametrize("sigma", SIGMAS.tolist())
def test_under_ideal_tracking_descent_leads_to_the_teachers_mean_and_spread(form, m, a, sigma):
    world = World(m, a, torch.tensor([sigma], dtype=torch.float64))
    grad_mean, grad_std = world.gradients(form=form, lambda_nr=0.0)
    assert grad_mean * (m - MU) > 0
    assert grad_std * (a - S) > 0


@pytest.mark.parametrize("form", ["released", "paper"])
def test_under_ideal_tracking_the_negative_residual_narrows_and_does_not_shift(form):
    without = World(m=MU, a=S).gradients(form=form, lambda_nr=0.0)
    grad_mean, grad_std = World(m=MU, a=S).gradients(form=form, lambda_nr=0.1)
    assert without == (0, 0)
    assert grad_mean == pytest.approx(0, abs=1e-12)
    assert grad_std > 0


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5])
def test_the_paper_form_settles_at_a_spread_that_is_known(sigma):
    # Setting the spread's gradient to zero gives a^2 = s^2 - lambda sigma^4 d(s) / alpha^4.
    alpha, lambda_nr = 1 - sigma, 0.1
    variance = S**2 - lambda_nr * sigma**4 * (alpha**2 * S**2 + sigma**2) / alpha**4
    level = torch.tensor([sigma], dtype=torch.float64)
    _, grad_std = World(MU, variance**0.5, level).gradients(form="paper", lambda_nr=lambda_nr)
    scale = abs(World(MU, variance**0.5, level).gradients(form="paper", lambda_nr=0.0)[1])
    assert scale > 1e-4
    assert grad_std == pytest.approx(0, abs=1e-9 * scale)


@pytest.mark.parametrize("form", ["released", "paper"])
def test_tracking_is_at_rest_where_the_fake_score_is_exact(form):
    m, a = 1.2, 0.8
    z, noise = balanced_noises(len(SIGMAS), torch.float64)
    query = make_query(m + a * z, noise, SIGMAS)
    exact = LearnedGaussian(m, a, torch.float64)
    loss = SgmdObjective(form=form).tracking_loss(query, exact(query.x_t, SIGMAS, query.text))
    for gradient in torch.autograd.grad(loss.value, list(exact.parameters())):
        assert gradient.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("form", ["released", "paper"])
@pytest.mark.parametrize(("mean", "std"), [(1.5, 1.2), (0.4, 0.3)])
def test_tracking_leads_the_fake_score_to_the_generator(form, mean, std):
    z, noise = balanced_noises(len(SIGMAS), torch.float64)
    query = make_query(1.0 + 0.8 * z, noise, SIGMAS)
    fake = LearnedGaussian(mean, std, torch.float64)
    loss = SgmdObjective(form=form).tracking_loss(query, fake(query.x_t, SIGMAS, query.text))
    grad_mean, grad_log_std = torch.autograd.grad(loss.value, [fake.mean, fake.log_std])
    assert grad_mean * (mean - 1.0) > 0
    assert grad_log_std * (std - 0.8) > 0


def test_the_affine_generator_is_the_gaussian_of_this_page():
    z, _ = balanced_noises(2, torch.float64)
    generator = AffineGenerator(1.2, 0.8, torch.float64)
    grid = FlowMatchSchedule().few_step_grid(1)
    x0 = rollout(generator, grid, z, torch.zeros(2, 1, 1), 0, keep_graph=False)
    torch.testing.assert_close(x0, 1.2 + 0.8 * z)
