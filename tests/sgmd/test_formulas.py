"""Formulas as functions of the public interface: from explicit draws, in float64.

What docs/methods.md lists under "Formulas as functions", each written again here without them.
"""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sgmd
from tests.helpers.moves import assert_moves

SHAPE = (2, 3, 2, 4, 4)
DOCS = Path(__file__).parents[2] / "docs" / "methods.md"
TEXT = torch.zeros(2, 1, 1, dtype=torch.float64)


def drawn(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wide(levels: Tensor) -> Tensor:
    return levels.reshape(-1, 1, 1, 1, 1)


def levels(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def plain_step(x0: Tensor, x0_fake: Tensor, x0_teacher: Tensor, floor: float) -> Tensor:
    length = (x0 - x0_teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp(min=floor)
    return ((x0_fake - x0_teacher) / length).detach()


def plain_loss(x0: Tensor, step: Tensor) -> Tensor:
    return 0.5 * (x0 - (x0 - step).detach()).square().mean()


def test_the_page_lists_functions_that_are_public():
    section = DOCS.read_text().split("## Formulas as functions")[1].split("\n## ")[0]
    named = set(re.findall(r"`sgmd\.(\w+)", section))
    assert {"matching_direction", "interval_velocity", "extrapolated"} <= named
    assert named <= set(sgmd.__all__)


def test_each_function_that_the_page_lists_is_called_here():
    section = DOCS.read_text().split("## Formulas as functions")[1].split("\n## ")[0]
    rows = [line.split("|")[2] for line in section.splitlines() if line.startswith("|")]
    named = {name for row in rows for name in re.findall(r"`(?:sgmd\.)?(?:\w+\.)?(\w+)`", row)}
    assert {"few_step_grid", "guided_velocity"} <= named
    called = set(re.findall(r"\b(\w+)\(", Path(__file__).read_text()))
    assert named - called == {"anchor"}  # An attribute.


@pytest.mark.parametrize("floor", [0.0, 1e-4, 0.1, 3.0])
def test_distribution_matching_from_predictions_of_x0(floor):
    x0, noise, x0_fake, x0_teacher = (drawn(seed) for seed in range(4))
    sigma, leaf = levels(0.3, 0.9), x0.clone().requires_grad_()
    query = sgmd.NoisedBatch(leaf, sigma, noise, TEXT)
    fake, teacher = ((query.x_t - each) / wide(sigma) for each in (x0_fake, x0_teacher))
    direction = sgmd.matching_direction(query, fake, teacher, normalizer_min=floor)
    expected = plain_step(x0, x0_fake, x0_teacher, floor)
    assert_same(direction, expected)
    loss = sgmd.distribution_matching_loss(query, direction).value
    assert_same(loss, plain_loss(leaf, expected))
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert_same(gradient, expected / x0.numel())
    assert_same(
        sgmd.denoising_loss(query, fake).value, (fake - (noise - x0)).square().mean().detach()
    )


def test_cdm_off_the_trajectory_up_to_the_gradient_of_the_velocity():
    """The state beside the trajectory, the stride to x0', and the weight of a warm-up."""
    x_t, stored, noise, x0_fake, x0_teacher = (drawn(seed) for seed in range(5))
    sigma, start, looked = levels(0.9, 0.5), levels(0.4, 0.95), levels(0.6, 1.0)
    beside = sgmd.extrapolated(x_t, stored, sigma, start)
    assert_same(beside, x_t + wide(start - sigma) * stored)
    velocity = drawn(9).requires_grad_()
    own = beside - wide(start) * velocity
    key = sgmd.MicroBatchKey(iteration=50, micro_batch=0)
    query = sgmd.NoisedBatch(own, looked, noise, TEXT, key=key)
    fake, teacher = (((query.x_t - each) / wide(looked)).detach() for each in (x0_fake, x0_teacher))
    objective = sgmd.CdmObjective(
        guidance="joint", normalizer_min=0.0, off_trajectory=2.0, off_trajectory_warmup=200
    )
    loss = objective.off_trajectory_loss(query, fake, teacher).value
    step = plain_step(own.detach(), x0_fake, x0_teacher, 0.1)
    assert_same(loss, 0.5 * plain_loss(own, step))
    (gradient,) = torch.autograd.grad(loss, velocity)
    assert_same(gradient, -0.5 * wide(start) * step / step.numel())
    assert objective.off_trajectory_weight(0) == 0
    assert objective.off_trajectory_weight(500) == 2.0


def test_a_phase_is_matched_at_x0_through_noise_on_its_own_last_state():
    boundary, exit_sigma, sigma = 0.6, levels(1.0, 0.8), levels(0.7, 0.95)
    x_t, velocity, noise = drawn(0), drawn(1), drawn(2)
    x0 = (x_t - wide(exit_sigma) * velocity).requires_grad_()
    state = x_t + wide(boundary - exit_sigma) * velocity
    alpha = (1 - sigma) / (1 - boundary)
    beta = (sigma**2 - alpha**2 * boundary**2).sqrt()
    noised = wide(alpha) * state + wide(beta) * noise
    slope = (sigma + (1 - sigma) * boundary**2 / (1 - boundary) ** 2) / beta
    target = wide(slope) * noise - state / (1 - boundary)
    anchor_sigma = torch.full_like(sigma, boundary)
    assert_same(sgmd.interval_state(state, noise, sigma, anchor_sigma), noised)
    assert_same(sgmd.interval_velocity(state, noise, sigma, anchor_sigma), target)
    assert_moves({"velocity": target}, {"velocity": noise - state}, 1e-12)

    query = sgmd.NoisedBatch(
        x0, sigma, noise, TEXT, anchor=state, anchor_sigma=anchor_sigma, exit_sigma=exit_sigma
    )
    assert_same(query.x_t, noised)
    fake, teacher = drawn(3), drawn(4)
    step = plain_step(
        x0.detach(), noised - wide(sigma) * fake, noised - wide(sigma) * teacher, 1e-4
    )
    objective = sgmd.PhasedObjective()
    loss = objective.generator_loss(query, fake, teacher).value
    (gradient,) = torch.autograd.grad(loss, x0)
    assert_same(gradient, step / step.numel())
    tracking = objective.tracking_loss(query, fake).value
    assert_same(tracking, (fake - target).square().mean())


def test_levels_of_phases_are_the_trainers_whole_thousandths():
    schedule = sgmd.FlowMatchSchedule(shift=7.0)
    phases = sgmd.PhasedObjective(order="alternate").phases(schedule, 4)
    found = [phases.at(iteration) for iteration in range(4)]
    assert [each.levels for each in found] == [(520, 981), (520, 981), (520, 981), (20, 500)]
    assert [(each.first_exit, each.end) for each in found] == [(0, 2), (2, 4)] * 2
    raw = torch.arange(20, 981)
    u = raw.double() / 1000
    torch.testing.assert_close(schedule.table_sigma(raw), (7 * u / (1 + 6 * u)).float())
    assert float(schedule.table_sigma(torch.tensor([500]))) == pytest.approx(0.875)


def test_diversity_from_the_teachers_way():
    noise, shift, steps, after = drawn(0), 5.0, 6, 2

    def teacher(x_t: Tensor, sigma: Tensor, text: Tensor, /) -> Tensor:
        return 0.3 * x_t + wide(sigma) * (1 + text.reshape(-1, 1, 1, 1, 1))

    u = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    grid = [*(shift * u / (1 + (shift - 1) * u)).tolist(), 0.0]
    x, scale, text = noise, 3.0, TEXT + 1
    for here, then in pairwise(grid[: after + 1]):
        one = torch.full((2,), here, dtype=torch.float64)
        uncond, cond = teacher(x, one, 0 * text), teacher(x, one, text)
        x = x + (then - here) * (uncond + scale * (cond - uncond))
    own_grid = levels(*grid[: after + 1])
    anchor = sgmd.euler_sample(teacher, own_grid, noise, text, sgmd.Guidance(0 * text[:1], scale))
    assert_same(anchor, x)
    target = sgmd.anchor_velocity(noise, anchor, grid[after])
    assert_same(target, (noise - x) / (1 - grid[after]))
    velocity = drawn(5)
    assert_same(sgmd.diversity_loss(velocity, target), (velocity - target).square().mean())


def test_guidance_norms_and_step_lists():
    guided, conditional = 3 * drawn(0), drawn(1)
    lengths = [each.norm(dim=-1, keepdim=True) for each in (conditional, guided)]
    found = sgmd.renormalized(guided, conditional, "layer_norm")
    assert_same(found, guided * lengths[0] / lengths[1])
    found = sgmd.renormalized(guided, conditional, "scalar")
    assert_same(found, guided * min(1.0, float(conditional.norm() / guided.norm())))
    schedule = sgmd.FlowMatchSchedule(shift=5.0, steps=(1000, 900, 333))
    u = levels(1.0, 0.9, 0.333, 0.0)
    expected = sgmd.shift_sigma(u, 5.0)
    assert_same(expected, 5 * u / (1 + 4 * u))
    torch.testing.assert_close(schedule.generator_grid(3), expected.float())
    assert [schedule.raw_level(float(each)) for each in expected] == [1000, 900, 333, 0]


def test_noise_levels_of_samplers_and_scores():
    plain = sgmd.FlowMatchSchedule(shift=5.0, score_shift=3.0)
    u = levels(1.0, 0.75, 0.5, 0.25, 0.0)
    for found in (plain.few_step_grid(4), plain.generator_grid(4)):
        torch.testing.assert_close(found, (5 * u / (1 + 4 * u)).float())
    raw = torch.tensor([0, 3, 400, 950, 999])
    for function, u, ends in (
        (plain.score_sigma, raw.double() / 1000, (0.02, 0.98)),
        (plain.renoise_sigma, (raw.double() + 1) / 1000, (0.02, 1.0)),
    ):
        expected = (3 * u / (1 + 2 * u)).clamp(*ends)
        torch.testing.assert_close(function(raw), expected.float())
    renoised = sgmd.FlowMatchSchedule(score_law="renoise", score_shift=3.0)
    expected = plain.renoise_sigma(raw).clamp_max(0.98)
    torch.testing.assert_close(renoised.score_sigma(raw), expected)
    window = sgmd.FlowMatchSchedule(shift=5.0, score_window="both", score_level_min=20)
    assert window.score_levels(window.few_step_grid(4), 1) == (500, 750)
    assert window.score_levels() == (20, 1000)


def test_guidance_goes_from_the_negative_caption_through_the_caption():
    def model(x_t: Tensor, sigma: Tensor, text: Tensor, /) -> Tensor:
        return 0.5 * x_t * wide(sigma) + text.reshape(-1, 1, 1, 1, 1) * drawn(7)[:1]

    x_t, sigma = drawn(0), levels(0.3, 0.9)
    negative = torch.full((1, 1, 1), -0.5, dtype=torch.float64)
    uncond, cond = (model(x_t, sigma, each) for each in (negative.expand(2, 1, 1), TEXT + 1))
    for batched in (False, True):
        guidance = sgmd.Guidance(negative, 3.0, batched)
        found = sgmd.guided_velocity(model, x_t, sigma, TEXT + 1, guidance)
        assert_same(found, uncond + 3 * (cond - uncond))
    assert_moves({"velocity": uncond + 3 * (cond - uncond)}, {"velocity": cond}, 1e-12)


def test_a_rollout_from_given_noise_and_levels_of_each_sample():
    def model(x_t: Tensor, sigma: Tensor, text: Tensor, /) -> Tensor:
        return 0.5 * x_t + wide(sigma)

    grid = torch.stack([levels(1.0, 0.7, 0.2, 0.0), levels(1.0, 0.9, 0.5, 0.0)])
    x = noise = drawn(0)
    for step in range(2):
        x = x + wide(grid[:, step + 1] - grid[:, step]) * model(x, grid[:, step], TEXT)
    left = sgmd.rollout_exit(model, grid, noise, TEXT, 2, keep_graph=False)
    assert_same(left.x_t, x)
    assert_same(left.x0, x - wide(grid[:, 2]) * model(x, grid[:, 2], TEXT))
    query = sgmd.NoisedBatch(left.x0, levels(0.9, 0.8), noise, TEXT)
    low = sgmd.anchored(query, left, 0.1)
    assert low.anchor is not None
    assert_same(low.anchor, x + wide(0.1 - grid[:, 2]) * left.velocity)
    u = levels(0.25, 0.5).reshape(1, 2)
    found = sgmd.RandomSteps(2, 16, stratified=True).grid(u, 5.0)
    raw = levels(0.02 + 0.96 * 0.75, 0.02 + 0.96 * 0.125)
    inner = 5 * raw / (1 + 4 * raw)
    torch.testing.assert_close(found[0], levels(1.0, *inner.tolist(), 0.0).float())
