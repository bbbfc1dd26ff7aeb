"""CDM: its terms against DMD, its random schedules, and its roles against one graph."""

import dataclasses

import pytest
import torch

from sgmd_core.errors import ConfigError
from sgmd_core.objectives import looks_of
from sgmd_core.objectives.cdm import CdmObjective, augmentation_direction
from sgmd_core.objectives.dmd import DmdObjective, distribution_matching_loss, matching_direction
from sgmd_core.rollout import extrapolated, rollout, rollout_exit
from sgmd_core.schedule import FlowMatchSchedule, RandomSteps, shift_sigma
from sgmd_core.seeds import RolloutRule, draw, rollout_steps
from sgmd_core.types import Draws, GuideAnswer, Looks, MicroBatchKey, TextBatch, detached
from sgmd_core.worlds.gaussian import gaussian_velocity
from tests.helpers.noises import balanced_noises
from tests.helpers.queries import make_query
from tests.helpers.small_network import SmallNetwork, predict, random_query, with_leaf
from workers.fake_score_tracker import FakeScoreTracker
from workers.generator_learner import GeneratorLearner
from workers.generator_task import GeneratorTask
from workers.network_settings import OptimizerSettings
from workers.score_teacher import ScoreTeacher
from workers.settings import FakeScoreSettings, GeneratorSettings, TeacherSettings

LATENT_SHAPE = (1, 2, 2, 2)
SCHEDULE = FlowMatchSchedule(shift=3.0)
SCALE = 3.5
STEPS = RandomSteps(2, 6)
BOTH = Looks(splits_guidance=True, off_trajectory=True)


def answers(query):
    fake, conditional, unconditional = (
        predict(SmallNetwork(seed), detached(query)).detach() for seed in (1, 2, 3)
    )
    return fake, conditional, unconditional + SCALE * (conditional - unconditional)


def test_joined_and_on_the_trajectory_alone_it_is_dmd_to_the_bit():
    query = with_leaf(random_query(torch.float32))
    fake, teacher = (predict(SmallNetwork(seed, torch.float32), detached(query)) for seed in (1, 2))
    objective = CdmObjective(guidance="joint", off_trajectory=0.0, normalizer_min=0.0)
    assert looks_of(objective, SCALE) == Looks()
    gradients = [
        torch.autograd.grad(one.generator_loss(query, fake, teacher).value, query.x0)[0]
        for one in (objective, DmdObjective())
    ]
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_matching_and_guidance_at_one_noise_add_up_to_dmd_under_guidance():
    query = random_query()
    fake, conditional, guided = answers(query)
    together = matching_direction(query, fake, guided)
    split = matching_direction(query, fake, conditional)
    split = split + augmentation_direction(query, conditional, guided)
    assert (augmentation_direction(query, conditional, guided)).abs().max() > 0.1
    # They differ in their denominators: the residual under guidance, and that without.
    residuals = [
        (each - query.velocity).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        for each in (guided, conditional)
    ]
    torch.testing.assert_close(together * residuals[0], split * residuals[1])


def test_seven_times_the_guidance_and_plain_matching_are_a_scale_of_eight():
    query = random_query()
    conditional, unconditional, fake = (
        predict(SmallNetwork(seed), query).detach() for seed in (1, 2, 3)
    )
    sigma = query.sigma.reshape(-1, 1, 1, 1, 1)
    c, u, f = (query.x_t - sigma * each for each in (conditional, unconditional, fake))
    found = 7 * (c - u) + (c - f)
    torch.testing.assert_close(found, (u + 8 * (c - u)) - f, rtol=0, atol=1e-14)


