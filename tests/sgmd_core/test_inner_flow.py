"""Transitions: the inner flow against closed forms, its MeanFlow loss, and what they lead to."""

import math

import pytest
import torch
from torch import nn

from sgmd_core.errors import ConfigError
from sgmd_core.inner_flow import (
    average_velocity,
    inner_grid,
    inner_sample,
    inner_state,
    inner_update,
    model_at_step,
)
from sgmd_core.objectives.meanflow import MeanFlowTerm, Strides
from sgmd_core.rollout import euler_sample, rollout
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.seeds import derived_noise
from sgmd_core.types import per_sample
from sgmd_core.velocity import Guidance

STD = 0.6
SHAPE = (1, 1, 1, 1)


def variance(s):
    """Of y_s, where y ~ N(0, STD^2)."""
    return (1 - s) ** 2 * STD**2 + s**2


def exact_average(y_s, s, r):
    """Average velocity of the exact inner flow."""
    s, r = per_sample(s, y_s), per_sample(r, y_s)
    instant = y_s * (s - (1 - s) * STD**2) / variance(s)
    stride = y_s * (1 - (variance(r) / variance(s)).sqrt()) / (s - r)
    return torch.where(s == r, instant, stride)


def exact_head(y_s, s, r):
    gain = average_velocity(torch.ones_like(y_s), torch.zeros_like(y_s), s)
    return y_s - exact_average(y_s, s, r) / gain


def random_strides(count: int, seed: int = 0, *, share: float = 0.0, steps: int = 2) -> Strides:
    stream = torch.Generator().manual_seed(seed)
    y, noise = torch.randn(2, count, *SHAPE, generator=stream, dtype=torch.float64)
    draws = torch.rand(2, count, generator=stream, dtype=torch.float64)
    grid = inner_grid(steps, 10.0).double()
    s, r = MeanFlowTerm(instant_share=share, shift=1.0).levels(draws[0], draws[1], grid)
    return Strides(STD * y, noise, s, r)


class ScalarHead(nn.Module):
    """A small network of (y_s, s, r)."""

    def __init__(self):
        super().__init__()
        sizes = [(3, 48), (48, 48), (48, 1)]
        layers = [nn.Linear(*size, dtype=torch.float64) for size in sizes]
        self.net = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])

    def forward(self, y_s, s, r):
        inputs = torch.stack([y_s.flatten(), s, r], dim=1)
        return self.net(inputs).reshape(y_s.shape)


def term_loss(term: MeanFlowTerm, strides: Strides, head):
    """The term as a learner asks for it: two constants beside the answer at s."""
    _, below, above = strides.states
    low, high = strides.ends
    with torch.no_grad():
        ends = head(below, low, strides.r), head(above, high, strides.r)
    return term.loss(strides, head(strides.at(strides.s), strides.s, strides.r), *ends)


