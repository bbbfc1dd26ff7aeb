"""Truths that every method has to meet; a new one meets them all or fails here by name."""

from dataclasses import fields, replace

import pytest
import torch

from pipelines.config.methods import METHODS, method_name
from pipelines.config.recipe import load_recipe
from pipelines.stages.algorithm import iteration_program, needs_data
from pipelines.stages.kind import IterationKind
from sgmd_core.objectives import GradientPath, Objective, adversary_of
from sgmd_core.objectives.adm import AdmObjective
from sgmd_core.objectives.consistency import consistency_of
from sgmd_core.objectives.meanflow import MeanFlowTerm, Strides
from sgmd_core.objectives.tmd import TmdObjective
from sgmd_core.types import NoisedBatch, detached
from tests.e2e.test_equivalence import MODES
from tests.helpers.huber import PseudoHuberObjective
from tests.helpers.small_network import SmallNetwork, predict, random_query, with_leaf
from tests.pipelines.planning.test_passes import METHODS as COUNTED
from tests.sgmd_core.test_objectives import OBJECTIVES

# Beside ours the objective of docs/extending.md, which comes from outside.
EVERY = (*METHODS, PseudoHuberObjective)
ALL = pytest.mark.parametrize("method", EVERY, ids=method_name)
# The generator's whole loss of ADM is its discriminator's: tests/workers/test_discriminator.py.
WITH_A_LOSS = [method for method in EVERY if method is not AdmObjective]
LOSSES = pytest.mark.parametrize("method", WITH_A_LOSS, ids=method_name)
NAMES = {method_name(method) for method in METHODS}


def loss_of(objective: Objective, query: NoisedBatch):
    velocities = [predict(SmallNetwork(seed), query) for seed in (1, 2)]
    return objective.generator_loss(query, *velocities)


def part_of(query: NoisedBatch, start: int, stop: int) -> NoisedBatch:
    values = {field.name: getattr(query, field.name) for field in fields(query)}
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    return replace(query, **{name: value[start:stop] for name, value in tensors.items()})


def flow_terms(term: MeanFlowTerm, velocity: torch.Tensor):
    level = torch.full((len(velocity),), 0.7).to(velocity)
    strides = Strides(velocity, velocity, level, 0 * level)
    return term.loss(strides, velocity, velocity, velocity).terms


@ALL
def test_a_method_describes_itself_and_its_leading_losses_are_terms_of_its_losses(method):
    objective, query = method(), with_leaf(random_query())
    terms = dict(loss_of(objective, query).terms)
    terms |= objective.tracking_loss(detached(query), predict(SmallNetwork(1), query)).terms
    if (term := adversary_of(objective)) is not None:
        logits = torch.zeros(2, 1)
        terms |= term.generator_loss(logits).terms
        terms |= term.discriminator_loss(logits, logits, None).terms
    if (consistency := consistency_of(objective)) is not None:
        velocity = query.velocity.detach()
        terms |= consistency.loss(query, velocity, velocity, velocity, velocity).terms
    if isinstance(objective, TmdObjective):
        terms |= flow_terms(objective.meanflow, query.velocity.detach())
    assert objective.about
    assert objective.gradient
    assert set(objective.leading_losses) <= set(terms)
    assert {"generator", "tracking"} <= set(terms)


@LOSSES
def test_the_gradient_takes_the_declared_ways_and_no_other(method):
    objective, query = method(), with_leaf(random_query())
    velocities = [predict(SmallNetwork(seed), query) for seed in (1, 2)]
    loss = objective.generator_loss(query, *velocities)
    gradients = torch.autograd.grad(loss.value, velocities, retain_graph=True, allow_unused=True)
    reached = [each is not None and bool(each.abs().max() > 0) for each in gradients]
    expected = {
        GradientPath.SAMPLE: [False, False],
        GradientPath.FAKE_SCORE: [True, False],
        GradientPath.BOTH_SCORES: [True, True],
    }
    assert reached == expected[objective.path]
    (gradient,) = torch.autograd.grad(loss.value, query.x0)
    assert gradient.abs().max() > 0