def test_without_guidance_nothing_moves_where_fake_score_and_teacher_agree():
    query = with_leaf(random_query())
    _, teacher, _ = answers(query)
    objective = CdmObjective()
    assert looks_of(objective, 1.0) == Looks(off_trajectory=True)
    losses = [
        objective.generator_loss(query, teacher, teacher),
        objective.off_trajectory_loss(query, teacher, teacher),
        objective.guide_loss(query, GuideAnswer(teacher, teacher)),
    ]
    value = torch.stack([loss.value for loss in losses]).sum()
    (gradient,) = torch.autograd.grad(value, query.x0)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_guidance_looked_at_without_noise_teaches_nothing_and_is_near_that_with_little():
    """Its level is drawn from [0, 1) times the exit's, so 0 is one of them."""
    query = random_query()
    _, conditional, guided = answers(query)

    def direction(level):
        at = dataclasses.replace(query, sigma=torch.full_like(query.sigma, level))
        return augmentation_direction(at, conditional, guided, normalizer_min=0.1)

    assert torch.equal(direction(0.0), torch.zeros_like(guided))
    assert direction(0.01).abs().max() > 1e-3
    # Below the floor it falls with the level.
    torch.testing.assert_close(direction(1e-6), 1e-4 * direction(0.01))


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.2, 0.5, 0.7])
def test_matching_leads_an_affine_generator_to_the_teachers_mean_and_spread(sigma):
    """The fake score is exact for the generator at every step; descent ends at (0.7, 0.5)."""
    level = torch.tensor([sigma], dtype=torch.float64)
    z, noise = balanced_noises(1, torch.float64)
    law = torch.tensor([-0.4, 1.1], dtype=torch.float64, requires_grad=True)
    wanted = torch.tensor([0.7, 0.5], dtype=torch.float64)
    for _ in range(800):
        query = make_query(law[0] + law[1] * z, noise, level)
        velocities = [
            gaussian_velocity(query.x_t.detach(), level, *each.detach().reshape(2, 1))
            for each in (law, wanted)
        ]
        loss = CdmObjective().generator_loss(query, *velocities)
        (gradient,) = torch.autograd.grad(loss.value, law)
        law = (law - 0.05 * gradient).detach().requires_grad_()
    torch.testing.assert_close(law.detach(), wanted, atol=2e-3, rtol=0)


def test_the_stored_velocity_leads_to_the_next_state_and_to_the_clean_latents():
    network, grid = SmallNetwork(5), SCHEDULE.few_step_grid(4)
    noise, text = random_query().noise, torch.zeros(3, 1, 1)
    left = rollout_exit(network, grid, noise, text, 1, keep_graph=False)
    after = rollout_exit(network, grid, noise, text, 2, keep_graph=False)
    levels = [level.to(noise).expand(3) for level in (grid[2], torch.tensor(0.0))]
    for level, expected in zip(levels, (after.x_t, left.x0), strict=True):
        found = extrapolated(left.x_t, left.velocity, left.sigma, level)
        torch.testing.assert_close(found, expected)


def test_a_grid_for_each_sample_is_walked_by_each_sample_alone():
    network, noise, text = SmallNetwork(5), random_query().noise, torch.zeros(3, 1, 1)
    u = torch.rand(3, 3, generator=torch.Generator().manual_seed(1))
    grid = STEPS.grid(u, shift=3.0)
    for step in range(4):
        together = rollout(network, grid, noise, text, step, keep_graph=False)
        for index in range(3):
            one = slice(index, index + 1)
            alone = rollout(network, grid[index], noise[one], text[one], step, keep_graph=False)
            torch.testing.assert_close(together[one], alone)


@pytest.mark.parametrize("stratified", [False, True])
def test_drawn_levels_fall_from_one_to_zero_within_their_shifted_range(stratified):
    steps = RandomSteps(1, 9, 0.25, 0.95, stratified=stratified)
    u = torch.rand(200, 8, generator=torch.Generator().manual_seed(0))
    grid = steps.grid(u, shift=5.0)
    assert torch.equal(grid[:, 0], torch.ones(200))
    assert torch.equal(grid[:, -1], torch.zeros(200))
    assert (grid.diff(dim=1) < 0).all()
    lowest, highest = (float(shift_sigma(torch.tensor(each), 5.0)) for each in (0.25, 0.95))
    assert lowest <= grid[:, 1:-1].min()
    assert grid[:, 1:-1].max() <= highest
    if stratified:
        raw = grid[:, 1:-1] / (5 - 4 * grid[:, 1:-1])
        parts = ((raw - 0.25) / 0.7 * 8).floor().flip(1)
        assert (parts == torch.arange(8)).float().mean() > 0.99


def test_a_single_step_has_no_inner_level():
    grid = RandomSteps(1, 1).grid(torch.zeros(2, 0), shift=3.0)
    assert grid.tolist() == [[1, 0], [1, 0]]


def drawn(indices, micro_batch=0, iteration=0, exit_draw=None, looks=BOTH):
    key = MicroBatchKey(iteration, micro_batch, exit_draw=exit_draw)
    return draw(3, key, indices, LATENT_SHAPE, SCHEDULE, 4, RolloutRule(random_steps=STEPS), looks)