class TestTheFlow:
    def test_its_grid_has_equal_steps_before_a_shift_of_its_own(self):
        assert inner_grid(4, 1.0).tolist() == [1, 0.75, 0.5, 0.25, 0]
        assert inner_grid(2, 10.0).tolist() == pytest.approx([1, 10 / 11, 0])
        for steps, shift in ((0, 1.0), (2, 0.0)):
            with pytest.raises(ConfigError, match="inner flow"):
                inner_grid(steps, shift)

    def test_the_exact_average_velocity_leads_along_the_flow_in_any_number_of_steps(self):
        noise = torch.randn(5, *SHAPE, dtype=torch.float64)
        for steps in (1, 2, 5):
            found = inner_sample(exact_head, noise, inner_grid(steps, 10.0).double())
            torch.testing.assert_close(found, STD * noise, rtol=1e-6, atol=0)

    def test_a_stride_goes_against_its_average_velocity_and_the_whole_one_is_the_heads_answer(self):
        strides = random_strides(6)
        y_s = strides.at(strides.s)
        head = torch.randn_like(y_s)
        u = average_velocity(y_s, head, strides.s)
        found = inner_update(y_s, head, strides.s, strides.r)
        by_hand = y_s - per_sample(strides.s - strides.r, u) * u
        wrong = y_s + per_sample(strides.s - strides.r, u) * u
        assert (wrong - by_hand).abs().max() > 0.1
        torch.testing.assert_close(found, by_hand)
        one = torch.ones(6, dtype=torch.float64)
        assert torch.equal(inner_update(y_s, head, one, 0 * one), head)

    def test_a_head_that_ignores_its_state_leads_to_its_own_answer_to_the_bit(self):
        answer = torch.randn(3, *SHAPE)
        for steps in (1, 2, 4):
            grid = inner_grid(steps, 10.0)
            found = inner_sample(lambda *_: answer, torch.randn_like(answer), grid)
            assert torch.equal(found, answer)

    def test_below_one_half_the_gain_is_the_tangent_of_that_above(self):
        s = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64).requires_grad_()
        one = torch.ones(5, *SHAPE, dtype=torch.float64)
        gain = average_velocity(one, 0 * one, s).flatten()
        assert gain.tolist() == pytest.approx([4, 3, 2, 4 / 3, 1])
        (slope,) = torch.autograd.grad(gain.sum(), s)
        assert slope[:3].tolist() == pytest.approx([-4, -4, -4])

    def test_the_printed_form_would_lose_spread_where_ours_keeps_it(self):
        """Fit by u = y_1 - h, a head is the mean of E[y | y_tau] over the stride."""
        tau = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
        flowed = ((1 - tau) ** 2 + tau**2).sqrt()  # y_tau / y_1 where y ~ N(0, 1)
        printed = ((1 - tau) / flowed).mean().item()
        assert printed == pytest.approx(math.asinh(1) / math.sqrt(2), abs=1e-6)
        assert printed < 0.63
        noise = torch.ones(1, *SHAPE, dtype=torch.float64)
        found = inner_sample(exact_head, noise, inner_grid(1, 1.0).double())
        assert found.item() == pytest.approx(STD, rel=1e-9)


