"""The baselines beside SGMD: their gradients by two other roads, and what they have in common."""

import dataclasses

import pytest
import torch

from sgmd_core.errors import ConfigError
from sgmd_core.objectives import GradientPath
from sgmd_core.objectives.cdm import CdmObjective
from sgmd_core.objectives.diversity import anchor_velocity, diversity_loss
from sgmd_core.objectives.dmd import DmdObjective, matching_direction
from sgmd_core.objectives.dmd2 import Dmd2Objective
from sgmd_core.objectives.pdmd import PdmdObjective
from sgmd_core.objectives.phased import PhasedObjective
from sgmd_core.objectives.rcm import RcmObjective
from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.objectives.sid import SidObjective
from sgmd_core.objectives.tmd import TmdObjective
from sgmd_core.objectives.tsg_fisher import TsgFisherObjective
from sgmd_core.objectives.tsg_sim import TsgSimObjective
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.types import detached, per_sample
from sgmd_core.worlds.gaussian import gaussian_velocity, x0_gain
from tests.helpers.noises import balanced_noises
from tests.helpers.queries import make_query
from tests.helpers.small_network import (
    SmallNetwork,
    predict,
    random_query,
    with_leaf,
    x0_prediction,
)

STEP = 1e-5
EPS = 1e-8
OBJECTIVES = {
    "dmd": DmdObjective(),
    "dmd2": Dmd2Objective(),
    "pdmd": PdmdObjective(),
    "cdm": CdmObjective(normalizer_min=0.0),
    "phased_dmd": PhasedObjective(normalizer_min=0.0),
    "tsg_fisher-released": TsgFisherObjective(),
    "tsg_fisher-paper": TsgFisherObjective(form="paper"),
    "tsg_sim-released": TsgSimObjective(),
    "tsg_sim-paper": TsgSimObjective(form="paper"),
    "tmd": TmdObjective(),
    "rcm": RcmObjective(normalizer_min=0.0, matching_weight=0.5),
    "sid-1": SidObjective(),
    "sid-0.6": SidObjective(square_weight=0.6),
}
ALL = pytest.mark.parametrize("name", OBJECTIVES)


@pytest.fixture
def fake():
    return SmallNetwork(seed=1)


@pytest.fixture
def teacher():
    return SmallNetwork(seed=2)


def element_mean(values: torch.Tensor) -> torch.Tensor:
    return values.mean(dim=(1, 2, 3, 4), keepdim=True)