def test_every_rank_draws_the_same_length_and_levels_of_its_own():
    for iteration in range(30):
        one, other = (drawn(each, iteration=iteration) for each in ((0, 1), (2, 3)))
        assert one.grid.shape == other.grid.shape
        assert one.exit_step == other.exit_step
        whole = drawn((0, 1, 2, 3), iteration=iteration)
        for ours, joined in zip(values(whole), values(Draws.joined([one, other])), strict=True):
            assert torch.equal(ours, joined)
        if whole.grid.shape[1] > 2:
            assert len({tuple(row) for row in whole.grid.tolist()}) == 4
    lengths = {drawn((0,), iteration=iteration).grid.shape[1] - 1 for iteration in range(60)}
    assert lengths == set(range(2, 7))


def values(draws):
    looks = [draws.guide.sigma, draws.guide.noise, draws.off.sigma, draws.off.start]
    return [draws.initial_noise, draws.sigma, draws.noise, draws.grid, draws.off.noise, *looks]


def test_draws_of_ranks_that_disagree_about_the_length_do_not_join():
    longer, shorter = (
        next(found for at in range(60) if (found := drawn((0,), iteration=at)).grid.shape[1] == n)
        for n in (7, 3)
    )
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        Draws.joined([longer, shorter])


def test_micro_batches_that_share_an_exit_share_the_length_of_their_rollouts():
    keys = [MicroBatchKey(5, part, exit_draw=1) for part in (0, 1, 7)]
    assert len({rollout_steps(3, key, RandomSteps(1, 1000)) for key in keys}) == 1


def test_looks_and_lengths_leave_the_other_draws_as_they_are():
    plain = draw(3, MicroBatchKey(0, 0), (0, 1), LATENT_SHAPE, SCHEDULE, 4)
    rich = drawn((0, 1))
    for name in ("initial_noise", "sigma", "noise"):
        assert torch.equal(getattr(plain, name), getattr(rich, name))
    assert (plain.grid, plain.guide, plain.off) == (None, None, None)


def test_guidance_is_looked_at_below_the_noise_that_the_generator_stood_at():
    for iteration in range(40):
        draws = drawn(range(8), iteration=iteration)
        stood = draws.grid[:, draws.exit_step]
        assert (draws.guide.sigma <= stood).all()
        assert (draws.guide.sigma >= 0).all()
    draws = draw(3, MicroBatchKey(0, 0), range(2000), (1, 1, 1, 1), SCHEDULE, 1, looks=BOTH)
    assert draws.guide.sigma.mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("floors", [(0.0, 5.0), (5.0, 0.0), (0.0, 0.0)])
def test_each_query_has_the_floor_of_its_own_loss(floors):
    """The trainer that SGMD was released in bounds the normaliser off the trajectory alone."""
    main, off = floors
    objective = CdmObjective(normalizer_min=main, off_trajectory_normalizer_min=off)
    query = with_leaf(random_query())
    fake, teacher, guided = answers(query)
    sigma = query.sigma.reshape(-1, 1, 1, 1, 1)
    x0_fake, x0_teacher, x0_guided = (query.x_t - sigma * one for one in (fake, teacher, guided))
    scale = (query.x0 - x0_teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    assert scale.max() < 5
    matching, guidance = x0_fake - x0_teacher, x0_teacher - x0_guided
    cases = (
        (objective.generator_loss(query, fake, teacher), matching, main),
        (objective.guide_loss(query, GuideAnswer(teacher, guided)), guidance, main),
        (objective.off_trajectory_loss(query, fake, teacher), matching, off),
    )
    for loss, step, floor in cases:
        (gradient,) = torch.autograd.grad(loss.value, query.x0)
        expected = step / scale.clamp_min(floor)
        torch.testing.assert_close(gradient * gradient.numel(), expected.detach())


def test_the_weight_off_the_trajectory_rises_linearly():
    objective = CdmObjective(off_trajectory=2.0, off_trajectory_warmup=200)
    weights = [objective.off_trajectory_weight(at) for at in (0, 50, 200, 900)]
    assert weights == [0.0, 0.5, 2.0, 2.0]
    assert CdmObjective().off_trajectory_weight(0) == 1.0


@pytest.mark.parametrize(
    "settings",
    [
        {"off_trajectory": -1.0},
        {"off_trajectory_warmup": -1},
        {"off_trajectory_normalizer_min": -0.1},
    ],
)
def test_settings_that_mean_nothing_are_refused(settings):
    (name,) = settings
    with pytest.raises(ConfigError, match=name):
        CdmObjective(**settings)


@pytest.mark.parametrize("settings", [{"min_steps": 0}, {"max_steps": 1}, {"sigma_max": 1.0}])
def test_lengths_that_mean_nothing_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        RandomSteps(**{"min_steps": 2, **settings})


@pytest.mark.parametrize("batched", [True, False])
def test_three_roles_make_the_gradient_of_one_graph(batched):
    objective = CdmObjective(off_trajectory=0.7, off_trajectory_warmup=4)
    networks = [SmallNetwork(seed, torch.float32) for seed in (4, 1, 2)]
    update = OptimizerSettings(lr=1e-3)
    settings = GeneratorSettings(random_steps=STEPS, ema_decay=0.0, optimizer=update)
    generator = GeneratorLearner(
        networks[0],
        SCHEDULE,
        settings,
        LATENT_SHAPE,
        3,
        task=GeneratorTask(looks_of(objective, SCALE)),
    )
    fake_score = FakeScoreTracker(networks[1], objective, FakeScoreSettings("fresh", update))
    guided = TeacherSettings(guidance_scale=SCALE, batched_guidance=batched)
    teacher = ScoreTeacher(CaptionedNetwork(networks[2]), guided)
    text, negative = TextBatch(torch.ones(3, 1, 1), (0, 1, 2)), torch.zeros(1, 1, 1)
    # A weight that rises is 0 in iteration 0.
    for iteration in range(2):
        key = MicroBatchKey(iteration, 0)
        query = generator.rollout(key, text)
        signal = fake_score.signal(query, teacher.denoise(query, negative), 1.0)
        generator.learn(signal)
        expected = one_graph(objective, networks, iteration, text)
        assert (signal.grad_off.abs().max() > 0) == (iteration > 0)
        for weight, gradient in zip(networks[0].parameters(), expected, strict=True):
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-8)
        generator.gradient_report(iteration)
        generator.step(iteration)
        for _ in range(objective.fake_updates):
            fake_score.track(detached(query), 1.0)
            fake_score.gradient_report(iteration)
            fake_score.step(iteration)


