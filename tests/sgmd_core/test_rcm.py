"""rCM and sCM: the wrapped network, the tangent against closed forms, and what training reaches."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from sgmd_core.errors import ConfigError
from sgmd_core.objectives.consistency import (
    ConsistencyTerm,
    consistency_loss,
    consistency_of,
    consistency_tangent,
)
from sgmd_core.objectives.dmd import DmdObjective
from sgmd_core.objectives.rcm import RcmObjective
from sgmd_core.schedule import FlowMatchSchedule, RandomSteps
from sgmd_core.trigflow import (
    direction_weight,
    sigma_of_time,
    trig_state,
    trig_time,
    trig_velocity,
)
from sgmd_core.types import MicroBatchKey, NoisedBatch, TextBatch, per_sample
from sgmd_core.worlds.gaussian import gaussian_velocity
from tests.helpers.moves import assert_moves, relative_error
from tests.helpers.queries import make_query
from tests.helpers.small_network import SmallNetwork, predict, random_query, with_leaf
from workers.fake_score_tracker import FakeScoreTracker
from workers.generator_learner import GeneratorLearner
from workers.generator_task import GeneratorTask
from workers.score_teacher import ScoreTeacher
from workers.settings import FakeScoreSettings, GeneratorSettings, TeacherSettings

TIMES = torch.tensor([0.2, 0.7, 1.3, 1.5], dtype=torch.float64)
STD = 0.5
MATCHING_ALONE = RcmObjective(consistency=ConsistencyTerm(weight=0.0))


def query_at(t: torch.Tensor, seed: int = 0) -> NoisedBatch:
    stream = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, len(t), 1, 2, 2, 2, generator=stream, dtype=torch.float64)
    return make_query(STD * x0, noise, sigma_of_time(t))


def consistent(x_t, sigma, text):
    """Velocity whose x0 is the end of the exact probability-flow path of N(0, STD^2)."""
    t = trig_time(sigma)
    variance = per_sample(STD**2 * t.cos().square() + t.sin().square(), x_t)
    return (x_t - STD * trig_state(x_t, t) / variance.sqrt()) / per_sample(sigma, x_t)


def teacher_of(query: NoisedBatch) -> torch.Tensor:
    std = torch.full_like(query.sigma, STD)
    return gaussian_velocity(query.x_t, query.sigma, torch.zeros_like(std), std)


def derivative_of(network, query: NoisedBatch, path: torch.Tensor):
    """Velocity, and its derivative along sigma (1 - sigma) (path, 1)."""
    weight = direction_weight(query.sigma)
    return torch.func.jvp(
        lambda x_t, sigma: network(x_t, sigma, query.text),
        (query.x_t, query.sigma),
        (per_sample(weight, path) * path, weight),
    )


def norms(values: torch.Tensor) -> torch.Tensor:
    return values.flatten(1).norm(dim=1)


class TestTrigFlow:
    def test_the_noise_level_of_an_angle_is_the_one_it_came_from(self):
        sigma = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        error = (sigma_of_time(trig_time(sigma)) - sigma).abs().max()
        assert error <= 2.3e-16

    def test_a_conditional_velocity_is_the_one_on_the_circle(self):
        query = query_at(TIMES)
        cos, sin = (per_sample(part, query.x0) for part in (TIMES.cos(), TIMES.sin()))
        state = trig_state(query.x_t, TIMES)
        torch.testing.assert_close(state, cos * query.x0 + sin * query.noise)
        velocity = trig_velocity(query.x_t, query.velocity, TIMES)
        torch.testing.assert_close(velocity, cos * query.noise - sin * query.x0)
        torch.testing.assert_close(cos * state - sin * velocity, query.x0)


class TestTangent:
    def test_it_vanishes_for_the_exact_consistency_function_and_not_for_the_teacher(self):
        query = query_at(TIMES)
        path = teacher_of(query)
        velocity, derivative = derivative_of(consistent, query, path)
        exact = consistency_tangent(query, velocity, path, derivative)

        def teacher(x_t, sigma, text):
            std = torch.full_like(sigma, STD)
            return gaussian_velocity(x_t, sigma, torch.zeros_like(std), std)

        own, moved = derivative_of(teacher, query, path)
        found = consistency_tangent(query, own, path, moved)
        assert norms(found).min() > 1e-2
        assert norms(exact).max() < 1e-12

    @pytest.mark.parametrize("form", ["rcm", "scm"])
    @pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0])
    def test_it_is_the_finite_difference_of_its_definition(self, form, warmup):
        network, path_network, query = SmallNetwork(1), SmallNetwork(2), query_at(TIMES)
        path = predict(path_network, query).detach()
        velocity, derivative = derivative_of(network, query, path)
        tangent = consistency_tangent(query, velocity, path, derivative, warmup=warmup, form=form)
        moving = trig_velocity(query.x_t, path, TIMES)
        state = trig_state(query.x_t, TIMES)

        def on_circle(step: float) -> torch.Tensor:
            t = TIMES + step
            x_t = (state + step * moving) / per_sample(t.cos() + t.sin(), state)
            return trig_velocity(x_t, network(x_t, sigma_of_time(t), query.text), t)

        h = 1e-5
        rate = (on_circle(h) - on_circle(-h)) / (2 * h)
        cos, sin = (per_sample(part, state) for part in (TIMES.cos(), TIMES.sin()))
        apart, inner = on_circle(0.0) - moving, cos * sin
        expected = {
            "rcm": -cos * (1 - warmup**2 * sin**2).sqrt() * apart
            - (warmup * inner * state + inner * rate),
            "scm": -(cos**2) * apart - warmup * (inner * state + inner * rate),
        }[form]
        torch.testing.assert_close(tangent, expected.detach(), rtol=1e-6, atol=1e-8)
        if warmup == 1.0:
            t_plus, t_minus = TIMES + h, TIMES - h
            ends = [
                per_sample(t.cos(), state) * (state + step * moving)
                - per_sample(t.sin(), state) * on_circle(step)
                for t, step in ((t_plus, h), (t_minus, -h))
            ]
            clean = cos * (ends[0] - ends[1]) / (2 * h)
            torch.testing.assert_close(tangent, clean.detach(), rtol=1e-6, atol=1e-8)

    def test_the_two_warm_ups_are_one_at_their_end_and_two_before(self):
        query = query_at(TIMES)
        network, path = SmallNetwork(1), predict(SmallNetwork(2), query).detach()
        velocity, derivative = derivative_of(network, query, path)

        def found(form, warmup):
            return consistency_tangent(query, velocity, path, derivative, warmup=warmup, form=form)

        torch.testing.assert_close(found("rcm", 1.0), found("scm", 1.0), rtol=0, atol=1e-14)
        assert norms(found("rcm", 0.5) - found("scm", 0.5)).min() > 1e-3

    def test_warm_up_rises_linearly_and_none_is_at_its_end(self):
        term = ConsistencyTerm(warmup=4)
        assert [term.warmup_at(each) for each in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
        assert ConsistencyTerm(warmup=0).warmup_at(0) == 1.0


class TestLosses:
    def test_the_gradient_of_the_consistency_loss_is_the_normalised_tangent(self):
        query = query_at(TIMES)
        velocity = torch.randn_like(query.x0).requires_grad_()
        tangent = torch.randn_like(query.x0)
        loss = consistency_loss(query, velocity, tangent, offset=0.1)
        (gradient,) = torch.autograd.grad(loss, velocity)
        scale = (TIMES.cos() + TIMES.sin()) * (norms(tangent) + 0.1)
        torch.testing.assert_close(gradient, -2 / 4 * tangent / per_sample(scale, tangent))

    def test_twice_the_frames_make_twice_the_loss(self):
        query = random_query()
        fake, teacher = (predict(SmallNetwork(seed), query).detach() for seed in (1, 2))

        def doubled(values):
            return torch.cat([values, values], dim=2)

        longer = make_query(doubled(query.x0), doubled(query.noise), query.sigma)
        objective = RcmObjective()
        for loss in ("generator", "tracking"):
            one, other = (
                objective.generator_loss(each, *pair)
                if loss == "generator"
                else objective.tracking_loss(each, pair[0])
                for each, pair in (
                    (query, (fake, teacher)),
                    (longer, (doubled(fake), doubled(teacher))),
                )
            )
            torch.testing.assert_close(other.value, 2 * one.value)

    def test_matching_is_the_direction_of_dmd(self):
        query = with_leaf(random_query())
        pair = [predict(SmallNetwork(seed), query).detach() for seed in (1, 2)]
        gradients = [
            torch.autograd.grad(objective.generator_loss(query, *pair).value, query.x0)[0]
            for objective in (RcmObjective(matching_weight=0.5), DmdObjective(normalizer_min=1e-5))
        ]
        # A sum against a mean of 8 elements with a factor 1/2.
        torch.testing.assert_close(gradients[0], 0.5 * 2 * 8 * gradients[1])

    def test_matching_waits_for_the_end_of_the_warm_up(self):
        objective = RcmObjective(consistency=ConsistencyTerm(warmup=3), matching_weight=0.5)
        assert [objective.matching_weight_at(each) for each in (0, 2, 3)] == [0.0, 0.0, 0.5]

    def test_the_term_is_told_from_methods_without_one(self):
        assert consistency_of(RcmObjective()) == ConsistencyTerm()
        assert consistency_of(DmdObjective()) is None
        assert consistency_of(MATCHING_ALONE) is None

    def test_without_the_term_nobody_waits_for_its_warm_up(self):
        objective = replace(MATCHING_ALONE, consistency=ConsistencyTerm(weight=0.0, warmup=9))
        assert objective.matching_weight_at(0) == 1.0

    def test_nothing_to_learn_from_is_refused(self):
        with pytest.raises(ConfigError, match="matching_weight and consistency"):
            replace(MATCHING_ALONE, matching_weight=0.0)

    def test_longer_clips_are_looked_at_through_more_noise(self):
        normal = torch.zeros(1)
        levels = [ConsistencyTerm().sigma(normal, frames).item() for frames in (1, 21)]
        odds = [level / (1 - level) for level in levels]
        assert odds[0] == pytest.approx(math.exp(-0.8), rel=1e-5)
        assert odds[1] / odds[0] == pytest.approx(math.sqrt(21), rel=1e-5)

    @pytest.mark.parametrize(
        "wrong", [{"weight": -1.0}, {"warmup": -1}, {"log_std": 0.0}, {"tangent_offset": 0.0}]
    )
    def test_numbers_that_mean_nothing_are_refused(self, wrong):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ConsistencyTerm(**wrong)


@pytest.mark.parametrize("seed", [3, 5])
def test_matching_alone_is_dmd_on_rollouts_of_random_levels(seed):
    """The generator's gradient, from a rollout that renoises through the roles to the weights."""
    schedule = FlowMatchSchedule(shift=3.0, renoise=True)
    steps = RandomSteps(4, 4, order="running_minimum")

    def gradient(objective, random_steps=steps):
        networks = [SmallNetwork(seed, torch.float32) for seed in (4, 1, 2)]
        generator = GeneratorLearner(
            networks[0],
            schedule,
            GeneratorSettings(ema_decay=0.0, random_steps=random_steps),
            (1, 2, 2, 2),
            seed,
            task=GeneratorTask(consistency=consistency_of(objective)),
        )
        fake_score = FakeScoreTracker(networks[1], objective, FakeScoreSettings("fresh"))
        teacher = ScoreTeacher(networks[2], TeacherSettings(guidance_scale=1.0))
        text = TextBatch(text=torch.zeros(3, 1, 1), sample_indices=(0, 1, 2))
        query = generator.rollout(MicroBatchKey(0, 0), text)
        prediction = teacher.denoise(query, torch.zeros(1, 1, 1))
        generator.learn(fake_score.signal(query, prediction, 1.0))
        return {name: each.grad for name, each in networks[0].named_parameters()}

    plain = gradient(DmdObjective(normalizer_min=1e-5))
    # A sum against a mean of 8 elements with a factor 1/2.
    expected = {name: 2 * 8 * each for name, each in plain.items()}
    fixed = gradient(DmdObjective(normalizer_min=1e-5), None)
    assert_moves(expected, {name: 2 * 8 * each for name, each in fixed.items()}, 1e-5)
    found = gradient(MATCHING_ALONE)
    assert relative_error(found, expected) < 1e-5