def projected(gap: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return gap - element_mean(gap * residual) / element_mean(residual.square()) * residual


def weight_at(base, x0_teacher, form):
    sigma = per_sample(base.sigma, base.x0)
    if form == "paper":
        return (1 - sigma) ** 2 / sigma**4
    return 1 / (element_mean((base.x0 - x0_teacher).abs()) + EPS)


def loss_by_definition(name, fake, teacher, query, base):
    """The loss in x0 space, everything that is stopped held at `base`."""
    method, _, option = name.partition("-")
    teacher_base = x0_prediction(teacher, base)
    x0_fake = x0_prediction(fake, query)
    if method in ("dmd", "dmd2", "pdmd", "cdm", "phased_dmd", "rcm", "tmd"):
        distance = element_mean((base.x0 - teacher_base).abs())
        gap = x0_prediction(fake, base) - teacher_base
        if method == "pdmd":
            gap = projected(gap, x0_prediction(fake, base) - base.x0)
        target = base.x0 - gap / distance
        if method == "rcm":
            return 0.5 * (query.x0 - target).square().flatten(1).sum(dim=1).mean()
        return 0.5 * (query.x0 - target).square().mean()
    if method == "tsg_fisher":
        weight = weight_at(base, teacher_base, option)
        return (0.5 * weight * (x0_fake - teacher_base).square()).mean()
    if method == "tsg_sim":
        weight = weight_at(base, teacher_base, option)
        return (weight * (x0_fake - teacher_base) * (query.x0 - x0_fake)).mean()
    x0_teacher = x0_prediction(teacher, query)
    back, factor = x0_teacher - x0_fake, float(option)
    product = back * ((x0_teacher - query.x0) - factor * back)
    return (weight_at(base, teacher_base, "released") * product).mean()


@ALL
def test_generator_gradient_agrees_with_finite_differences(name, fake, teacher):
    base, query = random_query(), with_leaf(random_query())
    loss = OBJECTIVES[name].generator_loss(query, predict(fake, query), predict(teacher, query))
    (gradient,) = torch.autograd.grad(loss.value, query.x0)
    numeric = torch.empty_like(gradient).flatten()
    with torch.no_grad():
        expected = loss_by_definition(name, fake, teacher, base, base)
        for index in range(numeric.numel()):
            ends = []
            for sign in (1, -1):
                x0 = base.x0.clone()
                x0.view(-1)[index] += sign * STEP
                moved = dataclasses.replace(base, x0=x0)
                ends.append(loss_by_definition(name, fake, teacher, moved, base))
            numeric[index] = (ends[0] - ends[1]) / (2 * STEP)
    torch.testing.assert_close(loss.value.detach(), expected)
    scale = gradient.abs().max()
    torch.testing.assert_close(gradient.flatten() / scale, numeric / scale, atol=1e-8, rtol=0)


@ALL
def test_generator_gradient_has_its_closed_form_where_the_jacobians_are_known(name):
    sigma = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    z, noise = balanced_noises(len(sigma), torch.float64)
    query = with_leaf(make_query(1.2 + 0.8 * z, noise, sigma))
    own, wanted = (torch.full_like(sigma, std) for std in (0.8, 0.5))
    velocity_fake = gaussian_velocity(query.x_t, sigma, torch.full_like(sigma, 1.2), own)
    velocity_teacher = gaussian_velocity(query.x_t, sigma, torch.full_like(sigma, 0.7), wanted)
    loss = OBJECTIVES[name].generator_loss(query, velocity_fake, velocity_teacher)
    (gradient,) = torch.autograd.grad(loss.value, query.x0)

    with torch.no_grad():
        level = per_sample(sigma, z)
        x0_fake, x0_teacher = (
            query.x_t - level * velocity for velocity in (velocity_fake, velocity_teacher)
        )
        jacobian, of_teacher = (
            per_sample((1 - sigma) * x0_gain(sigma, s), z) for s in (own, wanted)
        )
        gap, residual = x0_fake - x0_teacher, query.x0 - x0_fake
        error = query.x0 - x0_teacher
        method, _, option = name.partition("-")
        form = option if option in ("released", "paper") else "released"
        weight = weight_at(query, x0_teacher, form)
        factor = float(option) if method == "sid" else 1.0
        upstream = {
            "dmd": weight * gap,
            "dmd2": weight * gap,
            "tmd": weight * gap,
            "cdm": weight * gap,
            "phased_dmd": weight * gap,
            "rcm": weight * gap * gap[0].numel(),
            "pdmd": weight * projected(gap, residual),
            "tsg_fisher": jacobian * weight * gap,
            "tsg_sim": weight * (gap + jacobian * (residual - gap)),
            "sid": weight
            * (
                gap
                + jacobian * (error - 2 * factor * gap)
                - of_teacher * (error + gap - 2 * factor * gap)
            ),
        }[method]
    torch.testing.assert_close(gradient, upstream / gap.numel(), rtol=1e-6, atol=1e-12)


@ALL
def test_tracking_gradient_agrees_with_finite_differences(name, fake):
    query, objective = random_query(), OBJECTIVES[name]
    weights = list(fake.parameters())
    value = objective.tracking_loss(query, predict(fake, query)).value
    gradients = torch.autograd.grad(value, weights)
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            for index in (0, 7, weight.numel() - 1):
                ends = []
                for sign in (1, -1):
                    weight.view(-1)[index] += sign * STEP
                    ends.append(objective.tracking_loss(query, predict(fake, query)).value)
                    weight.view(-1)[index] -= sign * STEP
                numeric = ((ends[0] - ends[1]) / (2 * STEP)).item()
                assert gradient.view(-1)[index].item() == pytest.approx(numeric, abs=1e-9)


@pytest.mark.parametrize("objective", [DmdObjective(), Dmd2Objective(), SidObjective()])
def test_the_plain_denoising_loss_is_the_mean_squared_velocity_error(objective, fake):
    query = random_query()
    velocity = predict(fake, query)
    loss = objective.tracking_loss(query, velocity)
    expected = (velocity - (query.noise - query.x0)).square().mean()
    torch.testing.assert_close(loss.value, expected)
    torch.testing.assert_close(2 * loss.terms["residual_contraction"], loss.terms["tracking"])


@ALL
def test_who_gets_a_gradient_from_the_generator_loss_is_what_the_path_says(name, fake, teacher):
    objective, query = OBJECTIVES[name], with_leaf(random_query())
    predictions = [predict(network, detached(query)) for network in (fake, teacher)]
    leaves = [prediction.detach().requires_grad_() for prediction in predictions]
    loss = objective.generator_loss(query, *leaves)
    of_fake, of_teacher = torch.autograd.grad(loss.value, leaves, allow_unused=True)
    assert (of_fake is not None) == (objective.path is not GradientPath.SAMPLE)
    assert (of_teacher is not None) == (objective.path is GradientPath.BOTH_SCORES)


@ALL
def test_generator_gets_no_gradient_from_the_tracking_target(name, fake):
    query = with_leaf(random_query())
    loss = OBJECTIVES[name].tracking_loss(query, predict(fake, detached(query)))
    assert torch.autograd.grad(loss.value, query.x0, allow_unused=True) == (None,)


@ALL
def test_half_precision_predictions_are_widened_and_finite(name):
    query = with_leaf(random_query(torch.float32))
    halves = [predict(SmallNetwork(seed, torch.float32), query).bfloat16() for seed in (1, 2)]
    loss = OBJECTIVES[name].generator_loss(query, *halves)
    assert loss.value.dtype is torch.float32
    assert torch.autograd.grad(loss.value, query.x0)[0].isfinite().all()


@ALL
@pytest.mark.parametrize("which", [0, 1])
def test_predictions_whose_sums_overflow_are_never_no_direction(name, which):
    query = with_leaf(random_query(torch.float32))
    predictions = [predict(SmallNetwork(seed, torch.float32), query) for seed in (1, 2)]
    # Finite, as a role demands; a sum of it over the elements is not.
    predictions[which] = predictions[which] * 0 + 3e38
    loss = OBJECTIVES[name].generator_loss(query, *predictions)
    gradient = torch.autograd.grad(loss.value, query.x0)[0]
    assert not (loss.value.isfinite() and gradient.isfinite().all())


@pytest.mark.parametrize("form", ["released", "paper"])
def test_sgmd_without_its_potential_is_tsg_fisher_to_the_bit(form):
    fake, teacher = SmallNetwork(1, torch.float32), SmallNetwork(2, torch.float32)
    results = []
    for objective in (TsgFisherObjective(form=form), SgmdObjective(form=form, lambda_nr=0.0)):
        query = with_leaf(random_query(torch.float32))
        velocity = predict(fake, query)
        loss = objective.generator_loss(query, velocity, predict(teacher, query))
        gradients = torch.autograd.grad(loss.value, [query.x0, velocity])
        tracking = objective.tracking_loss(detached(query), predict(fake, detached(query)))
        of_weights = torch.autograd.grad(tracking.value, list(fake.parameters()))
        bits = (loss.value, *gradients, tracking.value, *of_weights)
        results.append([value.detach().view(torch.int32) for value in bits])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_sid_with_factor_one_is_tsg_sim_whose_teacher_gets_a_gradient(fake, teacher):
    results = []
    for objective, seen in ((TsgSimObjective(), detached), (SidObjective(), lambda query: query)):
        query = with_leaf(random_query())
        velocity_teacher = predict(teacher, seen(query))
        loss = objective.generator_loss(query, predict(fake, query), velocity_teacher)
        results.append((loss.value.detach(), torch.autograd.grad(loss.value, query.x0)[0]))
    (value_sim, gradient_sim), (value_sid, gradient_sid) = results
    torch.testing.assert_close(value_sid, value_sim)
    assert (gradient_sid - gradient_sim).abs().max() > 1e-3
    query = with_leaf(random_query())
    constant = predict(teacher, detached(query))
    loss = SidObjective().generator_loss(query, predict(fake, query), constant)
    # The teacher's prediction held constant is not its velocity held constant: x_t moves with x0.
    (partial,) = torch.autograd.grad(loss.value, query.x0)
    assert (partial - gradient_sim).abs().max() > 1e-3


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_sid_descends_the_fisher_divergence_where_the_fake_score_is_exact(sigma):
    """Its gradient is sigma^4 / (n alpha^2) times that of half the divergence.

    The samples x_t of the divergence stay where they are; what moves is the generator's score.
    """
    level = torch.tensor([sigma], dtype=torch.float64)
    alpha, mu, s = 1 - level, 0.7, 0.5
    z, noise = balanced_noises(1, torch.float64)
    generator = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.2, 0.8)]
    mean, std = generator
    query = make_query(mean + std * z, noise, level)
    own = [value.detach().reshape(1) for value in generator]
    wanted = [torch.tensor([value], dtype=torch.float64) for value in (mu, s)]
    velocity_fake = gaussian_velocity(query.x_t, level, *own)
    velocity_teacher = gaussian_velocity(query.x_t, level, *wanted)
    loss = SidObjective().generator_loss(query, velocity_fake, velocity_teacher)
    found = torch.autograd.grad(loss.value, generator)

    # Both scores are -(x - alpha m) / d, and x is N(alpha m, d) with m and d as they are now.
    ours, theirs = alpha**2 * std**2 + level**2, alpha**2 * s**2 + level**2
    slope = 1 / theirs - 1 / ours
    offset = alpha * (mean - mean.detach()) / ours + alpha * (mean.detach() - mu) / theirs
    fisher = slope**2 * ours.detach() + offset**2
    expected = torch.autograd.grad(0.5 * fisher.sum(), generator)
    x0_teacher = query.x_t - level.reshape(1, 1, 1, 1, 1) * velocity_teacher
    residual = (query.x0 - x0_teacher).abs().mean().detach() + EPS
    for one, other in zip(found, expected, strict=True):
        scaled = other * level.squeeze() ** 4 / (residual * alpha.squeeze() ** 2)
        torch.testing.assert_close(one, scaled, rtol=1e-9, atol=1e-12)
    assert loss.value.item() == pytest.approx(0, abs=1e-12)