class CaptionedNetwork(torch.nn.Module):
    """A teacher whose answer depends on the caption."""

    def __init__(self, network: SmallNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t, sigma, text):
        return self.network(x_t, sigma, text) + text.reshape(-1, 1, 1, 1, 1) * x_t.flip(1).tanh()


def one_graph(objective, networks, iteration, text):
    """The generator's gradient by its definition in x0 space, in one graph."""
    generator, fake, teacher = networks[0], networks[1], CaptionedNetwork(networks[2])
    draws = drawn((0, 1, 2), iteration=iteration)
    captions = text.text

    def x0_of(network, x_t, sigma, caption):
        return x_t - sigma.reshape(-1, 1, 1, 1, 1) * network(x_t, sigma, caption)

    def step(x0, look, direction_of):
        sigma = look.sigma.reshape(-1, 1, 1, 1, 1)
        x_t = ((1 - sigma) * x0 + sigma * look.noise).detach()
        c, u = (x0_of(teacher, x_t, look.sigma, each) for each in (captions, 0 * captions))
        f = x0_of(fake, x_t, look.sigma, captions)
        n = (x0 - c).abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp_min(0.1)
        return 0.5 * (x0 - (x0 + direction_of(c, u, f) / n).detach()).square().mean()

    left = rollout_exit(
        generator, draws.grid, draws.initial_noise, captions, draws.exit_step, keep_graph=True
    )
    start = draws.off.start
    beside = left.x_t + (start - left.sigma).reshape(-1, 1, 1, 1, 1) * left.velocity
    off = x0_of(generator, beside.detach(), start, captions)
    loss = step(left.x0, draws, lambda c, u, f: c - f)
    loss = loss + step(left.x0, draws.guide, lambda c, u, f: (SCALE - 1) * (c - u))
    weight = objective.off_trajectory * min(1, iteration / 4)
    loss = loss + weight * step(off, draws.off, lambda c, u, f: c - f)
    return torch.autograd.grad(loss, list(generator.parameters()))


def test_the_query_at_a_look_has_its_samples_and_its_noise():
    query, draws = random_query(), drawn((0, 1, 2))
    guide = dataclasses.replace(query, guide=draws.guide).at(draws.guide)
    assert guide.x0 is query.x0
    assert guide.sigma is draws.guide.sigma
    other = dataclasses.replace(draws.off, x0=draws.noise)
    assert query.at(other).x0 is draws.noise
    loss = distribution_matching_loss(with_leaf(query), torch.ones_like(query.x0))
    assert loss.value.item() == 0.5
