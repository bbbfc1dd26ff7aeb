"""Mixing weights in while a generator of two experts is trained in phases."""

import pytest
import torch

from sgmd_core.objectives.phased import PhasedObjective
from sgmd_core.phases import PhaseOrder
from sgmd_core.schedule import FlowMatchSchedule
from tests.helpers.roles import SEED, Roles, iterate, tiny_roles
from tests.helpers.tiny_wan import LATENT_SHAPE, tiny_velocity
from workers.fake_score_tracker import FakeScoreTracker
from workers.generator_learner import GeneratorLearner
from workers.generator_task import GeneratorTask
from workers.models.experts import ExpertDenoiser
from workers.network_settings import OptimizerSettings
from workers.settings import FakeScoreSettings, GeneratorSettings

BOUNDARY = 0.88  # between the steps at 0.9375 and 0.8333
DECAY = 0.75


def phased_roles(order: PhaseOrder) -> Roles:
    """A generator and a fake score of two experts each, and no one's weights alike."""
    objective = PhasedObjective(order=order, high_iterations=1, fake_updates=1)
    schedule, optimizer = FlowMatchSchedule(), OptimizerSettings(lr=1e-3)
    networks = {
        role: ExpertDenoiser(tiny_velocity(seed), tiny_velocity(seed + 1), BOUNDARY)
        for role, seed in (("generator", 1), ("fake_score", 5))
    }
    roles = tiny_roles("fresh", objective=objective)
    roles.generator = GeneratorLearner(
        networks["generator"],
        schedule,
        GeneratorSettings(optimizer=optimizer),
        LATENT_SHAPE,
        SEED,
        task=GeneratorTask(phases=objective.phases(schedule, 4)),
    )
    settings = FakeScoreSettings(tracking="fresh", ida_decay=DECAY, optimizer=optimizer)
    roles.fake_score = FakeScoreTracker(networks["fake_score"], objective, settings)
    roles.networks = {**roles.networks, **networks}
    return roles


def copied(roles: Roles, role: str) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in roles.networks[role].state_dict().items()}


@pytest.mark.parametrize("order", ["sequential", "alternate"])
@pytest.mark.slow
def test_only_the_expert_that_the_iteration_has_trained_is_mixed_in(order: PhaseOrder) -> None:
    roles = phased_roles(order)
    for iteration, trained in enumerate(["high.", "low."]):
        iterate(roles, iteration)
        before, generator = (copied(roles, role) for role in ("fake_score", "generator"))
        roles.fake_score.mix_weights(roles.generator.trained_weights())
        for name, found in roles.networks["fake_score"].state_dict().items():
            mixed = DECAY * before[name] + (1 - DECAY) * generator[name]
            # Mixing would move every weight, so one that stays was left out.
            assert (mixed - before[name]).abs().max() > 1e-3
            if name.startswith(trained):
                torch.testing.assert_close(found, mixed, rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(found, before[name])
