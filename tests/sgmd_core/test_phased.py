"""Phased DMD: its interval against the straight path, its losses against DMD, its phases."""

import dataclasses

import pytest
import torch

from sgmd_core.errors import ConfigError
from sgmd_core.interval import (
    interval_scales,
    interval_state,
    interval_velocity,
    reverse_divergence_weight,
)
from sgmd_core.objectives.dmd import DmdObjective
from sgmd_core.objectives.dmd2 import Dmd2Objective
from sgmd_core.objectives.phased import PhasedObjective, interval_direction
from sgmd_core.phases import expert_phases
from sgmd_core.schedule import FlowMatchSchedule, shift_sigma
from sgmd_core.seeds import RolloutRule, draw
from sgmd_core.types import MicroBatchKey, Purpose, TextBatch, detached
from sgmd_core.worlds.gaussian import gaussian_velocity
from tests.helpers.small_network import SmallNetwork, predict, random_query, with_leaf
from workers.fake_score_tracker import FakeScoreTracker
from workers.generator_learner import GeneratorLearner
from workers.generator_task import GeneratorTask
from workers.network_settings import OptimizerSettings
from workers.score_teacher import ScoreTeacher
from workers.settings import FakeScoreSettings, GeneratorSettings, TeacherSettings

SCHEDULE = FlowMatchSchedule(shift=7.0)
LATENT_SHAPE = (1, 2, 2, 2)
SIGMA_S, STD = 0.6, 0.6


