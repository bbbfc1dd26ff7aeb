"""Agreement with vectors recorded from the authors' released trainer: tests/golden/README.md."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sgmd_core.objectives.fisher import fisher_loss, released_fisher_weight, teacher_residual
from sgmd_core.objectives.potentials import negative_residual_loss, released_residual_weight
from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.schedule import NUM_SCORE_LEVELS, FlowMatchSchedule, shift_sigma
from sgmd_core.types import per_sample, sample_mean
from tests.helpers.queries import make_query

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-5
EPS = SIGMA_FLOOR = 1e-8
CASES = {"A": 3, "B": 5, "D_zero_normalizer": 1, "E_tiny_sigma": 2, "F_fake_is_teacher": 1}
CASES_AND_SIGMAS = [(case, f"s{index}") for case, count in CASES.items() for index in range(count)]


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / name) as arrays:
        return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files}


@pytest.fixture(scope="module")
def losses():
    return load("sgmd_losses.npz")


@pytest.fixture(scope="module")
def scheduler():
    return load("scheduler.npz")


def assert_agrees(actual: torch.Tensor, recorded: torch.Tensor) -> None:
    scale = recorded.double().abs().max().item()
    difference = (actual.double() - recorded.double()).abs().max().item()
    assert actual.shape == recorded.shape
    assert difference <= TOLERANCE * scale, f"{difference} of {scale}"


def test_every_recorded_case_is_compared(losses):
    recorded = {tuple(key.split("/")[:2]) for key in losses if key.endswith("corr_loss")}
    assert recorded == set(CASES_AND_SIGMAS)


@pytest.mark.parametrize("case", CASES)
def test_fisher_term_and_its_gradient_agree(losses, case):
    generated, teacher = losses[f"{case}/generated"], losses[f"{case}/x_pred_teacher"]
    fake = losses[f"{case}/x_pred_fake"].clone().requires_grad_()
    normalizer = sample_mean((generated - teacher).abs())
    assert_agrees(normalizer, losses[f"{case}/normalizer"].reshape(-1))

    loss = fisher_loss(fake - teacher, released_fisher_weight(normalizer, EPS))
    assert_agrees(loss.detach(), losses[f"{case}/fisher_loss"])
    (gradient,) = torch.autograd.grad(loss, fake)
    assert_agrees(gradient, losses[f"{case}/fisher_grad_x_pred_fake"])


@pytest.mark.parametrize(("case", "level"), CASES_AND_SIGMAS)
def test_fake_correction_and_its_gradient_agree(losses, case, level):
    fake = losses[f"{case}/x_pred_fake"].clone().requires_grad_()
    weight = released_residual_weight(losses[f"{case}/{level}/sigma"], SIGMA_FLOOR)
    # The release calls the negative residual's opposite a correction and subtracts it.
    correction = -negative_residual_loss(losses[f"{case}/generated"] - fake, weight)
    assert_agrees(correction.detach(), losses[f"{case}/{level}/corr_loss"])
    (gradient,) = torch.autograd.grad(correction, fake)
    assert_agrees(gradient, losses[f"{case}/{level}/corr_grad_x_pred_fake"])


@pytest.mark.parametrize(("case", "level"), CASES_AND_SIGMAS)
def test_whole_generator_loss_and_its_gradient_agree(losses, case, level):
    generated, teacher = losses[f"{case}/generated"], losses[f"{case}/x_pred_teacher"]
    fake = losses[f"{case}/x_pred_fake"].clone().requires_grad_()
    fisher_weight = released_fisher_weight(sample_mean((generated - teacher).abs()), EPS)
    residual_weight = released_residual_weight(losses[f"{case}/{level}/sigma"], SIGMA_FLOOR)
    loss = fisher_loss(fake - teacher, fisher_weight)
    loss = loss + 0.1 * negative_residual_loss(generated - fake, residual_weight)
    assert_agrees(loss.detach(), losses[f"{case}/{level}/total_loss"])
    (gradient,) = torch.autograd.grad(loss, fake)
    assert_agrees(gradient, losses[f"{case}/{level}/total_grad_x_pred_fake"])


@pytest.mark.parametrize(
    ("case", "level"), [pair for pair in CASES_AND_SIGMAS if pair[0] in "A B D_zero_normalizer"]
)
def test_the_objective_agrees_when_it_is_given_velocities(losses, case, level):
    # The recorded predictions are turned into velocities in float64; the rounding of float32 at
    # small sigma would otherwise be that of the test and not of the objective.
    generated, teacher, fake = (
        losses[f"{case}/{name}"].double() for name in ("generated", "x_pred_teacher", "x_pred_fake")
    )
    sigma = losses[f"{case}/{level}/sigma"].double()
    if (sigma < 1e-3).any():
        pytest.skip("a velocity at this sigma holds too few digits of the prediction")
    noise = torch.randn(generated.shape, generator=torch.Generator().manual_seed(0)).double()
    query = make_query(generated, noise, sigma)
    schedule = FlowMatchSchedule()
    velocity_fake = schedule.velocity_from_x0(query.x_t, fake, sigma).requires_grad_()
    velocity_teacher = schedule.velocity_from_x0(query.x_t, teacher, sigma)
    loss = SgmdObjective().generator_loss(query, velocity_fake, velocity_teacher)
    (gradient,) = torch.autograd.grad(loss.value, velocity_fake)

    if case != "D_zero_normalizer":  # There the normaliser is rounding alone.
        residual = teacher_residual(query, velocity_teacher)
        assert_agrees(residual, losses[f"{case}/normalizer"].reshape(-1))
    assert_agrees(loss.value.detach(), losses[f"{case}/{level}/total_loss"])
    # The velocity enters a prediction with the factor -sigma, and so does the gradient.
    grad_x0_fake = -gradient / per_sample(sigma, gradient)
    assert_agrees(grad_x0_fake, losses[f"{case}/{level}/total_grad_x_pred_fake"])


@pytest.mark.parametrize("shift", [5.0, 8.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8, 50])
def test_few_step_grids_agree(scheduler, shift, num_steps):
    grid = FlowMatchSchedule(shift=shift).few_step_grid(num_steps)
    assert_agrees(grid, scheduler[f"infer/shift{shift:g}/n{num_steps}/sigmas"])
    assert_agrees(1000 * grid[:-1], scheduler[f"infer/shift{shift:g}/n{num_steps}/timesteps"])


def test_the_table_of_shifted_levels_agrees(scheduler):
    u = 1 - torch.arange(1000, dtype=torch.float64) / 1000
    assert_agrees(shift_sigma(u, 5.0), scheduler["table/shift5/sigmas"])


def test_warped_step_lists_are_our_grids_where_they_are_equally_spaced(scheduler):
    for steps in ("1000", "1000_500", "1000_750_500_250"):
        grid = FlowMatchSchedule(shift=5.0).few_step_grid(len(steps.split("_")))
        assert_agrees(grid[:-1], scheduler[f"warp/shift5/{steps}/sigmas"])


def test_the_score_law_agrees(scheduler):
    assert scheduler["score/shift5/draw_range"].tolist() == [0, NUM_SCORE_LEVELS]
    sigma = FlowMatchSchedule(shift=5.0).score_sigma(scheduler["score/u"])
    assert_agrees(sigma, scheduler["score/shift5/sigma"])


def test_noising_and_the_velocity_target_agree(scheduler):
    latent, noise = scheduler["ops/latent"], scheduler["ops/noise"]
    for index in range(3):
        sigma = scheduler[f"ops/add_noise/{index}/sigma"]
        x_t = FlowMatchSchedule().interpolate(latent, noise, sigma)
        assert_agrees(x_t, scheduler[f"ops/add_noise/{index}/xt"])
        assert_agrees(make_query(latent, noise, sigma).x_t, scheduler[f"ops/add_noise/{index}/xt"])
    assert_agrees(make_query(latent, noise, sigma).velocity, scheduler["ops/target"])


@pytest.mark.parametrize("shift", [5.0, 8.0])
def test_euler_steps_and_strides_to_x0_agree(scheduler, shift):
    latent, velocity = scheduler["ops/latent"], scheduler["ops/velocity"]
    sigmas = scheduler[f"ops/step/shift{shift:g}/sigmas"]
    for index in range(len(sigmas) - 1):
        step = latent + (sigmas[index + 1] - sigmas[index]) * velocity
        assert_agrees(step, scheduler[f"ops/step/shift{shift:g}/{index}/next"])
        sigma = sigmas[index].expand(len(latent))
        x0 = FlowMatchSchedule(shift=shift).x0_from_velocity(latent, velocity, sigma)
        assert_agrees(x0, scheduler[f"ops/step/shift{shift:g}/{index}/x0"])
