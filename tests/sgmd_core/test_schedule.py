import pytest
import torch

from sgmd_core.errors import ConfigError
from sgmd_core.schedule import NUM_SCORE_LEVELS, FlowMatchSchedule, shift_sigma

SHIFTED_FOUR_STEPS = {
    5.0: (1000, 937.5, 833.3, 625),
    7.0: (1000, 954.5, 875, 700),
    8.0: (1000, 960, 888.9, 727.3),
    10.0: (1000, 967.7, 909.1, 769.2),
}
SHIFTED_THREE_STEPS = {
    5.0: (1000, 909, 714),
    7.0: (1000, 933, 778),
    8.0: (1000, 941, 800),
    10.0: (1000, 952, 833),
}


@pytest.fixture
def latents() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 2, 3, 4, 5, dtype=torch.float64, generator=generator)
    return x0, noise, torch.tensor([0.02, 0.5, 0.98], dtype=torch.float64)


@pytest.mark.parametrize(
    ("shift", "expected", "tolerance"),
    [(shift, levels, 0.05) for shift, levels in SHIFTED_FOUR_STEPS.items()]
    + [(shift, levels, 0.5) for shift, levels in SHIFTED_THREE_STEPS.items()],
)
def test_few_step_grids_agree_with_the_published_lists(shift, expected, tolerance):
    grid = FlowMatchSchedule(shift=shift).few_step_grid(len(expected))
    # Half a unit of the last digit that the list gives, and a float32 rounding.
    torch.testing.assert_close(
        1000 * grid[:-1], torch.tensor(expected).float(), atol=tolerance * 1.01, rtol=0
    )


@pytest.mark.parametrize("shift", [0.3, 1.0, 5.0, 17.1])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 50])
def test_a_grid_falls_from_exactly_pure_noise_to_exactly_data(num_steps, shift):
    grid = FlowMatchSchedule(shift=shift).few_step_grid(num_steps)
    assert grid.shape == (num_steps + 1,)
    assert grid[0] == 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()
    assert grid.dtype == torch.float32


def test_a_shift_keeps_both_ends_and_a_shift_of_one_keeps_everything():
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(shift_sigma(u, 1.0), u, atol=0, rtol=0)
    for shift in (0.3, 5.0, 17.0):
        assert shift_sigma(u, shift)[[0, -1]].tolist() == pytest.approx([0, 1], abs=1e-15)
        # The inverse map is a shift by the inverse.
        torch.testing.assert_close(shift_sigma(shift_sigma(u, shift), 1 / shift), u)


def test_x0_survives_noising_and_denoising(latents):
    x0, noise, sigma = latents
    schedule = FlowMatchSchedule()
    x_t = schedule.interpolate(x0, noise, sigma)
    torch.testing.assert_close(
        schedule.x0_from_velocity(x_t, noise - x0, sigma), x0, atol=1e-14, rtol=0
    )


def test_velocity_survives_the_way_over_x0(latents):
    x0, noise, sigma = latents
    schedule = FlowMatchSchedule()
    x_t = schedule.interpolate(x0, noise, sigma)
    velocity = schedule.velocity_from_x0(x_t, x0, sigma)
    # Dividing by sigma = 0.02 multiplies rounding by 50.
    torch.testing.assert_close(velocity, noise - x0, atol=1e-13, rtol=0)
    back = schedule.x0_from_velocity(x_t, velocity, sigma)
    torch.testing.assert_close(back, x0, atol=1e-14, rtol=0)


def test_the_path_starts_at_data_and_ends_at_noise(latents):
    x0, noise, _ = latents
    schedule = FlowMatchSchedule()
    torch.testing.assert_close(schedule.interpolate(x0, noise, torch.zeros(3).double()), x0)
    torch.testing.assert_close(schedule.interpolate(x0, noise, torch.ones(3).double()), noise)


def test_the_released_score_law_gathers_draws_at_its_limits():
    sigma = FlowMatchSchedule(shift=5.0).score_sigma(torch.arange(NUM_SCORE_LEVELS))
    assert sigma.dtype == torch.float32
    assert sigma.min() == torch.tensor(0.02)
    assert sigma.max() == torch.tensor(0.98)
    assert (sigma == sigma.max()).double().mean().item() == 0.092
    assert (sigma == sigma.min()).double().mean().item() == 0.005
    assert sigma.mean().item() == pytest.approx(0.746, abs=5e-4)


@pytest.mark.parametrize(("shift", "mean"), [(3.0, 0.675), (5.0, 0.746), (8.0, 0.801)])
def test_the_score_law_may_have_a_shift_of_its_own(shift, mean):
    u = torch.arange(NUM_SCORE_LEVELS)
    own = FlowMatchSchedule(shift=2.0, score_shift=shift).score_sigma(u)
    torch.testing.assert_close(own, FlowMatchSchedule(shift=shift).score_sigma(u))
    assert own.mean().item() == pytest.approx(mean, abs=5e-4)


@pytest.mark.parametrize(
    "setting",
    [
        {"shift": 0.0},
        {"shift": float("nan")},
        {"score_shift": -1.0},
        {"score_sigma_min": 0.0},
        {"score_sigma_max": 1.0},
        {"score_sigma_min": 0.9, "score_sigma_max": 0.1},
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused_by_name(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        FlowMatchSchedule(**setting)


def test_a_grid_needs_a_step():
    with pytest.raises(ConfigError, match="0 steps"):
        FlowMatchSchedule().few_step_grid(0)
