"""The generator's part in MeanFlow: its gradient by another road, in parts, sharded."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sgmd_core.errors import NonFiniteError, StaleCallError
from sgmd_core.inner_flow import average_velocity, inner_state
from sgmd_core.objectives.meanflow import MeanFlowTerm
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.seeds import stride_draws
from sgmd_core.types import DataBatch, per_sample
from tests.helpers.moves import assert_moves, relative_error
from tests.helpers.ranks import on_ranks
from tests.helpers.roles import (
    gradients,
    key_of,
    negative_text,
    part_of,
    same_bits,
    text_batch,
)
from tests.helpers.tiny_wan import LATENT_SHAPE
from tests.workers.test_consistency import data_of
from tests.workers.test_transition import trained
from workers.generator_learner import GeneratorLearner
from workers.generator_task import GeneratorTask
from workers.settings import GeneratorSettings
from workers.sharding import full_tensor, shard

TERM = MeanFlowTerm(weight=3.0, instant_share=0.25, offset=0.1)
GUIDED = replace(TERM, guidance=3.0)
BATCH = (0, 1, 2, 3)
SEED = 11


def learner(network, term: MeanFlowTerm = TERM) -> GeneratorLearner:
    schedule = FlowMatchSchedule(shift=3.0)
    settings = GeneratorSettings(num_steps=2)
    return GeneratorLearner(
        network, schedule, settings, LATENT_SHAPE, SEED, task=GeneratorTask(flow=term)
    )


def gradients_of(batches=(BATCH,), term: MeanFlowTerm = TERM) -> dict[str, Tensor]:
    network = trained()
    role = learner(network, term)
    for batch in batches:
        share = len(batch) / len(BATCH)
        role.learn_flow(key_of(0), text_batch(batch), data_of(batch), negative_text(), share)
    return gradients(network)


@pytest.fixture(scope="module")
def whole():
    return gradients_of()


@pytest.mark.slow
def test_its_gradient_is_that_of_the_heads_exact_derivative(whole):
    """A forward-mode derivative in (y_s, s), with the backbone's tokens held."""
    network = trained().requires_grad_(True)
    role = learner(network)
    query = role.noise_data(key_of(0), text_batch(BATCH), data_of(BATCH))
    uniform, choice, noise = stride_draws(SEED, key_of(0), BATCH, LATENT_SHAPE)
    s, r = TERM.levels(uniform, choice, network.inner_levels)
    assert 0 < int((r < s).sum()) < len(BATCH)
    y = query.noise - query.x0
    y_s, v = inner_state(y, noise, s), noise - y

    def average(state, level):
        backbone = network._backbone(query.x_t, query.sigma, query.text)
        return average_velocity(state, network._answer(backbone, state, level, r), level)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, derivative = torch.func.jvp(average, (y_s, s), (v, torch.ones_like(s)))
    target = v - per_sample(s - r, v) * derivative
    error = (average(y_s, s) - target).square().flatten(1).mean(dim=1)
    (3.0 * (error / (error.detach() + 0.1)).mean()).backward()
    without = gradients_of(term=MeanFlowTerm(weight=3.0, instant_share=1.0, offset=0.1))
    assert_moves(whole, without, 0.02)
    assert relative_error(whole, gradients(network)) < 5e-3


@pytest.mark.slow
def test_guided_strides_go_along_the_guided_velocity(whole):
    """v = w (y_1 - y) + (1 - w) u at once under the negative prompt; the derivative along it."""
    network = trained().requires_grad_(True)
    query = learner(network).noise_data(key_of(0), text_batch(BATCH), data_of(BATCH))
    uniform, choice, noise = stride_draws(SEED, key_of(0), BATCH, LATENT_SHAPE)
    s, r = GUIDED.levels(uniform, choice, network.inner_levels)
    y = query.noise - query.x0
    y_s = inner_state(y, noise, s)

    def average(state, level, target, text):
        backbone = network._backbone(query.x_t, query.sigma, text)
        return average_velocity(state, network._answer(backbone, state, level, target), level)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        unguided = average(y_s, s, s, negative_text().expand_as(query.text))
        v = 3.0 * (noise - y) - 2.0 * unguided
        _, derivative = torch.func.jvp(
            lambda state, level: average(state, level, r, query.text),
            (y_s, s),
            (v, torch.ones_like(s)),
        )
    target = v - per_sample(s - r, v) * derivative
    error = (average(y_s, s, r, query.text) - target).square().flatten(1).mean(dim=1)
    (3.0 * (error / (error.detach() + 0.1)).mean()).backward()
    found = gradients_of(term=GUIDED)
    assert_moves(found, whole, 0.02)
    assert relative_error(found, gradients(network)) < 5e-3
    assert same_bits(gradients_of(term=replace(TERM, guidance=1.0)), whole)


def test_parts_of_a_batch_add_up_to_it(whole):
    parts = gradients_of(((0, 1), (2, 3)))
    assert_moves(whole, gradients_of(((0, 1), (0, 1))), 1e-4)
    assert relative_error(parts, whole) < 1e-4


def test_data_are_noised_to_the_steps_of_the_generator():
    role, indices = learner(trained()), tuple(range(40))
    query = role.noise_data(key_of(0), text_batch(indices), data_of(indices))
    levels, counts = query.sigma.unique(return_counts=True)
    assert levels.tolist() == pytest.approx([0.75, 1.0])
    assert counts.min() > 10


def test_another_iteration_and_broken_numbers_are_refused():
    network = trained()
    role = learner(network)
    with pytest.raises(StaleCallError):
        role.learn_flow(key_of(1), text_batch(BATCH), data_of(BATCH), negative_text(), 1.0)
    with torch.no_grad():
        network.head.gate.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="the head's answers"):
        role.learn_flow(key_of(0), text_batch(BATCH), data_of(BATCH), negative_text(), 1.0)
    latents = data_of(BATCH).x0
    latents[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="the data's latents"):
        role.learn_flow(key_of(0), text_batch(BATCH), DataBatch(latents), negative_text(), 1.0)
    assert gradients(network) == {}


def sharded_gradients(rank: int, size: int) -> dict[str, Tensor]:
    network = trained()
    shard(network, network.blocks, device="cpu")
    role, own = learner(network), part_of(BATCH)
    share = len(own) / len(BATCH)
    role.learn_flow(key_of(0), text_batch(own), data_of(own), negative_text(), share)
    return {name: full_tensor(value) for name, value in gradients(network).items()}


@pytest.mark.slow
def test_two_ranks_gather_the_gradient_of_one(whole, tmp_path: Path):
    found = on_ranks(2, sharded_gradients, tmp_path)
    assert same_bits(*found)
    assert relative_error(found[0], whole) < 1e-4
