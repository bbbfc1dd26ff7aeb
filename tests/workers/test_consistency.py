"""The generator's part in a consistency term: its gradient by another road, in parts, sharded."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sgmd_core.errors import NonFiniteError, StaleCallError
from sgmd_core.objectives.consistency import ConsistencyTerm
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.trigflow import sigma_of_time, trig_state, trig_time, trig_velocity
from sgmd_core.types import DataBatch, NoisedBatch, TeacherPrediction, per_sample
from tests.helpers.moves import assert_moves, relative_error
from tests.helpers.ranks import on_ranks
from tests.helpers.roles import gradients, key_of, negative_text, part_of, same_bits, text_batch
from tests.helpers.tiny_wan import LATENT_SHAPE, tiny_velocity
from workers.generator_learner import GeneratorLearner
from workers.generator_task import GeneratorTask
from workers.score_teacher import ScoreTeacher
from workers.settings import GeneratorSettings, TeacherSettings
from workers.sharding import full_tensor, shard

TERM = ConsistencyTerm(weight=10.0)
BATCH = (0, 1, 2, 3)


def learner(network, term: ConsistencyTerm = TERM) -> GeneratorLearner:
    return GeneratorLearner(
        network,
        FlowMatchSchedule(renoise=True),
        GeneratorSettings(),
        LATENT_SHAPE,
        seed=11,
        task=GeneratorTask(consistency=term),
    )


def data_of(indices) -> DataBatch:
    streams = [torch.Generator().manual_seed(7 + index) for index in indices]
    return DataBatch(torch.stack([torch.randn(LATENT_SHAPE, generator=each) for each in streams]))


def asked(role: GeneratorLearner, indices=BATCH) -> tuple[NoisedBatch, TeacherPrediction]:
    query = role.noise_data(key_of(0), text_batch(indices), data_of(indices))
    teacher = ScoreTeacher(tiny_velocity(3), TeacherSettings(guidance_scale=2.0))
    return query, teacher.denoise_data(query, negative_text())


def gradients_of(batches=(BATCH,), term: ConsistencyTerm = TERM) -> dict[str, Tensor]:
    network = tiny_velocity(1)
    role = learner(network, term)
    for batch in batches:
        role.learn_consistency(*asked(role, batch), len(batch) / len(BATCH))
    return gradients(network)


@pytest.fixture(scope="module")
def whole():
    return gradients_of()


@pytest.mark.slow
def test_its_gradient_is_that_of_the_wrapped_networks_own_derivative(whole):
    network = tiny_velocity(1)
    query, teacher = asked(learner(network))
    t = trig_time(query.sigma)
    cos, sin = (per_sample(part, query.x0) for part in (t.cos(), t.sin()))

    def on_circle(state, t):
        x_t = state / per_sample(t.cos() + t.sin(), state)
        velocity = network(x_t.float(), sigma_of_time(t).float(), query.text).double()
        clean = x_t - per_sample(sigma_of_time(t), x_t) * velocity
        return (per_sample(t.cos(), x_t) * state - clean) / per_sample(t.sin(), x_t)

    state, moving = trig_state(query.x_t, t), trig_velocity(query.x_t, teacher.velocity, t)
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        constant, rate = torch.func.jvp(
            on_circle, (state, t), (cos * sin * moving, t.cos() * t.sin())
        )
    tangent = -(cos**2) * (constant - moving) - (cos * sin * state + rate)
    target = constant + tangent / per_sample(tangent.flatten(1).norm(dim=1) + 0.1, tangent)
    loss = (on_circle(state, t) - target).square().flatten(1).sum(dim=1).mean()
    (TERM.weight * loss).backward()
    expected = gradients(network)
    assert_moves(whole, gradients_of(term=ConsistencyTerm(weight=10.0, warmup=10)), 1e-4)
    assert relative_error(whole, expected) < 1e-4


@pytest.mark.slow
def test_parts_of_a_batch_add_up_to_it(whole):
    parts = gradients_of(((0, 1), (2, 3)))
    assert_moves(whole, gradients_of(((0, 1), (0, 1))), 1e-5)
    assert relative_error(parts, whole) < 1e-5


def test_data_are_noised_alike_however_they_are_split_and_anew_in_every_iteration():
    role = learner(tiny_velocity(1))
    query, _ = asked(role)
    part, _ = asked(role, BATCH[2:])
    for name in ("x0", "noise", "sigma", "text"):
        assert torch.equal(getattr(part, name), getattr(query, name)[2:])
    assert torch.equal(query.x0, data_of(BATCH).x0)
    assert len(set(query.sigma.tolist())) == len(BATCH)


def test_a_prediction_of_other_data_is_refused():
    role = learner(tiny_velocity(1))
    query, teacher = asked(role)
    with pytest.raises(StaleCallError, match="learning consistency"):
        role.learn_consistency(query, TeacherPrediction(key_of(0, 1), teacher.velocity), 1.0)
    with pytest.raises(StaleCallError, match="noising data"):
        role.noise_data(key_of(1), text_batch(BATCH), data_of(BATCH))


def test_numbers_that_are_not_finite_are_refused_and_nothing_is_gathered():
    network = tiny_velocity(1)
    role = learner(network)
    query, teacher = asked(role)
    broken = TeacherPrediction(teacher.key, teacher.velocity * float("nan"))
    with pytest.raises(NonFiniteError, match="the teacher's velocity"):
        role.learn_consistency(query, broken, 1.0)
    latents = data_of(BATCH).x0
    latents[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="the data's latents"):
        role.noise_data(key_of(0), text_batch(BATCH), DataBatch(latents))
    assert gradients(network) == {}


def sharded_gradients(rank: int, size: int) -> dict[str, Tensor]:
    network = tiny_velocity(1)
    shard(network, network.blocks, device="cpu")
    role, own = learner(network), part_of(BATCH)
    role.learn_consistency(*asked(role, own), len(own) / len(BATCH))
    return {name: full_tensor(value) for name, value in gradients(network).items()}


@pytest.mark.slow
def test_two_ranks_gather_the_gradient_of_one(whole, tmp_path: Path):
    found = on_ranks(2, sharded_gradients, tmp_path)
    assert same_bits(*found)
    assert relative_error(found[0], whole) < 1e-5
