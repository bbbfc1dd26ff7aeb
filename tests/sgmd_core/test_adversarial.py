"""Adversarial terms in closed form: values, gradients, and what a best discriminator knows."""

import math
from itertools import pairwise

import pytest
import torch

from sgmd_core.errors import ConfigError
from sgmd_core.objectives import ComparedStates, adversary_of, compared_by
from sgmd_core.objectives.adm import AdmObjective
from sgmd_core.objectives.adversarial import (
    AdversarialTerm,
    approximate_r1,
    discriminated_states,
    discriminator_accuracy,
    finished_gaps,
    gaps_by_noise,
    hinge_discriminator_loss,
    hinge_generator_loss,
    logit_gap,
    noised_alike,
    perturbation,
    probability_flow_step,
    softplus_discriminator_loss,
    softplus_generator_loss,
)
from sgmd_core.objectives.dmd import DmdObjective
from sgmd_core.objectives.dmd2 import Dmd2Objective
from sgmd_core.types import detached
from sgmd_core.worlds.gaussian import gaussian_velocity, velocity_gain
from tests.helpers.small_network import SmallNetwork, predict, random_query, with_leaf
from workers.discriminator_heads import DiscriminatorHead, DiscriminatorHeads


def test_a_discriminator_that_says_nothing_has_known_losses():
    silent = torch.zeros(5)
    assert hinge_discriminator_loss(silent, silent).item() == 2
    assert hinge_generator_loss(silent).item() == 0
    both = softplus_discriminator_loss(silent, silent).item()
    assert both == pytest.approx(2 * math.log(2))
    assert softplus_generator_loss(silent).item() == pytest.approx(math.log(2))
    assert logit_gap(silent, silent).item() == 0


def test_gaps_of_thirds_of_the_noise_are_the_same_however_the_samples_are_split():
    sigma = torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0, 0.95])
    heads = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    gap = (heads[0] - heads[1]).mean(dim=1)
    expected = {"low": gap[:2].mean(), "middle": gap[2], "high": gap[3:].mean()}
    assert (expected["low"] - expected["high"]).abs() > 0.1

    def sums(start: int, stop: int) -> dict[str, float]:
        parts = (heads[0, start:stop], heads[1, start:stop], sigma[start:stop])
        return {name: value.item() for name, value in gaps_by_noise(*parts).items()}

    split = [(2, sums(0, 2)), (4, sums(2, 6))]
    joined = {name: sum(n * part[name] for n, part in split) / 6 for name in split[0][1]}
    for terms in (sums(0, 6), joined):
        found = finished_gaps({"logit_gap": 1.0, **terms})
        assert found.pop("logit_gap") == 1.0
        assert found == pytest.approx(
            {f"logit_gap_{name}": value.item() for name, value in expected.items()}, abs=1e-6
        )
    # A third without samples has none, nor one whose sum was not finite and is left out.
    assert finished_gaps(sums(0, 2)).keys() == {"logit_gap_low"}
    assert finished_gaps({"logit_gap_low_share": 0.5, "tracking": 2.0}) == {"tracking": 2.0}


def test_beyond_the_margins_the_hinge_is_quiet_and_within_them_linear():
    real = torch.tensor([1.5, 0.5], requires_grad=True)
    fake = torch.tensor([-2.0, 0.5], requires_grad=True)
    loss = hinge_discriminator_loss(real, fake)
    assert loss.item() == pytest.approx(0.25 + 0.75)
    of_real, of_fake = torch.autograd.grad(loss, [real, fake])
    assert of_real.tolist() == [0, -0.5]
    assert of_fake.tolist() == [0, 0.5]


def test_softplus_gradients_are_sigmoids():
    fake = torch.tensor([-1.0, 0.3], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(softplus_generator_loss(fake), fake)
    torch.testing.assert_close(found, -torch.sigmoid(-fake.detach()) / 2)


def test_approximate_r1_is_the_squared_gradient_times_the_variance_of_the_noise():
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 3, generator=stream, dtype=torch.float64)
    noise = torch.randn(4000, 3, generator=stream, dtype=torch.float64)

    def logit(values):
        return torch.tanh(values[:, 0]) + 0.5 * values[:, 1]

    penalty = approximate_r1(logit(x), logit(x + 1e-3 * noise)).item() / 1e-6
    squared = ((1 - torch.tanh(x[:, 0]) ** 2) ** 2 + 0.25).mean().item()
    assert penalty == pytest.approx(squared, rel=0.1)