class TestMeanFlow:
    def test_without_strides_it_is_flow_matching_of_the_inner_path(self):
        strides, head = random_strides(32, share=1.0), ScalarHead()
        assert torch.equal(strides.s, strides.r)
        loss = term_loss(MeanFlowTerm(), strides, head)
        y_s = strides.at(strides.s)
        error = average_velocity(y_s, head(y_s, strides.s, strides.r), strides.s)
        error = (error - (strides.inner_noise - strides.y)).square().flatten(1).mean(dim=1)
        torch.testing.assert_close(loss.value, (error / (error.detach() + 1)).mean())
        assert loss.terms["stride_norm"] == 0

    def test_the_exact_flow_is_what_the_identity_holds_for(self):
        """u + (s - r) du/ds along the marginal velocity equals that velocity."""
        strides = random_strides(64)
        y_s, s, r = strides.at(strides.s), strides.s, strides.r
        assert (s - r).min() > 0
        instant = exact_average(y_s, s, s)
        u, derivative = torch.func.jvp(  # pyright: ignore[reportAssignmentType]
            lambda y, level: exact_average(y, level, r), (y_s, s), (instant, torch.ones_like(s))
        )
        moved = per_sample(s - r, u) * derivative
        assert moved.abs().max() > 0.1
        torch.testing.assert_close(u + moved, instant, rtol=1e-9, atol=1e-9)

    def test_its_difference_is_the_derivative_in_the_heads_own_level(self):
        strides, head = random_strides(64), ScalarHead()
        loss = term_loss(MeanFlowTerm(), strides, head)

        def average(y_s, s):
            return average_velocity(y_s, head(y_s, s, strides.r), s)

        tangents = strides.velocity, torch.ones_like(strides.s)
        primals = strides.at(strides.s), strides.s
        u, derivative = torch.func.jvp(average, primals, tangents)  # pyright: ignore
        moved = per_sample(strides.s - strides.r, u) * derivative
        assert moved.square().mean().sqrt() > 0.1
        torch.testing.assert_close(
            loss.terms["stride_norm"], moved.square().mean().sqrt(), rtol=2e-2, atol=0
        )

    def test_the_gradient_is_that_of_a_constant_target(self):
        strides, head = random_strides(8), ScalarHead()
        term = MeanFlowTerm(weight=3.0, offset=0.1)
        answer = head(strides.at(strides.s), strides.s, strides.r).detach().requires_grad_()
        low, high = answer.detach() - 0.1, answer.detach() + 0.2
        (gradient,) = torch.autograd.grad(term.loss(strides, answer, low, high).value, answer)
        u = average_velocity(strides.at(strides.s), answer, strides.s)
        first, last = strides.ends
        ends = [
            average_velocity(strides.at(level), value, level)
            for level, value in ((first, low), (last, high))
        ]
        slope = (ends[1] - ends[0]) / per_sample(last - first, u)
        apart = u - strides.velocity + per_sample(strides.s - strides.r, u) * slope
        scale = 3.0 / len(apart) / per_sample(apart.flatten(1).square().mean(dim=1) + 0.1, u)
        gain = average_velocity(torch.ones_like(u), torch.zeros_like(u), strides.s)
        expected = scale * 2 * apart * -gain
        torch.testing.assert_close(gradient, expected.detach())

    @pytest.mark.slow
    def test_a_head_that_learns_by_it_makes_one_step_as_good_as_many(self):
        torch.manual_seed(0)
        head, term = ScalarHead(), MeanFlowTerm(instant_share=0.5, shift=1.0, offset=0.1)
        optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
        for step in range(900):
            for group in optimizer.param_groups:
                group["lr"] = 5e-3 * (1 - step / 900)
            optimizer.zero_grad()
            strides = random_strides(1024, step + 1, share=0.5, steps=1)
            term_loss(term, strides, head).value.backward()
            optimizer.step()
        noise = torch.linspace(-1.2, 1.2, 7, dtype=torch.float64).reshape(-1, *SHAPE)
        with torch.no_grad():
            for s in (0.3, 0.6, 1.0):
                level = torch.full((7,), s, dtype=torch.float64)
                y_s = noise * variance(torch.tensor(s)).sqrt()
                found = average_velocity(y_s, head(y_s, level, 0 * level), level)
                assert (found - exact_average(y_s, level, 0 * level)).abs().max() < 0.12
            one = inner_sample(head, noise, inner_grid(1, 1.0).double())
        assert (one - STD * noise).abs().max() < 0.08

    def test_strides_reach_to_the_next_level_of_the_grid_or_nowhere(self):
        grid = inner_grid(2, 10.0).double()
        uniform = torch.linspace(0, 1, 101, dtype=torch.float64)
        term = MeanFlowTerm()
        s, r = term.levels(uniform, torch.ones(101, dtype=torch.float64), grid)
        assert (s[0], s[-1]) == (0, 1)
        inside = s < 10 / 11
        assert torch.equal(r[inside], torch.zeros(int(inside.sum()), dtype=torch.float64))
        assert r[~inside][:-1].tolist() == pytest.approx([10 / 11] * int((~inside).sum() - 1))
        same, none = term.levels(uniform, torch.zeros(101, dtype=torch.float64), grid)
        assert torch.equal(same, none)

    @pytest.mark.parametrize("setting", [{"instant_share": 1.1}, {"shift": 0.0}, {"offset": -1.0}])
    def test_other_numbers_are_refused(self, setting):
        with pytest.raises(ConfigError, match=next(iter(setting))):
            MeanFlowTerm(**setting)


class SampledVelocity(nn.Module):
    """Exact transition of x0 ~ N(1, STD^2): a sample of noise - x0 given x_t."""

    inner_steps = 1

    def forward(self, x_t, sigma, text, inner_noise):
        sigma = per_sample(sigma, x_t)
        alpha = 1 - sigma
        total = alpha**2 * STD**2 + sigma**2
        mean = sigma / total * (x_t - alpha) - 1 - alpha * STD**2 / total * (x_t - alpha)
        return mean + STD / total.sqrt() * inner_noise