def test_dmd_moves_samples_by_the_normalised_gap_and_reports_half_its_square(fake, teacher):
    query = with_leaf(random_query())
    loss = DmdObjective().generator_loss(query, predict(fake, query), predict(teacher, query))
    (gradient,) = torch.autograd.grad(loss.value, query.x0)
    with torch.no_grad():
        x0_fake, x0_teacher = x0_prediction(fake, query), x0_prediction(teacher, query)
        direction = (x0_fake - x0_teacher) / element_mean((query.x0 - x0_teacher).abs())
    torch.testing.assert_close(gradient, direction / direction.numel())
    torch.testing.assert_close(loss.value.detach(), 0.5 * direction.square().mean())


def test_dmd_has_no_direction_where_both_scores_reproduce_the_sample():
    query = with_leaf(random_query(torch.float32))
    exact = query.velocity.detach()
    loss = DmdObjective().generator_loss(query, exact, exact)
    (gradient,) = torch.autograd.grad(loss.value, query.x0)
    assert loss.value.item() == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_the_direction_of_dmd_keeps_its_digits_at_little_noise(fake, teacher):
    query = dataclasses.replace(
        random_query(torch.float32), sigma=torch.full((3,), 0.02, dtype=torch.float32)
    )
    velocities = [predict(SmallNetwork(seed, torch.float32), query) for seed in (1, 2)]
    found = matching_direction(query, *velocities).double()
    wide = dataclasses.replace(
        query, x0=query.x0.double(), noise=query.noise.double(), sigma=query.sigma.double()
    )
    expected = matching_direction(wide, *(velocity.double() for velocity in velocities))
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-6