def levels(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def anchored(query, anchor_sigma: float, exit_sigma: float = 0.95):
    """The query through an interval that starts at a state of the path, above it in noise."""
    stream = torch.Generator().manual_seed(9)
    other = torch.randn(query.x0.shape, generator=stream, dtype=query.x0.dtype)
    low = torch.full_like(query.sigma, anchor_sigma)
    sigma = anchor_sigma + (1 - anchor_sigma) * query.sigma
    anchor = ((1 - anchor_sigma) * query.x0 + anchor_sigma * other).detach()
    return dataclasses.replace(
        query,
        sigma=sigma,
        anchor=anchor,
        anchor_sigma=low,
        exit_sigma=torch.full_like(low, exit_sigma),
    )


def test_states_of_an_interval_have_the_law_of_the_whole_path():
    sigma = levels(0.7, 0.9, 0.99)
    alpha, beta = interval_scales(sigma, levels(SIGMA_S).expand(3))
    # x_s has (1 - sigma_s) of the data and sigma_s^2 of variance beside it.
    torch.testing.assert_close(alpha * (1 - SIGMA_S), 1 - sigma)
    torch.testing.assert_close(alpha**2 * SIGMA_S**2 + beta**2, sigma**2)


def test_the_velocity_is_the_derivative_of_the_state():
    query = random_query()
    low, sigma = torch.full((3,), SIGMA_S, dtype=torch.float64), levels(0.65, 0.8, 0.95)
    step = 1e-6
    ends = [interval_state(query.x0, query.noise, sigma + sign * step, low) for sign in (1, -1)]
    numeric = (ends[0] - ends[1]) / (2 * step)
    found = interval_velocity(query.x0, query.noise, sigma, low)
    torch.testing.assert_close(found, numeric, rtol=1e-7, atol=1e-7)


def test_from_clean_latents_it_is_the_straight_path():
    query = random_query()
    clean = torch.zeros(3, dtype=torch.float64)
    found = interval_state(query.x0, query.noise, query.sigma, clean)
    torch.testing.assert_close(found, query.x_t)
    velocity = interval_velocity(query.x0, query.noise, query.sigma, clean)
    torch.testing.assert_close(velocity, query.velocity)
    weight = reverse_divergence_weight(query.sigma, clean)
    torch.testing.assert_close(weight, (1 - query.sigma) ** 2 / query.sigma)


def test_regression_on_the_target_finds_the_velocity_of_the_path_and_the_naive_one_does_not():
    """Gaussian data of spread 0.6, sigma_s 0.6, sigma_t 0.9: slopes 1.062 and 0.963."""
    stream = torch.Generator().manual_seed(0)
    x0, early, late = torch.randn(3, 1, 400_000, generator=stream, dtype=torch.float64)
    anchor = (1 - SIGMA_S) * STD * x0 + SIGMA_S * early
    sigma, low = levels(0.9), levels(SIGMA_S)
    x_t = interval_state(anchor, late, sigma, low)

    def slope(target):
        return ((x_t * target).mean() / x_t.square().mean()).item()

    true = (0.9 - 0.1 * STD**2) / (0.1**2 * STD**2 + 0.9**2)
    assert true == pytest.approx(1.0619, abs=1e-4)
    assert slope(interval_velocity(anchor, late, sigma, low)) == pytest.approx(true, abs=5e-3)
    assert slope(late - anchor) == pytest.approx(0.963, abs=5e-3)


@pytest.mark.parametrize(("sigma", "inverse"), [(0.61, 33), (0.65, 6.8), (0.7, 3.5), (0.9, 1.3)])
def test_the_papers_limit_of_the_weight_acts_near_the_boundary_alone(sigma, inverse):
    _, beta = interval_scales(levels(sigma), levels(SIGMA_S))
    assert (1 / beta**2).item() == pytest.approx(inverse, rel=0.04)
    query = anchored(random_query(), SIGMA_S)
    query = dataclasses.replace(query, sigma=torch.full_like(query.sigma, sigma))
    velocity = query.velocity + 0.3
    loss = PhasedObjective(form="paper").tracking_loss(query, velocity)
    expected = 0.09 * min(1.0, 10 * beta.item() ** 2)
    assert loss.value.item() == pytest.approx(expected)
    plain = PhasedObjective(form="released").tracking_loss(query, velocity)
    assert plain.value.item() == pytest.approx(0.09)


def gradients(objective, query, fake, teacher):
    loss = objective.generator_loss(query, fake, teacher)
    return torch.autograd.grad(loss.value, query.x0)[0]


def test_without_a_boundary_it_is_dmd2():
    query = with_leaf(random_query())
    fake, teacher = (predict(SmallNetwork(seed), detached(query)) for seed in (1, 2))
    released = PhasedObjective(normalizer_min=0.0)
    assert torch.equal(
        gradients(released, query, fake, teacher), gradients(Dmd2Objective(), query, fake, teacher)
    )
    own = gradients(PhasedObjective(form="paper"), query, fake, teacher)
    weight = ((1 - query.sigma) ** 2 / query.sigma).reshape(-1, 1, 1, 1, 1)
    torch.testing.assert_close(own * own.numel(), weight * (teacher - fake))
    for form in ("paper", "released"):
        tracked = PhasedObjective(form=form).tracking_loss(detached(query), fake)
        plain = DmdObjective().tracking_loss(detached(query), fake)
        assert tracked.terms.keys() == plain.terms.keys()
        if form == "released":
            torch.testing.assert_close(tracked.value, plain.value)


def test_the_released_loss_is_dmds_at_x0_through_the_interval():
    query = with_leaf(anchored(random_query(), SIGMA_S))
    assert query.anchor is not None
    fake, teacher = (predict(SmallNetwork(seed), detached(query)) for seed in (1, 2))
    found = gradients(PhasedObjective(), query, fake, teacher)
    sigma = query.sigma.reshape(-1, 1, 1, 1, 1)
    x_t = interval_state(query.anchor, query.noise, query.sigma, query.anchor_sigma)
    x0_fake, x0_teacher = x_t - sigma * fake, x_t - sigma * teacher
    n = (query.x0 - x0_teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp_min(1e-4)
    torch.testing.assert_close(found * found.numel(), (x0_fake - x0_teacher) / n)


def test_anchor_and_x0_give_the_generator_one_direction():
    """At the exit step's velocity the two differ by sigma_e / (sigma_e - sigma_s) alone."""
    query = anchored(random_query(), SIGMA_S, exit_sigma=0.9)
    fake, teacher = (predict(SmallNetwork(seed), query) for seed in (1, 2))
    x_e = random_query(seed=3).x0
    v = random_query(seed=4).x0.requires_grad_()
    step = reverse_divergence_weight(query.sigma, query.anchor_sigma).reshape(-1, 1, 1, 1, 1)
    step = (step * (teacher - fake)).detach()
    at_anchor = torch.autograd.grad((x_e + (SIGMA_S - 0.9) * v).mul(step).sum(), v)[0]
    carried = interval_direction(query, fake, teacher)
    at_x0 = torch.autograd.grad((x_e - 0.9 * v).mul(carried).sum(), v)[0]
    torch.testing.assert_close(at_x0, at_anchor)


def test_the_step_descends_the_reverse_divergence_of_the_states_at_the_boundary():
    """Both laws Gaussian, the fake score exact for the generator's."""
    sigma, low = levels(0.8), levels(SIGMA_S)
    mean, std = torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    mean.requires_grad_()
    # x_s of data N(m, s^2): mean (1 - sigma_s) m; at sigma_t: (1 - sigma_t) m.
    alpha = 1 - sigma
    variances = [alpha**2 * s**2 + sigma**2 for s in (std, 0.5)]
    divergence = (alpha * (mean - 0.7)) ** 2 / (2 * variances[1])
    expected = torch.autograd.grad(divergence.sum(), mean)[0]
    stream = torch.Generator().manual_seed(0)
    z, early, late = torch.randn(3, 1, 1, 1, 1, 200_000, generator=stream, dtype=torch.float64)
    anchor = (1 - SIGMA_S) * (mean.detach() + std * z) + SIGMA_S * early
    x_t = interval_state(anchor, late, sigma, low)
    fake = gaussian_velocity(x_t, sigma, mean.detach().reshape(1), std.reshape(1))
    teacher = gaussian_velocity(x_t, sigma, levels(0.7), levels(0.5))
    step = reverse_divergence_weight(sigma, low).reshape(1, 1, 1, 1, 1) * (teacher - fake)
    # d x_s / d mean = 1 - sigma_s
    found = (1 - SIGMA_S) * step.mean()
    assert found.item() == pytest.approx(expected.item(), rel=0.05)


class TestPhases:
    def test_the_boundary_is_a_step_of_the_grid(self):
        phases = PhasedObjective().phases(SCHEDULE, 4)
        assert (phases.high.first_exit, phases.high.end) == (0, 2)
        assert (phases.low.first_exit, phases.low.end) == (2, 4)
        assert float(SCHEDULE.generator_grid(4)[phases.high.end]) == pytest.approx(0.875)

    @pytest.mark.parametrize("settings", [{"boundary": 600}, {"boundary": 900}])
    def test_a_boundary_beside_the_grid_is_refused(self, settings):
        with pytest.raises(ConfigError, match="which no step starts at"):
            PhasedObjective(**settings).phases(SCHEDULE, 4)
        listed = FlowMatchSchedule(shift=7.0, steps=(1000, 600, 300))
        assert PhasedObjective(boundary=600).phases(listed, 3).high.end == 1

    def test_ranges_are_reverse_nested_or_lie_side_by_side(self):
        sequential = PhasedObjective(high_iterations=7).phases(SCHEDULE, 4)
        assert (sequential.high.levels, sequential.low.levels) == ((520, 981), (20, 981))
        assert [sequential.at(each) is sequential.high for each in (0, 6, 7, 100)] == [
            True,
            True,
            False,
            False,
        ]

    def test_in_turns_the_low_phase_looks_above_the_boundary_in_every_other_iteration(self):
        phases = PhasedObjective(order="alternate").phases(SCHEDULE, 4)
        above, below, every = (520, 981), (20, 500), (20, 981)
        generated = [phases.at(each).levels_for(Purpose.GENERATE) for each in range(8)]
        assert generated == [above, above, above, below] * 2
        tracked = [phases.at(each).levels_for(Purpose.TRACK) for each in range(8)]
        assert tracked == [above, every] * 4
        assert [phases.at(each).anchored for each in range(8)] == [True, False] * 4
        exits = [(phases.at(each).first_exit, phases.at(each).end) for each in range(4)]
        assert exits == [(0, 2), (2, 4)] * 2

    def test_batches_of_the_low_phase_draw_by_turn_and_tracking_draws_from_both_sides(self):
        phases = PhasedObjective(order="alternate").phases(SCHEDULE, 4)

        def sigmas(iteration, purpose):
            phase, key = phases.at(iteration), MicroBatchKey(iteration, 0, purpose)
            return draw(
                0, key, range(300), (1, 1, 1, 1), SCHEDULE, 4, RolloutRule(phase=phase)
            ).sigma

        boundary = 0.875
        assert sigmas(1, Purpose.GENERATE).min() > boundary
        assert sigmas(3, Purpose.GENERATE).max() < boundary
        for iteration in (1, 3):
            sigma = sigmas(iteration, Purpose.TRACK)
            assert 0.4 < (sigma > boundary).float().mean() < 0.6
            assert ((sigma > boundary) & (sigma < 0.88)).any(), "no margin above clean latents"

    @pytest.mark.parametrize("order", ["sequential", "alternate"])
    def test_the_bounds_of_levels_are_settings(self, order):
        objective = PhasedObjective(order=order, first_level=5, last_level=990, margin=30)
        phases = objective.phases(SCHEDULE, 4)
        assert phases.high.levels == phases.high.tracked_levels == (530, 991)
        assert phases.low.tracked_levels == (5, 991)
        assert phases.low.levels == ((5, 991) if order == "sequential" else (5, 500))

    def test_draws_stay_within_the_phase_and_the_fake_score_goes_to_its_end(self):
        phases = PhasedObjective().phases(SCHEDULE, 4)
        for phase in (phases.high, phases.low):
            exits, sigmas = set(), []
            for at in range(40):
                key = MicroBatchKey(at, 0)
                draws = draw(0, key, range(8), (1, 1, 1, 1), SCHEDULE, 4, RolloutRule(phase=phase))
                exits.add(draws.exit_step)
                sigmas.append(draws.sigma)
                track = MicroBatchKey(at, 0, Purpose.TRACK)
                tracked = draw(0, track, (0,), (1, 1, 1, 1), SCHEDULE, 4, RolloutRule(phase=phase))
                assert tracked.exit_step == phase.end - 1
            assert exits == set(range(phase.first_exit, phase.end))
            ends = torch.tensor([phase.levels[0] / 1000, (phase.levels[1] - 1) / 1000])
            low, high = shift_sigma(ends, 7.0)
            sigma = torch.cat(sigmas)
            assert low - 1e-6 <= sigma.min() < low + 0.05
            assert high - 0.05 < sigma.max() <= high + 1e-6

    def test_the_mean_length_of_rollouts_counts_both_phases(self):
        sequential = PhasedObjective(high_iterations=30).phases(SCHEDULE, 4)
        assert sequential.mean_length(Purpose.GENERATE, 40) == 0.75 * 1.5 + 0.25 * 3.5
        assert sequential.mean_length(Purpose.TRACK, 40) == 0.75 * 2 + 0.25 * 4


@pytest.mark.parametrize(
    "settings",
    [
        {"boundary": 0},
        {"margin": 500},
        {"margin": 0},
        {"high_iterations": 0},
        {"first_level": 0},
        {"first_level": 500},
        {"last_level": 519},
        {"last_level": 1000},
    ],
)
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        PhasedObjective(**settings)


def test_at_the_boundary_the_released_loss_is_without_limit_and_the_papers_is_small():
    """So the margin of the released form begins at 1, where its target is of a size with noise."""
    sizes = []
    for levels_above in (0, 1):
        raw = torch.tensor([500 + levels_above] * 3)
        query = anchored(random_query(), SCHEDULE.table_sigma(torch.tensor([500])).item())
        query = dataclasses.replace(query, sigma=SCHEDULE.table_sigma(raw).double())
        losses = [
            PhasedObjective(form=form).tracking_loss(query, torch.zeros_like(query.x0)).value
            for form in ("released", "paper")
        ]
        sizes.append([loss.item() for loss in losses])
    assert sizes[0][0] > 1e6
    assert sizes[1][0] < 1e4
    assert sizes[0][1] == pytest.approx(sizes[1][1], rel=0.1)  # bounded: nothing changes
    assert PhasedObjective(form="paper", margin=0).margin == 0
    assert PhasedObjective(form="released", margin=1).margin == 1


UPDATE = OptimizerSettings(lr=1e-3)


def roles(objective: PhasedObjective):
    networks = [SmallNetwork(seed, torch.float32) for seed in (4, 1, 2)]
    generator = GeneratorLearner(
        networks[0],
        SCHEDULE,
        GeneratorSettings(ema_decay=0.0, optimizer=UPDATE),
        LATENT_SHAPE,
        3,
        task=GeneratorTask(phases=objective.phases(SCHEDULE, 4)),
    )
    fake_score = FakeScoreTracker(networks[1], objective, FakeScoreSettings("fresh", UPDATE))
    teacher = ScoreTeacher(networks[2], TeacherSettings(guidance_scale=1.0))
    return networks, generator, fake_score, teacher


TEXT = TextBatch(torch.ones(3, 1, 1), (0, 1, 2))


def iterate(iteration, generator, fake_score, teacher, fake_updates):
    query = generator.rollout(MicroBatchKey(iteration, 0), TEXT)
    signal = fake_score.signal(query, teacher.denoise(query, torch.zeros(1, 1, 1)), 1.0)
    generator.learn(signal)
    generator.gradient_report(iteration)
    generator.step(iteration)
    for update in range(fake_updates):
        tracked = generator.sample(MicroBatchKey(iteration, update, Purpose.TRACK), TEXT)
        fake_score.track(tracked, 1.0)
        fake_score.gradient_report(iteration)
        fake_score.step(iteration)
    return query, tracked


def test_an_anchor_is_the_state_where_the_next_phase_begins():
    objective = PhasedObjective(high_iterations=1, fake_updates=1)
    networks, generator, fake_score, teacher = roles(objective)
    grid = SCHEDULE.generator_grid(4)
    query, _ = iterate(0, generator, fake_score, teacher, 1)
    tracked = generator.sample(MicroBatchKey(0, 5, Purpose.TRACK), TEXT)
    draws = draw(
        3, tracked.key, (0, 1, 2), LATENT_SHAPE, SCHEDULE, 4, RolloutRule(phase=generator.phase(0))
    )
    with torch.no_grad():
        state = draws.initial_noise
        for step in range(2):
            velocity = networks[0](state, grid[step].expand(3), TEXT.text)
            state = state + (grid[step + 1] - grid[step]) * velocity
    torch.testing.assert_close(tracked.anchor, state)
    assert tracked.anchor_sigma.tolist() == pytest.approx([0.875] * 3)
    assert query.anchor is not None
    low, _ = iterate(1, generator, fake_score, teacher, 1)
    assert low.anchor is None


@pytest.mark.parametrize("restores", [False, True])
def test_the_fake_score_goes_back_to_the_teacher_between_phases_and_only_there(restores):
    objective = PhasedObjective(high_iterations=2, fake_updates=2)
    networks, generator, fake_score, teacher = roles(objective)
    start = [weight.detach().clone() for weight in networks[1].parameters()]

    def distance():
        pairs = zip(networks[1].parameters(), start, strict=True)
        return max((one - other).abs().max().item() for one, other in pairs)

    for iteration in range(2):
        iterate(iteration, generator, fake_score, teacher, 2)
    before = distance()
    assert before > 2.5 * UPDATE.lr
    if restores:
        # As after a fault: the state of the iteration's end, taken and put back.
        taken = fake_score.snapshot()
        fake_score.restore(taken)
    iterate(2, generator, fake_score, teacher, 2)
    # Two updates of Adam without momentum, from the start.
    assert distance() < 2.5 * UPDATE.lr
    after = [weight.detach().clone() for weight in networks[1].parameters()]
    iterate(3, generator, fake_score, teacher, 2)
    moved = max(
        (one - other).abs().max().item()
        for one, other in zip(networks[1].parameters(), after, strict=True)
    )
    assert 0 < moved < 5 * UPDATE.lr


@pytest.mark.parametrize(
    ("expert", "exits", "span"), [("high", {0, 1, 2}, (0.875, 0.98)), ("low", {3}, (0.02, 0.875))]
)
def test_one_expert_alone_is_left_at_its_own_steps_and_judged_at_its_own_levels(
    expert, exits, span
):
    # The recipe wan22-a14b: steps at 1, 0.9545, 0.875 and 0.7, the third at exactly the boundary.
    phases = expert_phases(SCHEDULE, 4, 0.875, expert)
    for purpose in Purpose:
        found, sigmas = set(), []
        for iteration in range(60):
            key = MicroBatchKey(iteration, 0, purpose)
            phase = phases.at(iteration)
            draws = draw(0, key, range(4), LATENT_SHAPE, SCHEDULE, 4, RolloutRule(phase=phase))
            found.add(draws.exit_step)
            sigmas.append(draws.sigma)
        sigma = torch.cat(sigmas)
        assert found == exits
        low, high = span
        assert sigma.min() >= low
        assert (sigma < high).all() if expert == "low" else sigma.max() <= high
        # They fill the range, and whoever draws from all levels leaves it.
        assert sigma.min() < low + 0.1
        assert sigma.max() > high - 0.1
        plain = draw(0, MicroBatchKey(0, 0, purpose), range(240), LATENT_SHAPE, SCHEDULE, 4).sigma
        assert ((plain < 0.875) if expert == "high" else (plain >= 0.875)).any()
    assert phases.mean_length(Purpose.GENERATE, 100) == sum(exit + 1 for exit in exits) / len(exits)


@pytest.mark.parametrize(
    ("boundary", "schedule", "words"),
    [
        (0.5, SCHEDULE, "none of them below model.boundary 0.5"),
        (0.875, FlowMatchSchedule(shift=7.0, score_level_min=600), "Widen"),
    ],
)
def test_an_expert_without_a_step_or_a_level_is_refused(boundary, schedule, words):
    with pytest.raises(ConfigError, match=words):
        expert_phases(schedule, 4, boundary, "low")