class TestTheOuterStep:
    def test_both_ways_to_clean_latents_have_the_mean_of_data_and_one_has_their_spread(self):
        stream = torch.Generator().manual_seed(0)
        x0, x1, inner = torch.randn(3, 400_000, *SHAPE, generator=stream, dtype=torch.float64)
        x0 = 1 + STD * x0
        sigma = torch.full((len(x0),), 0.7, dtype=torch.float64)
        x_t = 0.3 * x0 + 0.7 * x1
        y = SampledVelocity()(x_t, sigma, None, inner)
        # From its own state, and from noised data, whose noise is known: from x_t that would mix
        # in a part of the data that were noised.
        own, of_data = x_t - per_sample(sigma, x_t) * y, x1 - y
        assert own.mean().item() == pytest.approx(1, abs=5e-3)
        assert of_data.mean().item() == pytest.approx(1, abs=1e-2)
        assert own.std().item() == pytest.approx(STD, rel=5e-3)
        # The known noise does not belong to the sample of y.
        assert of_data.std().item() > 1.1 * STD

    def test_exact_transitions_keep_the_law_of_data_in_any_number_of_steps(self):
        noise = torch.randn(4000, 1, 1, 1, 1, generator=torch.Generator().manual_seed(1))
        text = torch.zeros(4000, 1, 1)
        for steps in (1, 2):
            grid = FlowMatchSchedule(shift=5.0).few_step_grid(steps)
            made = euler_sample(SampledVelocity(), grid, noise, text)
            assert made.mean().item() == pytest.approx(1, abs=0.05)
            assert made.std().item() == pytest.approx(STD, rel=0.05)

    def test_inner_noise_is_drawn_from_the_initial_one_for_each_sample_and_step(self):
        noise = torch.randn(3, 1, 2, 2, 2, generator=torch.Generator().manual_seed(2))
        text, model = torch.zeros(3, 1, 1), SampledVelocity()
        grid = FlowMatchSchedule(shift=5.0).few_step_grid(3)
        whole = euler_sample(model, grid, noise, text)
        parts = [euler_sample(model, grid, one, text[:1]) for one in noise.split(1)]
        assert torch.equal(whole, torch.cat(parts))
        left = rollout(model, grid, noise, text, 2, keep_graph=False)
        torch.testing.assert_close(left, whole)
        state, sigma = torch.zeros(3, 1, 2, 2, 2), torch.full((3,), 0.5)
        steps = [model_at_step(model, noise, step)(state, sigma, text) for step in (0, 1)]
        assert not torch.equal(*steps)
        assert not torch.equal(derived_noise(noise, 0), derived_noise(noise, 0, 1))

    def test_guidance_asks_both_captions_with_one_inner_noise(self):
        noise = torch.randn(2, 1, 2, 2, 2, generator=torch.Generator().manual_seed(3))
        text, negative = torch.zeros(2, 1, 1), torch.zeros(1, 1, 1)
        grid, model = FlowMatchSchedule().few_step_grid(2), SampledVelocity()
        plain = euler_sample(model, grid, noise, text)
        guided = euler_sample(model, grid, noise, text, Guidance(negative, 3.0))
        torch.testing.assert_close(guided, plain)

    def test_a_velocity_model_is_asked_as_ever(self):
        def model(x_t, sigma, text):
            return x_t

        assert model_at_step(model, torch.zeros(1, *SHAPE), 0) is model


def test_the_gradient_of_an_unrolled_head_is_that_of_finite_differences():
    """Backbone and head, through every inner step, to the outer sample."""
    torch.manual_seed(0)
    head, backbone = ScalarHead(), nn.Linear(1, 1, dtype=torch.float64)
    x_t, inner = torch.randn(2, 4, *SHAPE, dtype=torch.float64)
    sigma = torch.full((4,), 0.8, dtype=torch.float64)

    def outer_x0():
        features = backbone(x_t)

        def answer(y_s, s, r):
            return head(y_s + features, s, r)

        y = inner_sample(answer, inner, inner_grid(3, 10.0).double())
        return (x_t - per_sample(sigma, x_t) * y).square().sum()

    parameters = [*backbone.parameters(), *head.parameters()]
    gradients = torch.autograd.grad(outer_x0(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        at = int(gradient.abs().argmax())
        values = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                parameter.view(-1)[at] += step
                values.append(outer_x0().item())
        with torch.no_grad():
            parameter.view(-1)[at] += 1e-5
        assert gradient.view(-1)[at].item() == pytest.approx(
            (values[0] - values[1]) / 2e-5, rel=1e-6
        )


def test_inner_states_go_from_the_sample_to_the_noise():
    y, noise = torch.randn(2, 3, *SHAPE)
    assert torch.equal(inner_state(y, noise, torch.zeros(3)), y)
    assert torch.equal(inner_state(y, noise, torch.ones(3)), noise)
