"""CDM on sharded networks: rollouts of drawn lengths, in which every rank makes the same passes."""

from pathlib import Path

import pytest
from torch import Tensor

from sgmd_core.objectives import looks_of
from sgmd_core.objectives.cdm import CdmObjective
from sgmd_core.schedule import FlowMatchSchedule, RandomSteps
from tests.helpers.moves import assert_moves, relative_error
from tests.helpers.ranks import on_ranks
from tests.helpers.roles import gradients, key_of, negative_text, part_of, same_bits, text_batch
from tests.helpers.tiny_wan import LATENT_SHAPE, tiny_velocity
from workers.fake_score_tracker import FakeScoreTracker
from workers.generator_learner import GeneratorLearner
from workers.generator_task import GeneratorTask
from workers.score_teacher import ScoreTeacher
from workers.settings import FakeScoreSettings, GeneratorSettings, TeacherSettings
from workers.sharding import full_tensor, shard

BATCH, MICRO_BATCHES = (0, 1, 2, 3), 4
STEPS = RandomSteps(2, 6)


def passes_and_gradients(indices: tuple[int, ...], steps: RandomSteps = STEPS):
    """Generator passes of every micro-batch, and the gradient that all of them gather."""
    objective = CdmObjective()
    networks = [tiny_velocity(seed) for seed in (1, 2, 3)]
    for network in networks[:2]:
        shard(network, network.blocks, device="cpu")
    passes: list[int] = []
    networks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    generator = GeneratorLearner(
        networks[0],
        FlowMatchSchedule(),
        GeneratorSettings(random_steps=steps),
        LATENT_SHAPE,
        seed=11,
        task=GeneratorTask(looks_of(objective, 2.0)),
    )
    fake_score = FakeScoreTracker(networks[1], objective, FakeScoreSettings("fresh"))
    teacher = ScoreTeacher(networks[2], TeacherSettings(guidance_scale=2.0))
    counts: list[int] = []
    for micro_batch in range(MICRO_BATCHES):
        query = generator.rollout(key_of(0, micro_batch), text_batch(indices))
        answer = teacher.denoise(query, negative_text())
        generator.learn(fake_score.signal(query, answer, len(indices) / len(BATCH)))
        counts.append(sum(passes) - sum(counts))
    return counts, gradients(networks[0])


def on_a_rank(rank: int, size: int) -> tuple[list[int], dict[str, Tensor]]:
    counts, found = passes_and_gradients(part_of(BATCH))
    return counts, {name: full_tensor(value) for name, value in found.items()}


@pytest.mark.slow
def test_two_ranks_draw_one_length_a_micro_batch_and_gather_the_gradient_of_one(tmp_path: Path):
    counts, whole = passes_and_gradients(BATCH)
    # Lengths differ, so ranks that drew their own would wait for each other's passes.
    assert len(set(counts)) > 1
    assert_moves(whole, passes_and_gradients(BATCH, RandomSteps(3, 6))[1], 1e-5)
    found = on_ranks(2, on_a_rank, tmp_path)
    assert [own for own, _ in found] == [counts, counts]
    assert same_bits(*(gathered for _, gathered in found))
    assert relative_error(found[0][1], whole) < 1e-5
