"""Other numbers of steps than trained on, where every law is a Gaussian and known in closed form.

The generator's velocity is a line in x_t whose two coefficients are free at each noise level, so it
knows the levels that rollouts visit and no others. What it makes of noise z is slope * z + offset,
in any number of steps; the fake score is the exact one of that very law.
"""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from pipelines.config.recipe import load_recipe
from sgmd_core.objectives.cdm import CdmObjective
from sgmd_core.rollout import euler_sample, rollout_exit
from sgmd_core.schedule import FlowMatchSchedule, RandomSteps
from sgmd_core.seeds import RolloutRule, draw
from sgmd_core.types import MicroBatchKey, NoisedBatch
from sgmd_core.worlds.gaussian import gaussian_velocity
from tests.helpers.noises import balanced_noises

MEAN, STD = torch.tensor([0.7]), torch.tensor([0.5])
NOISES = balanced_noises(1, torch.float32)
NO_TEXT = torch.zeros(1, 1, 1)
LEVELS = 20


class LinearGenerator(nn.Module):
    """Velocity slope(sigma) * x_t + offset(sigma); both straight between levels, 0 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2, LEVELS + 1))

    def forward(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Predicts the velocity at `x_t`."""
        place = sigma * LEVELS
        below = place.long().clamp(max=LEVELS - 1)
        share = place - below
        both = (1 - share) * self.table[:, below] + share * self.table[:, below + 1]
        slope, offset = both.reshape(2, -1, 1, 1, 1, 1)
        return slope * x_t + offset


def law(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread, exact because the noise is balanced."""
    return samples.mean().reshape(1), samples.std(correction=0).reshape(1)


def errors(
    objective: CdmObjective, schedule: FlowMatchSchedule, random_steps: RandomSteps | None
) -> dict[int, float]:
    """Trains a generator; |mean - truth| + |spread - truth| by number of sampler's steps."""
    noise, score_noise = NOISES
    generator = LinearGenerator()
    optimizer = torch.optim.Adam(generator.parameters(), lr=0.05, betas=(0.0, 0.999))
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for iteration in range(600):
        key, shape = MicroBatchKey(iteration, 0), (1, 1, 1, 1)
        draws = draw(0, key, (0,), shape, schedule, 4, RolloutRule(random_steps=random_steps))
        grid = schedule.generator_grid(4) if draws.grid is None else draws.grid
        left = rollout_exit(generator, grid, noise, NO_TEXT, draws.exit_step, keep_graph=True)
        query = NoisedBatch(left.x0, draws.sigma, score_noise, NO_TEXT)
        x_t, own = query.x_t.detach(), law(left.x0.detach())
        scores = [gaussian_velocity(x_t, draws.sigma, *each) for each in (own, (MEAN, STD))]
        optimizer.zero_grad()
        objective.generator_loss(query, *scores).value.backward()
        optimizer.step()
        rates.step()
    found = dict[int, float]()
    for num_steps in (1, 2, 3, 4, 6, 8):
        samples = euler_sample(generator, schedule.few_step_grid(num_steps), noise, NO_TEXT)
        mean, std = law(samples)
        found[num_steps] = float((mean - MEAN).abs() + (std - STD).abs())
    return found


@pytest.mark.slow
def test_rollouts_of_random_length_teach_step_counts_that_the_fixed_grid_does_not() -> None:
    """Without the loss off the trajectory, so the schedule of `tiny-cdm` is all that differs."""
    config = load_recipe("tiny-cdm", ["objective.off_trajectory=0.0"])
    assert isinstance(config.objective, CdmObjective)
    schedule = dataclasses.replace(config.schedule, shift=1.0)
    cdm = errors(config.objective, schedule, config.generator.random_steps)
    fixed = errors(config.objective, schedule, None)
    # Where it starts: the error of noise itself, 0.7 in the mean and 0.5 in the spread.
    assert cdm[4] < 0.15
    for num_steps in (2, 3, 6, 8):
        assert cdm[num_steps] < cdm[4] + 0.05
    # The fixed grid is closer in its own steps, and hardly better than noise in others.
    assert max(fixed[4], fixed[2], fixed[1]) == pytest.approx(0, abs=0.02)
    assert min(fixed[3], fixed[6], fixed[8]) > 3 * max(cdm[3], cdm[6], cdm[8])