def adm_gradient(query, delta, fake, teacher, direction, *, through_fake=True):
    """The generator's gradient at x0 under a discriminator that is linear along a direction."""
    velocity_fake = predict(fake, query if through_fake else detached(query))
    velocity_teacher = predict(teacher, detached(query))
    _, state = discriminated_states(query, velocity_fake, velocity_teacher, delta)
    return torch.autograd.grad(-(state * direction).sum(), query.x0)[0]


def test_a_linear_discriminator_gives_the_closed_form():
    delta, fake, teacher = 1 / 8, SmallNetwork(1), SmallNetwork(2)
    query = with_leaf(random_query())
    velocities = [predict(each, detached(query)).detach() for each in (fake, teacher)]
    real, state = discriminated_states(query, *velocities, delta)
    assert not real.requires_grad
    # x_real - x_fake = -(delta / sigma) gap
    sigma = query.sigma.reshape(-1, 1, 1, 1, 1)
    gap = sigma * (velocities[1] - velocities[0])
    torch.testing.assert_close(real - state.detach(), -delta / sigma * gap)
    found = adm_gradient(query, delta, fake, teacher, real - state.detach())
    x_t = query.x_t.detach()
    (pulled,) = torch.autograd.functional.vjp(
        lambda at: fake(at, query.sigma, query.text), x_t, delta / sigma * gap
    )[1:]
    expected = (1 - sigma) * (delta / sigma * gap - delta * pulled)
    torch.testing.assert_close(found, expected)


def test_the_direction_tends_to_dmds_as_the_step_gets_short():
    fake, teacher, query = SmallNetwork(1), SmallNetwork(2), with_leaf(random_query())
    velocity = [predict(each, detached(query)) for each in (fake, teacher)]
    wanted = torch.autograd.grad(DmdObjective().generator_loss(query, *velocity).value, query.x0)[
        0
    ].flatten(1)
    cosines, skipped = [], []
    for delta in (1 / 4, 1 / 16, 1 / 64, 1 / 256):
        real, state = discriminated_states(query, *(each.detach() for each in velocity), delta)
        direction = (real - state.detach()) / delta
        own = adm_gradient(query, delta, fake, teacher, direction)
        skip = adm_gradient(query, delta, fake, teacher, direction, through_fake=False)
        cosines.append(torch.cosine_similarity(own.flatten(1), wanted).min().item())
        skipped.append(((own - skip).norm() / skip.norm()).item())
    assert cosines == sorted(cosines)
    assert cosines[-1] > 1 - 1e-4
    # The path through the fake score's input is a correction of the order of the step.
    for wide, narrow in pairwise(skipped):
        assert wide / narrow == pytest.approx(4, rel=1e-6)


def test_a_fake_score_that_is_the_teacher_leaves_nothing_to_see():
    network, query = SmallNetwork(1), random_query()
    velocity = predict(network, query).detach()
    real, fake = discriminated_states(query, velocity, velocity, 1 / 64)
    assert torch.equal(real, fake)
    head = DiscriminatorHead(1, width=8, num_strides=0).double()
    torch.nn.init.normal_(head.last.weight)
    assert logit_gap(head(real), head(fake)).item() == 0


