"""SGMD from end to end where the answer is known: one-step generator, Gaussian teacher."""

import math

import pytest
import torch

from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.rollout import rollout
from sgmd_core.schedule import NUM_SCORE_LEVELS, FlowMatchSchedule
from sgmd_core.seeds import draw
from sgmd_core.types import MicroBatchKey, detached
from sgmd_core.worlds.gaussian import (
    AffineGenerator,
    GaussianVelocity,
    LearnedGaussian,
    gaussian_text,
    x0_gain,
)
from tests.helpers.queries import make_query

MEAN, STD = 0.7, 0.5
BATCH = 32
LATENT_SHAPE = (1, 1, 4, 4)


def distil(objective: SgmdObjective, num_iterations: int) -> tuple[float, float]:
    """Shared tracking, as in the paper's Algorithm 1; both learners start away from the teacher.

    Returns:
        Mean and spread of the generator, averaged over the last quarter of the iterations.
    """
    schedule = FlowMatchSchedule()
    grid = schedule.few_step_grid(1)
    text = gaussian_text(torch.full((BATCH,), MEAN), torch.full((BATCH,), STD))
    teacher, generator, fake = (
        GaussianVelocity(),
        AffineGenerator(0.0, 1.0),
        LearnedGaussian(0.0, 1.0),
    )
    betas, settled = (0.0, 0.999), []
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-2, betas=betas)
    fake_optimizer = torch.optim.Adam(fake.parameters(), lr=4e-2, betas=betas)
    for iteration in range(num_iterations):
        key = MicroBatchKey(iteration, 0)
        draws = draw(0, key, range(BATCH), LATENT_SHAPE, schedule, num_steps=1)
        x0 = rollout(generator, grid, draws.initial_noise, text, draws.exit_step, keep_graph=True)
        query = make_query(x0, draws.noise, draws.sigma, text)
        query = detached(query, x0=x0.detach().requires_grad_())
        velocity_fake = fake(query.x_t, query.sigma, text)
        velocity_teacher = teacher(query.x_t, query.sigma, text)
        loss = objective.generator_loss(query, velocity_fake, velocity_teacher)
        (grad_x0,) = torch.autograd.grad(loss.value, query.x0, retain_graph=True)
        fake_optimizer.zero_grad()
        objective.tracking_loss(query, velocity_fake).value.backward(inputs=list(fake.parameters()))
        generator_optimizer.zero_grad()
        x0.backward(grad_x0)
        generator_optimizer.step()
        fake_optimizer.step()
        settled.append((generator.mean.item(), generator.std.item()))
    tail = torch.tensor(settled[-num_iterations // 4 :])
    return tuple(tail.mean(dim=0).tolist())


@pytest.mark.slow
def test_fisher_alone_recovers_the_teachers_mean_and_spread():
    mean, std = distil(SgmdObjective(lambda_nr=0.0), num_iterations=240)
    assert mean == pytest.approx(MEAN, abs=0.02)
    assert std == pytest.approx(STD, abs=0.02)


@pytest.mark.slow
def test_the_negative_residual_narrows_the_spread_by_as_much_as_theory_says():
    expected = settled_std(lambda_nr=0.1)
    assert expected == pytest.approx(0.457, abs=5e-4)
    mean, std = distil(SgmdObjective(lambda_nr=0.1), num_iterations=240)
    assert mean == pytest.approx(MEAN, abs=0.02)
    assert std == pytest.approx(expected, abs=0.01)


def settled_std(lambda_nr: float) -> float:
    """Where the released loss stops changing the spread, if the fake score is exact.

    The derivative by the spread a, with the gap and the residual of test_gaussian_truth.py and the
    mean distance to the teacher n for latents of many elements, averaged over the score law, is

        alpha k_a [ (k_a - k_s) alpha a / n + lambda / sigma (1 - alpha k_a) a ]
    """
    sigma = FlowMatchSchedule().score_sigma(torch.arange(NUM_SCORE_LEVELS)).double()
    alpha, teacher = 1 - sigma, x0_gain(sigma, torch.full_like(sigma, STD))

    def slope(a: float) -> float:
        fake = x0_gain(sigma, torch.full_like(sigma, a))
        distance_std = ((a * (1 - alpha * teacher)) ** 2 + (teacher * sigma) ** 2).sqrt()
        fisher = (fake - teacher) * alpha * a / (distance_std * math.sqrt(2 / math.pi))
        negative_residual = lambda_nr / sigma * (1 - alpha * fake) * a
        return (alpha * fake * (fisher + negative_residual)).mean().item()

    low, high = 0.1, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return low