class _Gain(nn.Module):
    """On the circle c(t) x_trig, with c a small network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1)).double()

    def gain(self, t):
        return self.layers(torch.stack([t.cos(), t.sin()], dim=1))[:, 0]

    def forward(self, x_t, sigma, text):
        t = trig_time(sigma)
        cos, sin = (per_sample(part, x_t) for part in (t.cos(), t.sin()))
        state = trig_state(x_t, t)
        return (cos + sin) * (per_sample(self.gain(t), x_t) * state - (cos - sin) * x_t)


@pytest.mark.slow
def test_training_on_the_term_alone_samples_in_one_step_with_the_spread_of_the_data():
    network, stream = _Gain(), torch.Generator().manual_seed(1)
    term = ConsistencyTerm(weight=1.0)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3, betas=(0.9, 0.99))
    end = torch.tensor([math.pi / 2], dtype=torch.float64)
    assert abs(network.gain(end).abs().item() - STD) > 0.1
    for iteration in range(250):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - iteration / 250)
        x0, noise = torch.randn(2, 64, 1, 1, 1, 1, generator=stream, dtype=torch.float64)
        sigma = term.sigma(torch.randn(64, generator=stream), 1).double()
        query = make_query(STD * x0, noise, sigma)
        path = teacher_of(query)
        constant, derivative = derivative_of(network, query, path)
        velocity = network(query.x_t, query.sigma, query.text)
        loss = term.loss(query, velocity, constant, path, derivative)
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
    assert -network.gain(end).item() == pytest.approx(STD, abs=0.02)