@pytest.mark.parametrize("sigma", [0.3, 0.7])
def test_the_best_discriminator_of_two_gaussians_is_right_as_often_as_their_distance_says(sigma):
    """Both states are Gaussian; the sign of the density difference has accuracy (1 + TV) / 2."""
    stream = torch.Generator().manual_seed(1)
    level, delta = torch.tensor([sigma], dtype=torch.float64), 1 / 64
    mean, std = torch.tensor([1.5], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    x0, noise = torch.randn(2, 1, 1, 1, 1, 400_000, generator=stream, dtype=torch.float64)
    x_t = (1 - sigma) * 0.5 * x0 + sigma * noise
    steps, laws = [], []
    for centre in (mean, 0 * mean):
        velocity = gaussian_velocity(x_t, level, centre, std)
        steps.append(probability_flow_step(x_t, velocity, delta))
        # Affine in x_t, which has mean 0: so is the law of the step.
        gain = 1 - delta * velocity_gain(level, std)
        at_zero = gaussian_velocity(0 * x_t[..., :1], level, centre, std).item()
        variance = gain**2 * ((1 - sigma) ** 2 * 0.25 + sigma**2)
        laws.append((-delta * at_zero, variance.sqrt().item()))
    (one, spread), (other, same) = laws
    assert spread == pytest.approx(same)
    sign = 1 if one > other else -1
    logits = [sign * (each - (one + other) / 2) for each in steps]
    distance = math.erf(abs(one - other) / (2 * math.sqrt(2) * spread))
    found = discriminator_accuracy(*logits).item()
    assert distance > 1e-3
    assert found == pytest.approx(0.5 * (1 + distance), abs=3e-3)


def steps_of_two_scores(
    count: int, stream: torch.Generator, sigma: float = 0.6, delta: float = 0.4
) -> tuple[tuple[torch.Tensor, torch.Tensor], list[torch.distributions.Normal]]:
    """Steps of a Gaussian teacher and of a fake score of another mean and spread, and their laws.

    Both start from the same x_t, which is Gaussian; velocities are affine in it, so are the steps.
    """
    level = torch.tensor([sigma], dtype=torch.float64)
    x0, noise = torch.randn(2, 1, 1, 1, 1, count, generator=stream, dtype=torch.float64)
    x_t = (1 - sigma) * x0 + sigma * noise
    steps, laws = [], []
    for mean, std in ((0.5, 0.3), (0.0, 2.0)):
        centre, spread = (torch.tensor([each], dtype=torch.float64) for each in (mean, std))
        steps.append(
            probability_flow_step(x_t, gaussian_velocity(x_t, level, centre, spread), delta)
        )
        at_zero = gaussian_velocity(0 * x_t[..., :1], level, centre, spread)
        gain = 1 - delta * velocity_gain(level, spread)
        variance = gain**2 * ((1 - sigma) ** 2 + sigma**2)
        laws.append(torch.distributions.Normal(-delta * at_zero.squeeze(), variance.sqrt()))
    return (steps[0].flatten()[:, None], steps[1].flatten()[:, None]), laws


@pytest.mark.slow
def test_a_small_discriminator_learns_to_be_right_as_often_as_the_distance_says():
    """Its boundary has two sides, as the laws differ in spread; 200 updates of the hinge loss."""
    stream = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    head = torch.nn.Sequential(
        torch.nn.Linear(1, 32), torch.nn.SiLU(), torch.nn.Linear(32, 1)
    ).double()
    adam = torch.optim.Adam(head.parameters(), lr=2e-2)
    held, laws = steps_of_two_scores(100_000, stream)
    points = torch.linspace(-20, 20, 40_001, dtype=torch.float64)
    one, other = (law.log_prob(points).exp() for law in laws)
    best = 0.5 * (1 + 0.5 * torch.trapezoid((one - other).abs(), points).item())
    # A threshold, which is all that a linear discriminator has, falls short of it.
    cuts = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    threshold = 0.5 * (1 + (laws[0].cdf(cuts) - laws[1].cdf(cuts)).abs().max().item())
    assert 0.6 < threshold < best - 0.05 < 0.95

    def accuracy() -> float:
        with torch.no_grad():
            return discriminator_accuracy(*(head(each) for each in held)).item()

    untrained = accuracy()
    for _ in range(200):
        real, fake = (head(each) for each in steps_of_two_scores(1024, stream)[0])
        adam.zero_grad()
        hinge_discriminator_loss(real, fake).backward()
        adam.step()
    assert abs(untrained - best) > 0.1
    assert accuracy() == pytest.approx(best, abs=0.01)


class TestTerm:
    REAL, FAKE, MOVED = torch.tensor([[2.0, 0.5]]), torch.tensor([[-3.0, 0.2]]), torch.zeros(1, 2)

    @pytest.mark.parametrize(
        ("loss", "generator", "discriminator"),
        [
            ("hinge", hinge_generator_loss, hinge_discriminator_loss),
            ("softplus", softplus_generator_loss, softplus_discriminator_loss),
        ],
    )
    def test_weights_count_and_terms_do_not_have_them(self, loss, generator, discriminator):
        term = AdversarialTerm(weight=0.25, loss=loss, r1_weight=3.0)
        taught = term.generator_loss(self.FAKE)
        assert taught.value == 0.25 * generator(self.FAKE)
        assert taught.terms == {"adversarial": generator(self.FAKE)}
        own = term.discriminator_loss(self.REAL, self.FAKE, self.MOVED)
        plain, penalty = discriminator(self.REAL, self.FAKE), approximate_r1(self.REAL, self.MOVED)
        assert own.value == plain + 3 * penalty
        assert (own.terms["discriminator"], own.terms["r1"]) == (plain, penalty)
        assert own.terms["discriminator_accuracy"] == 0.75
        assert term.discriminator_loss(self.REAL, self.FAKE, None).value == plain

    @pytest.mark.parametrize(
        "settings", [{"weight": 0.0}, {"r1_weight": -1.0}, {"r1_sigma": 0.0}, {"weight": math.nan}]
    )
    def test_numbers_that_mean_nothing_are_refused(self, settings):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            AdversarialTerm(**settings)

    def test_only_methods_that_have_one_compare(self):
        assert compared_by(AdmObjective()) is ComparedStates.STEPS
        assert compared_by(Dmd2Objective()) is None
        assert adversary_of(Dmd2Objective()) is None
        assert compared_by(Dmd2Objective(adversary=AdversarialTerm())) is ComparedStates.DATA
        assert adversary_of(DmdObjective()) is None

    def test_the_whole_of_adms_loss_is_the_discriminators(self):
        query, fake, teacher = with_leaf(random_query()), SmallNetwork(1), SmallNetwork(2)
        velocities = [predict(each, query) for each in (fake, teacher)]
        loss = AdmObjective().generator_loss(query, *velocities).value
        assert loss == 0
        assert torch.autograd.grad(loss, query.x0)[0].abs().max() == 0
        expected = discriminated_states(query, *velocities, 1 / 16)
        found = AdmObjective(delta=1 / 16).states(query, *velocities)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_data_and_samples_are_noised_alike():
    query = with_leaf(random_query())
    data = torch.ones_like(query.x0) + 0.5
    real, fake = noised_alike(query, data)
    level = query.sigma.reshape(-1, 1, 1, 1, 1)
    assert torch.equal(real, (1 - level) * data + level * query.noise)
    assert not real.requires_grad
    (gradient,) = torch.autograd.grad(fake.sum(), query.x0)
    assert torch.equal(gradient, (1 - level).expand_as(gradient))
    assert torch.equal(noised_alike(query, query.x0)[0], fake.detach())


def test_perturbations_are_counted_by_iteration_and_sample():
    whole = perturbation(3, 5, (0, 1, 2), (2, 4))
    assert torch.equal(whole[1:], perturbation(3, 5, (1, 2), (2, 4)))
    for other in (perturbation(4, 5, (0,), (2, 4)), perturbation(3, 6, (0,), (2, 4))):
        assert not torch.equal(other[0], whole[0])


class TestHeads:
    def test_a_new_head_says_nothing_and_only_its_last_layer_learns_at_first(self):
        features = torch.randn(2, 6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        head = DiscriminatorHead(6, width=32, num_strides=2)
        logits = head(features)
        assert logits.tolist() == [0, 0]
        hinge_discriminator_loss(logits[:1], logits[1:]).backward()
        assert head.last.weight.grad.abs().max() > 0
        assert all(weight.grad.abs().max() == 0 for weight in head.layers.parameters())

    @pytest.mark.parametrize(("size", "strides"), [(2, 1), (8, 3), (16, 2)])
    def test_maps_of_any_size_have_one_logit_a_head(self, size, strides):
        features = [torch.zeros(2, channels, 3, size, size) for channels in (4, 6)]
        assert DiscriminatorHeads((4, 6), 32, strides)(features).shape == (2, 2)

    def test_gradients_pass_through_heads_to_features(self):
        features = torch.randn(2, 4, 2, 4, 4, requires_grad=True)
        head = DiscriminatorHead(4, width=8, num_strides=1)
        torch.nn.init.ones_(head.last.weight)
        hinge_generator_loss(head(features)).backward()
        assert features.grad.abs().max() > 0
