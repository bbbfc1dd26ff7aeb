import dataclasses

import pytest
import torch

from sgmd_core.errors import ConfigError
from sgmd_core.objectives import Objective
from sgmd_core.objectives.fisher import (
    fisher_loss,
    paper_fisher_weight,
    released_fisher_weight,
    teacher_residual,
    x0_gap,
)
from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.types import detached, per_sample
from tests.helpers.queries import make_query
from tests.helpers.small_network import (
    SmallNetwork,
    predict,
    random_query,
    with_leaf,
    x0_prediction,
)

FORMS = ["released", "paper"]
STEP = 1e-5


@pytest.fixture
def fake():
    return SmallNetwork(seed=1)


@pytest.fixture
def teacher():
    return SmallNetwork(seed=2)


def frozen_generator_loss(form, fake, query, base, x0_teacher):
    """The loss in x0 space by its definition, all that is stopped held at `base`.

    Its plain derivative with respect to x0, at `base`, is what the objective's gradient should be.
    """
    sigma = per_sample(query.sigma, query.x0)
    x0_fake, x0_fake_base = x0_prediction(fake, query), x0_prediction(fake, base)
    if form == "paper":
        fisher = ((1 - sigma) ** 2 / sigma**4 * (x0_fake - x0_teacher) ** 2 / 2).mean()
        return fisher - 0.1 * ((base.x0 - x0_fake) ** 2 / 2).mean()
    normalizer = (base.x0 - x0_teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    fisher = ((x0_fake - x0_teacher) ** 2 / (2 * (normalizer + 1e-8))).mean()
    step = (x0_fake_base - base.x0) / sigma
    return fisher - 0.1 * ((x0_fake - (x0_fake_base - step)) ** 2 / 2).mean()


@pytest.mark.parametrize("form", FORMS)
def test_generator_gradient_agrees_with_finite_differences(form, fake, teacher):
    base = random_query()
    x0_teacher = x0_prediction(teacher, base).detach()
    query = with_leaf(base)
    loss = SgmdObjective(form=form).generator_loss(
        query, predict(fake, query), predict(teacher, query)
    )
    (gradient,) = torch.autograd.grad(loss.value, query.x0)

    numeric = torch.empty_like(gradient).flatten()
    with torch.no_grad():
        at_base = frozen_generator_loss(form, fake, base, base, x0_teacher)
        for index in range(numeric.numel()):
            ends = []
            for sign in (1, -1):
                x0 = base.x0.clone()
                x0.view(-1)[index] += sign * STEP
                moved = dataclasses.replace(base, x0=x0)
                ends.append(frozen_generator_loss(form, fake, moved, base, x0_teacher))
            numeric[index] = (ends[0] - ends[1]) / (2 * STEP)
    torch.testing.assert_close(loss.value.detach(), at_base)
    scale = gradient.abs().max()
    torch.testing.assert_close(gradient.flatten() / scale, numeric / scale, atol=1e-8, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_tracking_gradient_agrees_with_finite_differences(form, fake):
    query = random_query()
    objective = SgmdObjective(form=form)
    weights = list(fake.parameters())
    gradients = torch.autograd.grad(
        objective.tracking_loss(query, predict(fake, query)).value, weights
    )
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


def tsg_fisher_loss(form, query, velocity_fake, velocity_teacher):
    if form == "released":
        weight = released_fisher_weight(teacher_residual(query, velocity_teacher), 1e-8)
    else:
        weight = paper_fisher_weight(query.sigma, 1e-8)
    return fisher_loss(x0_gap(query, velocity_fake, velocity_teacher), weight)


def sgmd_loss_without_negative_residual(form, query, velocity_fake, velocity_teacher):
    objective = SgmdObjective(form=form, lambda_nr=0.0)
    return objective.generator_loss(query, velocity_fake, velocity_teacher).value


# A teacher with the fake score's own weights leaves zeros, whose signs are bits too.
@pytest.mark.parametrize("teacher_seed", [2, 1])
@pytest.mark.parametrize("form", FORMS)
def test_without_the_negative_residual_the_loss_is_tsg_fisher_to_the_bit(form, teacher_seed):
    fake, teacher = SmallNetwork(1, torch.float32), SmallNetwork(teacher_seed, torch.float32)
    results = []
    for loss_of in (tsg_fisher_loss, sgmd_loss_without_negative_residual):
        query = with_leaf(random_query(torch.float32))
        velocity_fake = predict(fake, query)
        loss = loss_of(form, query, velocity_fake, predict(teacher, query))
        gradients = torch.autograd.grad(loss, [query.x0, velocity_fake])
        results.append([value.detach().view(torch.int32) for value in (loss, *gradients)])
    for by_term, by_objective in zip(*results, strict=True):
        assert torch.equal(by_term, by_objective)


@pytest.mark.parametrize("form", FORMS)
def test_teacher_gets_no_gradient_from_the_generator_loss(form, fake, teacher):
    query = with_leaf(random_query())
    loss = SgmdObjective(form=form).generator_loss(
        query, predict(fake, query), predict(teacher, query)
    )
    gradients = torch.autograd.grad(loss.value, list(teacher.parameters()), allow_unused=True)
    assert gradients == (None, None)


@pytest.mark.parametrize("form", FORMS)
def test_fake_score_parameters_get_no_gradient_when_the_generator_asks_for_its_own(
    form, fake, teacher
):
    query = with_leaf(random_query())
    loss = SgmdObjective(form=form).generator_loss(
        query, predict(fake, query), predict(teacher, query)
    )
    (gradient,) = torch.autograd.grad(loss.value, query.x0)
    assert gradient.abs().min() > 0
    assert all(weight.grad is None for weight in fake.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_a_fake_score_without_trainable_parameters_gives_the_same_gradient(form, fake, teacher):
    gradients = []
    for trainable in (True, False):
        fake.requires_grad_(trainable)
        query = with_leaf(random_query())
        loss = SgmdObjective(form=form).generator_loss(
            query, predict(fake, query), predict(teacher, query)
        )
        gradients.append(torch.autograd.grad(loss.value, query.x0)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("form", FORMS)
def test_generator_gets_no_gradient_from_the_tracking_target(form, fake):
    query = with_leaf(random_query())
    velocity_fake = predict(fake, detached(query))
    loss = SgmdObjective(form=form).tracking_loss(query, velocity_fake)
    (gradient,) = torch.autograd.grad(loss.value, query.x0, allow_unused=True, retain_graph=True)
    assert gradient is None
    for weight_gradient in torch.autograd.grad(loss.value, list(fake.parameters())):
        assert weight_gradient.abs().max() > 0


@pytest.mark.parametrize("form", FORMS)
def test_one_forward_serves_both_learners(form, fake, teacher):
    # As in shared tracking: the generator's gradient to the leaf, then the fake score's to its
    # parameters, from one graph; each as from a graph of its own.
    objective = SgmdObjective(form=form)
    query = with_leaf(random_query())
    velocity_fake = predict(fake, query)
    loss = objective.generator_loss(query, velocity_fake, predict(teacher, query))
    (grad_x0,) = torch.autograd.grad(loss.value, query.x0, retain_graph=True)
    tracking = objective.tracking_loss(query, velocity_fake).value
    shared = torch.autograd.grad(tracking, list(fake.parameters()))

    own = objective.tracking_loss(detached(query), predict(fake, detached(query))).value
    for left, right in zip(shared, torch.autograd.grad(own, list(fake.parameters())), strict=True):
        assert torch.equal(left, right)
    assert grad_x0.shape == query.x0.shape


@pytest.mark.parametrize("form", FORMS)
def test_micro_batches_weighed_by_their_share_add_up_to_the_batch(form, fake, teacher):
    objective = SgmdObjective(form=form)
    whole = random_query()

    def evaluate(query):
        query = with_leaf(query)
        velocity_fake = predict(fake, query)
        loss = objective.generator_loss(query, velocity_fake, predict(teacher, query))
        (grad_x0,) = torch.autograd.grad(loss.value, query.x0, retain_graph=True)
        return loss, objective.tracking_loss(query, velocity_fake), grad_x0

    loss, tracking, gradient = evaluate(whole)
    parts = []
    for rows in (slice(0, 2), slice(2, 3)):
        part = make_query(whole.x0[rows], whole.noise[rows], whole.sigma[rows])
        parts.append((len(part.x0) / 3, *evaluate(part)))
    for name, term in loss.terms.items():
        total = sum(share * part.terms[name] for share, part, _, _ in parts)
        torch.testing.assert_close(total, term)
    for name, term in tracking.terms.items():
        total = sum(share * part.terms[name] for share, _, part, _ in parts)
        torch.testing.assert_close(total, term)
    torch.testing.assert_close(torch.cat([share * grad for share, _, _, grad in parts]), gradient)


@pytest.mark.parametrize("form", FORMS)
def test_the_losses_are_their_terms(form, fake, teacher):
    query = random_query()
    objective = SgmdObjective(form=form, lambda_nr=0.3, lambda_rc=0.7)
    loss = objective.generator_loss(query, predict(fake, query), predict(teacher, query))
    terms = loss.terms
    assert set(terms) == {"generator", "fisher", "negative_residual", "fisher_norm", "nr_norm"}
    assert not any(term.requires_grad for term in terms.values())
    torch.testing.assert_close(loss.value, terms["fisher"] + 0.3 * terms["negative_residual"])
    assert terms["negative_residual"] < 0 < terms["fisher"]
    tracking = objective.tracking_loss(query, predict(fake, query))
    torch.testing.assert_close(tracking.value, 0.7 * tracking.terms["residual_contraction"])


@pytest.mark.parametrize("form", FORMS)
def test_the_norms_are_those_of_the_two_pushes_on_the_fake_prediction(form, fake, teacher):
    query = random_query()
    velocity_teacher = predict(teacher, query)
    norms = []
    for lambda_nr in (0.0, 0.1):
        velocity_fake = predict(fake, query).detach().requires_grad_()
        objective = SgmdObjective(form=form, lambda_nr=lambda_nr)
        loss = objective.generator_loss(query, velocity_fake, velocity_teacher)
        (push,) = torch.autograd.grad(loss.value, velocity_fake)
        push = push * push.numel() / per_sample(query.sigma, push)
        norms.append((push, loss.terms))
    rms = (norms[0][0].square().flatten(1).mean(dim=1)).sqrt().mean()
    torch.testing.assert_close(norms[0][1]["fisher_norm"], rms)
    assert norms[0][1]["nr_norm"] == 0
    rms = ((norms[1][0] - norms[0][0]).square().flatten(1).mean(dim=1)).sqrt().mean()
    torch.testing.assert_close(norms[1][1]["nr_norm"], rms)


def test_the_forms_have_their_own_tracking_weights(fake):
    query = random_query()
    velocity_fake = predict(fake, query)
    error = (velocity_fake - query.velocity).square()
    released = SgmdObjective(form="released").tracking_loss(query, velocity_fake).value
    torch.testing.assert_close(released, 0.5 * error.mean())
    paper = SgmdObjective(form="paper").tracking_loss(query, velocity_fake).value
    residual = (query.x0 - x0_prediction(fake, query)).square()
    torch.testing.assert_close(paper, 0.1 * 0.5 * residual.mean())
    torch.testing.assert_close(
        SgmdObjective(form="paper", lambda_rc=1.0).tracking_loss(query, velocity_fake).value,
        10 * paper,
    )


@pytest.mark.parametrize("form", FORMS)
def test_predictions_in_bfloat16_are_compared_in_float32(form, fake, teacher):
    query = random_query(torch.float32)
    predictions = [
        SmallNetwork(seed, torch.float32)(query.x_t, query.sigma, query.text).bfloat16()
        for seed in (1, 2)
    ]
    objective = SgmdObjective(form=form)
    loss = objective.generator_loss(query, *predictions)
    assert loss.value.dtype == torch.float32
    widened = objective.generator_loss(query, *[value.float() for value in predictions])
    assert torch.equal(loss.value, widened.value)


@pytest.mark.parametrize("form", FORMS)
def test_everything_is_wide_when_the_query_is(form, fake, teacher):
    query = random_query(torch.float64)
    loss = SgmdObjective(form=form).generator_loss(
        query, predict(fake, query), predict(teacher, query)
    )
    tracking = SgmdObjective(form=form).tracking_loss(query, predict(fake, query))
    assert {term.dtype for term in (*loss.terms.values(), *tracking.terms.values())} == {
        torch.float64
    }


def test_a_gap_at_little_noise_survives_float32():
    # x0 predictions 1e-6 apart around 1 hold one digit of their difference in float32; velocities
    # hold all of theirs.
    sigma = torch.tensor([1e-4])
    x0, noise = torch.full((1, 1, 1, 2, 2), 1.0), torch.full((1, 1, 1, 2, 2), 0.5)
    query = make_query(x0, noise, sigma)
    gap = x0_gap(query, torch.full_like(x0, -0.51), torch.full_like(x0, -0.52))
    torch.testing.assert_close(gap, torch.full_like(x0, -1e-6), atol=0, rtol=1e-5)


@pytest.mark.parametrize(
    "setting",
    [
        {"lambda_nr": -0.1},
        {"lambda_nr": float("nan")},
        {"lambda_rc": 0.0},
        {"normalizer_eps": 0.0},
        {"sigma_floor": -1.0},
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        SgmdObjective(**setting)


def test_sgmd_is_an_objective():
    objective: Objective = SgmdObjective()
    assert objective.form == "released"
