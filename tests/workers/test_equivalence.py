"""Split over roles = one plain step; many micro-batches = one; replayed = drawn; truth in 1-D."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from sgmd_core.errors import ShapeError
from sgmd_core.objectives import GradientPath
from sgmd_core.objectives.diversity import anchor_velocity
from sgmd_core.objectives.dmd import DmdObjective
from sgmd_core.objectives.dmd2 import Dmd2Objective
from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.objectives.sid import SidObjective
from sgmd_core.objectives.tsg_fisher import TsgFisherObjective
from sgmd_core.objectives.tsg_sim import TsgSimObjective
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.seeds import RolloutRule, draw
from sgmd_core.types import (
    MicroBatchKey,
    NoisedBatch,
    Purpose,
    TeacherPrediction,
    TextBatch,
    per_sample,
)
from sgmd_core.velocity import Guidance, guided_velocity
from sgmd_core.worlds.gaussian import AffineGenerator, LearnedGaussian, x0_gain
from tests.helpers.moves import assert_moves, relative_error
from tests.helpers.roles import (
    SEED,
    gather,
    gradients,
    iterate,
    key_of,
    negative_text,
    same_bits,
    text_batch,
    tiny_roles,
    weights,
)
from tests.helpers.tiny_wan import LATENT_SHAPE
from workers.ema import AveragedWeights
from workers.fake_score_tracker import FakeScoreTracker
from workers.generator_learner import GeneratorLearner
from workers.network_settings import OptimizerSettings
from workers.score_teacher import ScoreTeacher
from workers.settings import (
    DiversitySettings,
    FakeScoreSettings,
    GeneratorSettings,
    TeacherSettings,
)

FORMS = pytest.mark.parametrize("form", ["released", "paper"])


OBJECTIVES = {
    "sgmd-released": SgmdObjective(),
    "sgmd-paper": SgmdObjective(form="paper"),
    "dmd": DmdObjective(),
    "tsg_fisher": TsgFisherObjective(),
    "tsg_sim": TsgSimObjective(),
    "sid": SidObjective(),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("exit_step", [0, 3])
def test_split_gradients_equal_those_of_one_plain_step_bitwise(name, exit_step):
    objective = OBJECTIVES[name]
    split, fused = (tiny_roles(objective=objective) for _ in range(2))
    split.objective = replace(objective, fake_updates=1)
    text, key = text_batch([0, 1, 2]), key_of(0)
    schedule = FlowMatchSchedule()
    draws = draw(SEED, key, text.sample_indices, LATENT_SHAPE, schedule, 4)
    draws = replace(draws, exit_step=exit_step)
    gather(split, 0, [(0, 1, 2)], [draws])

    generator, fake_score, teacher = (
        fused.networks[name] for name in ("generator", "fake_score", "teacher")
    )
    grid = schedule.few_step_grid(4)
    x = draws.initial_noise
    with torch.no_grad():
        for step in range(exit_step):
            level = grid[step].expand(3)
            x = x + (grid[step + 1] - grid[step]) * generator(x, level, text.text)
    x0 = x - grid[exit_step] * generator(x, grid[exit_step].expand(3), text.text)
    query = NoisedBatch(x0, draws.sigma, draws.noise, text.text, key)
    with torch.set_grad_enabled(objective.path is GradientPath.BOTH_SCORES):
        velocity_teacher = guided_velocity(
            teacher, query.x_t, query.sigma, query.text, Guidance(negative_text(), 2.0)
        )
    constant = {name: value.detach() for name, value in fake_score.named_parameters()}
    velocity_fake = functional_call(fake_score, constant, (query.x_t, query.sigma, query.text))
    objective.generator_loss(query, velocity_fake, velocity_teacher).value.backward()
    still = replace(query, x0=x0.detach())
    velocity_fake = fake_score(still.x_t, still.sigma, still.text)
    objective.tracking_loss(still, velocity_fake).value.backward()

    # The same noise for other captions.
    other = tiny_roles(objective=objective)
    other.objective = split.objective
    gather(other, 0, [(3, 4, 5)], [draws])
    for name, network in (("generator", generator), ("fake_score", fake_score)):
        assert_moves(gradients(network), gradients(other.networks[name]))
        assert same_bits(gradients(split.networks[name]), gradients(network))


@pytest.mark.slow
@FORMS
@pytest.mark.parametrize("batches", [[(0, 1), (2, 3)], [(0,), (1, 2, 3)], [(0,), (1,), (2,), (3,)]])
def test_gradients_of_micro_batches_add_up_to_those_of_one_batch(form, batches):
    # Sums in another order: 1e-5 of the largest entry.
    whole, parts = tiny_roles(form=form), tiny_roles(form=form)

    def drawn(index, batch):
        key = key_of(0, index)
        draws = draw(SEED, key, batch, LATENT_SHAPE, FlowMatchSchedule(), 4)
        return replace(draws, exit_step=2)

    gather(whole, 0, [(0, 1, 2, 3)], [drawn(0, (0, 1, 2, 3))])
    gather(parts, 0, batches, [drawn(index, batch) for index, batch in enumerate(batches)])
    for role in ("generator", "fake_score"):
        error = relative_error(gradients(parts.networks[role]), gradients(whole.networks[role]))
        assert error < 1e-5
        # A micro-batch that was left out would be noticed.
        one = tiny_roles(form=form)
        gather(one, 0, [(0, 1, 2)], [drawn(0, (0, 1, 2))])
        assert_moves(gradients(whole.networks[role]), gradients(one.networks[role]), 1e-5)


def test_shared_tracking_and_a_forward_of_its_own_give_the_same_gradient_bitwise():
    shared, fresh = tiny_roles("shared"), tiny_roles("fresh")
    for query in gather(shared, 0, [(0, 1), (2, 3)]):
        fresh.fake_score.track(query, share=0.5)
    once = tiny_roles()
    gather(once, 0, [(0, 1)])
    found, expected = (gradients(roles.networks["fake_score"]) for roles in (shared, fresh))
    assert_moves(expected, gradients(once.networks["fake_score"]))
    assert same_bits(found, expected)


def test_a_recorded_iteration_is_replayed_from_its_draws_bitwise():
    drawn, replayed = tiny_roles(), tiny_roles()
    recorded = [
        draw(SEED, key_of(0, index), batch, LATENT_SHAPE, FlowMatchSchedule(), 4)
        for index, batch in enumerate([(0, 1), (2, 3)])
    ]
    first = gather(drawn, 0, [(0, 1), (2, 3)])
    second = gather(replayed, 0, [(0, 1), (2, 3)], recorded)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.x0, other.x0)
        assert torch.equal(one.x_t, other.x_t)
    other = tiny_roles()
    gather(other, 0, [(4, 5), (6, 7)])
    for role in ("generator", "fake_score"):
        assert_moves(gradients(drawn.networks[role]), gradients(other.networks[role]))
        assert same_bits(gradients(drawn.networks[role]), gradients(replayed.networks[role]))


def test_handed_draws_are_used_and_the_seed_is_not():
    roles = tiny_roles()
    text = text_batch([0, 1])
    other = draw(SEED + 1, key_of(0), (0, 1), LATENT_SHAPE, FlowMatchSchedule(), 4)
    query = roles.generator.rollout(key_of(0), text, other)
    assert torch.equal(query.noise, other.noise)
    assert torch.equal(query.sigma, other.sigma)


def test_fresh_tracking_sees_samples_of_the_updated_generator():
    roles = tiny_roles("fresh")
    gather(roles, 0, [(0, 1)])
    key = key_of(0, purpose=Purpose.TRACK)
    before = roles.generator.sample(key, text_batch([0, 1]))
    roles.generator.gradient_report(0)
    roles.generator.step(0)
    after = roles.generator.sample(key, text_batch([0, 1]))
    assert (before.generator_version, after.generator_version) == (0, 1)
    assert torch.equal(before.noise, after.noise)
    assert not torch.equal(before.x0, after.x0)


@pytest.mark.parametrize("tracking", ["shared", "fresh"])
def test_iterations_change_both_learners_and_never_the_teacher(tracking):
    roles = tiny_roles(tracking)
    before = {name: weights(network) for name, network in roles.networks.items()}
    for iteration in range(2):
        iterate(roles, iteration)
    assert not same_bits(weights(roles.networks["generator"]), before["generator"])
    assert not same_bits(weights(roles.networks["fake_score"]), before["fake_score"])
    assert same_bits(weights(roles.networks["teacher"]), before["teacher"])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_signal_is_the_same_in_both_tracking_modes_bitwise(name):
    found = []
    for tracking in ("shared", "fresh"):
        roles = tiny_roles(tracking, objective=OBJECTIVES[name])
        query = roles.generator.rollout(key_of(0), text_batch([0, 1]))
        prediction = roles.teacher.denoise(query, negative_text())
        found.append(roles.fake_score.signal(query, prediction, share=0.5))
    shared, fresh = found
    other = roles.generator.rollout(key_of(0, 1), text_batch([2, 3]))
    prediction = roles.teacher.denoise(other, negative_text())
    signal = roles.fake_score.signal(other, prediction, share=0.5)
    assert_moves({"signal": fresh.grad_x0}, {"signal": signal.grad_x0})
    assert torch.equal(shared.grad_x0, fresh.grad_x0)
    assert shared.metrics == fresh.metrics


def test_several_tracking_updates_make_one_iteration_and_each_sees_samples_of_its_own():
    roles = tiny_roles("fresh", objective=Dmd2Objective(fake_updates=3))
    seen = []
    roles.networks["fake_score"].register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0].detach().clone())
    )
    for iteration in range(2):
        iterate(roles, iteration, ((0, 1),))
    assert roles.fake_score._optimizer.updates == 6
    assert len(seen) == 2 * (1 + 3)
    for index, one in enumerate(seen):
        assert not any(torch.isclose(one, other).any() for other in seen[index + 1 :])


@pytest.mark.slow
def test_sgmd_without_its_potential_and_at_ratio_five_is_tsg_fisher_to_the_bit():
    runs = []
    for objective in (
        TsgFisherObjective(),
        SgmdObjective(lambda_nr=0.0, fake_updates=5),
        SgmdObjective(fake_updates=5),
    ):
        roles = tiny_roles("fresh", objective=objective)
        for iteration in range(2):
            iterate(roles, iteration, ((0, 1),))
        runs.append([weights(roles.networks[role]) for role in ("generator", "fake_score")])
    for one, other, with_potential in zip(*runs, strict=True):
        assert_moves(one, with_potential)
        assert same_bits(one, other)


def test_the_diversity_loss_adds_the_gradient_of_the_teachers_path_bitwise():
    settings = DiversitySettings(weight=0.05, teacher_steps=4, anchor_step=2)
    roles, plain = tiny_roles(diversity=settings), tiny_roles(diversity=settings)
    text, schedule = text_batch([0, 1, 2]), FlowMatchSchedule()
    gather(roles, 0, [(0, 1, 2)])

    query = plain.generator.rollout(key_of(0), text)
    prediction = plain.teacher.denoise(query, negative_text())
    plain.generator.learn(plain.fake_score.signal(query, prediction, 1.0))
    without = gradients(plain.networks["generator"])
    draws = draw(SEED, key_of(0), text.sample_indices, LATENT_SHAPE, schedule, 4, RolloutRule(1))
    network, teacher = plain.networks["generator"], plain.networks["teacher"]
    noise, grid = draws.initial_noise, schedule.few_step_grid(4)
    with torch.no_grad():
        x = noise
        for step in range(2):
            level = grid[step].expand(3)
            velocity = guided_velocity(teacher, x, level, text.text, Guidance(negative_text(), 2.0))
            x = x + (grid[step + 1] - grid[step]) * velocity
        target = anchor_velocity(noise, x, float(grid[2]))
    velocity = network(noise, torch.ones(3), text.text)
    (0.05 * (velocity - target).square().mean()).backward()
    assert_moves(gradients(network), without)
    assert same_bits(gradients(roles.networks["generator"]), gradients(network))


@pytest.mark.slow
def test_with_diversity_no_rollout_exits_at_the_first_step():
    settings = DiversitySettings(weight=0.05)
    learner = tiny_roles(diversity=settings).generator
    exits = set()
    for micro_batch in range(40):
        key = key_of(0, micro_batch)
        learner.rollout(key, text_batch([0]))
        exits.add(learner._kept[key].exit_step)
    assert exits == {1, 2, 3}


def test_mixing_takes_the_generators_weights_in_by_the_share_that_was_set():
    roles = tiny_roles("fresh", objective=Dmd2Objective(), ida_decay=0.75)
    fake_score, generator = (weights(roles.networks[n]) for n in ("fake_score", "generator"))
    roles.fake_score.mix_weights(roles.generator.trained_weights())
    for name, value in weights(roles.networks["fake_score"]).items():
        expected = 0.75 * fake_score[name] + 0.25 * generator[name]
        assert_moves({name: expected}, {name: fake_score[name]}, 1e-6)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    assert same_bits(weights(roles.networks["generator"]), generator)


def test_an_average_that_starts_later_is_the_weights_until_then():
    roles = tiny_roles()
    roles.generator._average = AveragedWeights(roles.networks["generator"], 0.9, start=2)
    for iteration in range(2):
        iterate(roles, iteration)
        assert same_bits(roles.generator.final_weights(), weights(roles.networks["generator"]))
    iterate(roles, 2)
    assert not same_bits(roles.generator.final_weights(), weights(roles.networks["generator"]))


def _no_text(size: int) -> Tensor:
    return torch.zeros(size, 1, 1)


def test_signal_is_the_closed_form_gradient_of_a_gaussian():
    # d L / d x0 = share (1 - sigma) (1 - sigma J) (gap / (n + eps) - lambda residual / sigma) / N
    fake, teacher = LearnedGaussian(0.4, 0.9).double(), LearnedGaussian(0.0, 0.5).double()
    tracker = FakeScoreTracker(fake, SgmdObjective(lambda_nr=0.3), FakeScoreSettings())
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 1, 2, 2, 2, generator=generator, dtype=torch.float64)
    sigma = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
    query = NoisedBatch(x0, sigma, noise, _no_text(3))
    prediction = ScoreTeacher(teacher, TeacherSettings(guidance_scale=1.0)).denoise(
        query, _no_text(1)
    )
    signal = tracker.signal(query, prediction, share=0.25)

    with torch.no_grad():
        level = per_sample(sigma, x0)
        x_t = query.x_t
        x0_fake = x_t - level * fake(x_t, sigma, query.text)
        x0_teacher = x_t - level * teacher(x_t, sigma, query.text)
        normalizer = per_sample((x0 - x0_teacher).abs().flatten(1).mean(1), x0) + 1e-8
        upstream = (x0_fake - x0_teacher) / normalizer + 0.3 * (x0 - x0_fake) / level
        expected = (
            0.25
            * (1 - level)
            * per_sample(x0_gain(sigma, fake.log_std.exp()), x0)
            * upstream
            / x0.numel()
        )
    torch.testing.assert_close(signal.grad_x0, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("tracking", ["shared", "fresh"])
def test_a_shuffled_gap_is_the_same_to_the_bit_in_every_split_of_even_parts(tracking):
    fake, teacher = LearnedGaussian(0.4, 0.9), LearnedGaussian(0.0, 0.5)
    x0, noise = torch.randn(2, 8, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    sigma = torch.linspace(0.2, 0.9, 8)
    answers = ScoreTeacher(teacher, TeacherSettings(guidance_scale=1.0))

    def signals(gap: Literal["own", "shuffled"], part: int) -> dict[str, Tensor]:
        settings = FakeScoreSettings(tracking, gap=gap)
        tracker, found = FakeScoreTracker(fake, SgmdObjective(), settings), list[Tensor]()
        for start in range(0, 8, part):
            own, key = slice(start, start + part), key_of(0, start)
            query = NoisedBatch(x0[own], sigma[own], noise[own], _no_text(part), key)
            prediction = answers.denoise(query, _no_text(1))
            found.append(tracker.signal(query, prediction, share=part / 8).grad_x0)
        return {"grad_x0": torch.cat(found)}

    whole = signals("shuffled", 8)
    assert_moves(whole, signals("own", 8))
    for part in (2, 4):
        assert torch.equal(signals("shuffled", part)["grad_x0"], whole["grad_x0"])
    with pytest.raises(ShapeError, match="even number"):
        signals("shuffled", 1)


@pytest.mark.slow
@pytest.mark.parametrize("tracking", ["shared", "fresh"])
def test_the_roles_lead_a_gaussian_generator_to_the_teacher(tracking):
    # Fisher alone: its fixed point is the teacher itself. The batch's own spread leaves 2 %.
    schedule = FlowMatchSchedule()
    network, seed, shape = AffineGenerator(0.0, 1.0), 5, (1, 2, 8, 8)
    settings = GeneratorSettings(
        num_steps=1, ema_decay=0.0, optimizer=OptimizerSettings(lr=0.02, weight_decay=0.0)
    )
    learner = GeneratorLearner(network, schedule, settings, shape, seed)
    tracker = FakeScoreTracker(
        LearnedGaussian(0.0, 1.0),
        SgmdObjective(lambda_nr=0.0),
        FakeScoreSettings(tracking, OptimizerSettings(lr=0.05, weight_decay=0.0)),
    )
    teacher = ScoreTeacher(LearnedGaussian(0.3, 0.5), TeacherSettings(guidance_scale=1.0))
    text = TextBatch(_no_text(8), tuple(range(8)))
    found: list[tuple[float, float]] = []
    for iteration in range(250):
        query = learner.rollout(MicroBatchKey(iteration, 0), text)
        prediction: TeacherPrediction = teacher.denoise(query, _no_text(1))
        learner.learn(tracker.signal(query, prediction, share=1.0))
        if tracking == "shared":
            tracker.track(query, share=1.0)
        learner.gradient_report(iteration)
        learner.step(iteration)
        if tracking == "fresh":
            fresh = learner.sample(MicroBatchKey(iteration, 0, Purpose.TRACK), text)
            tracker.track(fresh, share=1.0)
        tracker.gradient_report(iteration)
        tracker.step(iteration)
        found.append((network.mean.item(), network.std.item()))
    mean, std = torch.tensor(found[-100:]).mean(dim=0).tolist()
    assert mean == pytest.approx(0.3, abs=0.02)
    assert std == pytest.approx(0.5, rel=0.05)