@LOSSES
def test_the_losses_of_a_batch_are_the_means_of_its_samples(method):
    objective, query = method(), with_leaf(random_query())
    whole = loss_of(objective, query)
    (gradient,) = torch.autograd.grad(whole.value, query.x0)
    parts, gradients = [], []
    for sample in range(len(query.x0)):
        part = with_leaf(detached(part_of(query, sample, sample + 1)))
        loss = loss_of(objective, part)
        parts.append(loss.value.detach())
        gradients.append(torch.autograd.grad(loss.value, part.x0)[0] / len(query.x0))
    assert torch.stack(parts).std() > 1e-3 * whole.value.detach().abs()
    torch.testing.assert_close(whole.value.detach(), torch.stack(parts).mean())
    torch.testing.assert_close(gradient, torch.cat(gradients))


@ALL
def test_tracking_reaches_the_fake_score_alone(method):
    objective, query, fake = method(), with_leaf(random_query()), SmallNetwork(1)
    loss = objective.tracking_loss(detached(query), predict(fake, detached(query)))
    gradients = torch.autograd.grad(loss.value, [*fake.parameters(), query.x0], allow_unused=True)
    assert gradients[-1] is None
    assert all(gradient.abs().max() > 0 for gradient in gradients[:-1])


def test_every_method_stands_in_the_tables_of_the_tests_that_need_more_than_its_name():
    definitions = {name.partition("-")[0] for name in OBJECTIVES} | {"sgmd", "adm"}
    assert definitions == NAMES, "finite differences: tests/sgmd_core/test_objectives.py"
    counted = {name.partition(" ")[0] for name in COUNTED}
    assert counted >= NAMES, "exact pass counts: tests/pipelines/planning/test_passes.py"
    split = {name.partition("-")[0] for name in MODES}
    covered = {method.path for method in METHODS if method_name(method) in split}
    missing = {method.path for method in METHODS} - covered
    assert not missing, "split = fused on Ray: tests/e2e/test_equivalence.py"


def test_strides_guided_away_from_a_caption_that_is_never_trained_are_warned_of(caplog):
    said = "asked what this stage never trains"
    stage = ["objective.stage=meanflow", "objective.fake_updates=1"]
    guided = [*stage, "objective.meanflow.guidance=3.0"]
    load_recipe("tiny-tmd", [*stage, "model.negative_prompt=grey"])
    load_recipe("tiny-tmd", [*guided, "data.prompt_dropout=0.1"])
    assert said not in caplog.text
    load_recipe("tiny-tmd", guided)
    assert f"the flow head learns by data.prompt_dropout alone: the head is {said}" in caplog.text
    caplog.clear()
    load_recipe("tiny-tmd", [*guided, "data.prompt_dropout=0.1", "model.negative_prompt=grey"])
    assert f"trains the empty prompt in its place: the head is {said}" in caplog.text


def test_rcm_without_its_consistency_asks_for_what_matching_asks_for():
    overrides = ([], ["objective.consistency.weight=0"])
    dmd2 = ["objective={method: dmd2, fake_updates: 4}"]
    rcm, alone, dmd2 = (
        IterationKind.of(load_recipe("tiny-rcm", each)) for each in (*overrides, dmd2)
    )
    assert needs_data(rcm)
    assert not needs_data(alone)
    assert iteration_program(alone) == iteration_program(dmd2)


@pytest.mark.parametrize("order", ["sequential", "alternate"])
def test_an_order_with_one_fake_score_where_its_trainer_has_two_is_said(
    order: str, caplog: pytest.LogCaptureFixture
) -> None:
    load_recipe("tiny-phased", [f"objective.order={order}"])
    assert ("a fake score for each phase" in caplog.text) == (order == "alternate")
