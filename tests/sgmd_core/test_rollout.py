import pytest
import torch
from torch import nn

from sgmd_core.errors import ConfigError
from sgmd_core.rollout import euler_sample, rollout
from sgmd_core.schedule import FlowMatchSchedule, RandomSteps
from sgmd_core.seeds import derived_noise
from sgmd_core.velocity import Guidance
from sgmd_core.worlds.gaussian import GaussianVelocity, gaussian_text

GRID = FlowMatchSchedule(shift=5.0).few_step_grid(4)
TEXT = torch.zeros(2, 1, 1)


class RecordingModel(nn.Module):
    """Predicts one velocity per noise level, and notes what it was asked."""

    def __init__(self):
        super().__init__()
        self.velocities = nn.Parameter(torch.arange(4.0) + 1)
        self.calls = []

    def forward(self, x_t, sigma, text):
        self.calls.append((sigma.tolist(), torch.is_grad_enabled(), x_t.requires_grad))
        step = (GRID[:-1] == sigma[0]).nonzero().item()
        return self.velocities[step].expand(x_t.shape)


@pytest.fixture
def noise():
    return torch.randn(2, 1, 2, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("exit_step", range(4))
def test_the_gradient_of_x0_is_minus_sigma_at_the_exit_step_and_nothing_before(noise, exit_step):
    model = RecordingModel()
    x0 = rollout(model, GRID, noise, TEXT, exit_step, keep_graph=True)
    x0.mean().backward()
    expected = torch.zeros(4)
    expected[exit_step] = -GRID[exit_step]
    torch.testing.assert_close(model.velocities.grad, expected)


@pytest.mark.parametrize("exit_step", range(4))
def test_only_the_exit_pass_is_recorded_and_it_starts_from_a_constant(noise, exit_step):
    model = RecordingModel()
    rollout(model, GRID, noise, TEXT, exit_step, keep_graph=True)
    assert [recorded for _, recorded, _ in model.calls] == [False] * exit_step + [True]
    assert not any(attached for _, _, attached in model.calls)
    assert [levels for levels, _, _ in model.calls] == [
        [level.item()] * 2 for level in GRID[: exit_step + 1]
    ]


def test_a_rollout_without_a_graph_records_nothing_and_makes_the_same_latents(noise):
    model = RecordingModel()
    without = rollout(model, GRID, noise, TEXT, 2, keep_graph=False)
    assert not without.requires_grad
    assert not any(recorded for _, recorded, _ in model.calls)
    assert torch.equal(without, rollout(model, GRID, noise, TEXT, 2, keep_graph=True).detach())


def test_the_graph_does_not_depend_on_the_callers_gradient_mode(noise):
    with torch.no_grad():
        x0 = rollout(RecordingModel(), GRID, noise, TEXT, 3, keep_graph=True)
    assert x0.requires_grad


def test_a_rollout_follows_the_euler_steps_by_hand(noise):
    v1, v2, v3 = 1.0, 2.0, 3.0
    s1, s2, s3 = GRID[:3].tolist()
    x0 = rollout(RecordingModel(), GRID, noise, TEXT, 2, keep_graph=False)
    by_hand = noise + (s2 - s1) * v1 + (s3 - s2) * v2 - s3 * v3
    torch.testing.assert_close(x0, by_hand)


def test_leaving_at_the_last_step_equals_sampling_to_the_bit(noise):
    mean, std = torch.tensor([1.0, -1.0]), torch.tensor([0.5, 2.0])
    text = gaussian_text(mean, std)
    rolled = rollout(GaussianVelocity(), GRID, noise, text, 3, keep_graph=False)
    assert torch.equal(rolled, euler_sample(GaussianVelocity(), GRID, noise, text))


def test_sampling_converges_to_the_exact_flow_at_first_order():
    noise = torch.randn(2, 1, 2, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    mean, std = torch.tensor([1.0, -1.0]).double(), torch.tensor([0.5, 2.0]).double()
    # The flow of a Gaussian keeps each element at the same number of standard deviations.
    exact = mean.view(2, 1, 1, 1, 1) + std.view(2, 1, 1, 1, 1) * noise
    errors = []
    for num_steps in (40, 80, 160):
        grid = FlowMatchSchedule(shift=1.0).few_step_grid(num_steps)
        x0 = euler_sample(GaussianVelocity(), grid, noise, gaussian_text(mean, std))
        assert x0.dtype == torch.float64
        errors.append((x0 - exact).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


def test_guidance_of_a_shifted_gaussian_shifts_the_samples():
    # Two Gaussians of one spread differ by a constant velocity, so guidance moves the mean alone.
    noise = torch.randn(1, 1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    grid = FlowMatchSchedule().few_step_grid(8)
    one = torch.ones(1).double()
    guided = euler_sample(
        GaussianVelocity(),
        grid,
        noise,
        gaussian_text(one, one),
        Guidance(gaussian_text(0 * one, one), 3.0),
    )
    direct = euler_sample(GaussianVelocity(), grid, noise, gaussian_text(3 * one, one))
    torch.testing.assert_close(guided, direct)


def test_sampling_tells_how_far_it_is(noise):
    done = []
    euler_sample(RecordingModel(), GRID, noise, TEXT, on_step=done.append)
    assert done == [1, 2, 3, 4]


@pytest.mark.parametrize("exit_step", [-1, 4])
def test_an_exit_step_outside_the_grid_is_refused(noise, exit_step):
    with pytest.raises(ConfigError, match=f"exit step {exit_step} of a grid of 4 steps"):
        rollout(RecordingModel(), GRID, noise, TEXT, exit_step, keep_graph=False)


def consistent(x_t, sigma, text):
    """Velocity to the end of the exact probability-flow path of N(0, 0.5^2)."""
    std, level = 0.5, sigma.reshape(-1, 1, 1, 1, 1)
    d = ((1 - level).square() * std**2 + level.square()).sqrt()
    return (x_t - std / d * x_t) / level


class TestRenoising:
    def test_a_consistency_function_keeps_the_spread_of_the_data_and_euler_steps_widen_it(self):
        start = torch.randn(64, 1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        text = torch.zeros(64, 1, 1)
        plain = euler_sample(consistent, GRID, start, text)
        anew = euler_sample(consistent, GRID, start, text, renoise=True)
        assert plain.std().item() > 0.6
        assert anew.std().item() == pytest.approx(0.5, rel=0.01)

    def test_a_rollout_is_what_the_sampler_does_on_the_same_steps(self, noise):
        whole = euler_sample(consistent, GRID, noise, TEXT, renoise=True)
        last = rollout(consistent, GRID, noise, TEXT, 3, keep_graph=False, renoise=True)
        torch.testing.assert_close(last, whole)
        other = rollout(consistent, GRID, noise, TEXT, 3, keep_graph=False)
        assert (other - whole).abs().max() > 0.1

    def test_samples_do_not_depend_on_how_a_batch_is_split(self, noise):
        whole = euler_sample(consistent, GRID, noise, TEXT, renoise=True)
        parts = [
            euler_sample(consistent, GRID, one, TEXT[:1], renoise=True) for one in noise[:, None]
        ]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)

    def test_the_noise_of_every_step_is_its_own(self, noise):
        draws = [derived_noise(noise, step) for step in range(2)]
        assert (draws[0] - draws[1]).abs().min() > 0
        assert abs(derived_noise(torch.zeros(1, 1, 8, 64, 64), 0).std().item() - 1) < 0.02

    def test_only_samplers_without_guidance_renoise(self):
        assert FlowMatchSchedule(renoise=True).renoises(1.0)
        assert not FlowMatchSchedule(renoise=True).renoises(3.0)
        assert not FlowMatchSchedule().renoises(1.0)


def test_a_running_minimum_takes_the_levels_as_they_come():
    u = torch.tensor([[0.5, 0.9, 0.1], [0.2, 0.1, 0.8]])
    steps = {
        "min_steps": 4,
        "max_steps": 4,
        "shifted": False,
        "sigma_min": 1e-9,
        "sigma_max": 1 - 1e-9,
    }
    running = RandomSteps(**steps, order="running_minimum").grid(u, 1.0)
    expected = torch.tensor([[1, 0.5, 0.5, 0.1, 0], [1, 0.2, 0.1, 0.1, 0]])
    torch.testing.assert_close(running, expected)
    assert RandomSteps(order="running_minimum").grid(u[:, :0], 1.0).tolist() == [[1, 0], [1, 0]]