def test_dmd2_differs_from_dmd_in_its_two_time_scales_alone(fake, teacher):
    assert (DmdObjective().fake_updates, Dmd2Objective().fake_updates) == (1, 5)
    gradients = []
    for objective in (DmdObjective(), Dmd2Objective()):
        query = with_leaf(random_query())
        loss = objective.generator_loss(query, predict(fake, query), predict(teacher, query))
        gradients.append(torch.autograd.grad(loss.value, query.x0)[0])
    assert torch.equal(*gradients)


def test_the_printed_divisor_of_tmd_keeps_the_step_where_the_scores_nearly_agree(fake, teacher):
    """The residual's falls with the gap, and both point the same way."""
    query = with_leaf(random_query())
    one, other = (predict(each, detached(query)).detach() for each in (fake, teacher))
    lengths: dict[str, list[float]] = {}
    for nearness in (1.0, 1e-3):
        near = other + nearness * (one - other)
        steps = {
            name: matching_direction(query, near, other, by_own_length=name == "gap")
            for name in ("gap", "residual")
        }
        for name, step in steps.items():
            loss = TmdObjective(normalizer=name).generator_loss(query, near, other)
            (gradient,) = torch.autograd.grad(loss.value, query.x0)
            torch.testing.assert_close(gradient * gradient.numel(), step)
            lengths.setdefault(name, []).append(step.abs().mean().item())
        cosine = torch.nn.functional.cosine_similarity(
            steps["gap"].flatten(1), steps["residual"].flatten(1)
        )
        torch.testing.assert_close(cosine, torch.ones_like(cosine))
    assert lengths["gap"] == pytest.approx([1.0, 1.0])
    assert lengths["residual"][1] == pytest.approx(1e-3 * lengths["residual"][0])


def test_ratios_are_those_of_the_methods():
    ratios = {type(one).__name__: one.fake_updates for one in OBJECTIVES.values()}
    assert SgmdObjective().fake_updates == 1
    assert ratios == {
        "DmdObjective": 1,
        "Dmd2Objective": 5,
        "PdmdObjective": 1,
        "CdmObjective": 2,
        "PhasedObjective": 5,
        "TsgFisherObjective": 5,
        "TsgSimObjective": 1,
        "SidObjective": 5,
        "RcmObjective": 4,
        "TmdObjective": 5,
    }


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (DmdObjective, {"fake_updates": 0}),
        (Dmd2Objective, {"fake_updates": -1}),
        (DmdObjective, {"normalizer_min": -0.1}),
        (SgmdObjective, {"fake_updates": 0}),
        (TsgFisherObjective, {"normalizer_eps": 0.0}),
        (TsgSimObjective, {"sigma_floor": -1.0}),
        (SidObjective, {"square_weight": float("nan")}),
    ],
)
def test_numbers_that_mean_nothing_are_refused_by_name(kind, settings):
    (name,) = settings
    with pytest.raises(ConfigError, match=name):
        kind(**settings)


def test_the_anchor_velocity_is_the_straight_line_that_the_teacher_walked():
    # A teacher of constant velocity v: after any number of Euler steps the line is v itself.
    noise, velocity = torch.randn(2, 2, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    for steps in (1, 3, 6):
        anchor_sigma = float(FlowMatchSchedule(shift=5.0).few_step_grid(6)[steps])
        anchor = noise + (anchor_sigma - 1) * velocity
        torch.testing.assert_close(
            anchor_velocity(noise, anchor, anchor_sigma), velocity, rtol=1e-4, atol=1e-5
        )


def test_the_diversity_loss_is_a_plain_mean_square_and_its_target_gets_nothing():
    velocity = torch.full((2, 1, 1, 2, 2), 3.0, requires_grad=True)
    target = torch.full((2, 1, 1, 2, 2), 1.0, requires_grad=True)
    loss = diversity_loss(velocity, target)
    assert loss.item() == 4.0
    of_velocity, of_target = torch.autograd.grad(loss, [velocity, target], allow_unused=True)
    assert torch.equal(of_velocity, torch.full_like(velocity, 2 * 2.0 / 8))
    assert of_target is None
