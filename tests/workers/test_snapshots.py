"""A rank goes back to a snapshot of its own, bit for bit."""

import pytest
import torch

from sgmd_core.errors import CheckpointError
from tests.helpers.moves import assert_moves
from tests.helpers.roles import gather, iterate, same_bits, tiny_roles
from workers.network_settings import LoraSettings
from workers.sharding import parameters_of

BATCHES = ((0, 1),)
RUNS = {
    "momentum": {"betas": (0.5, 0.999)},
    "offloaded": {"offloaded": True},
    "no average": {"ema_decay": 0.0},
    "adapters": {"lora": LoraSettings(rank=4, alpha=8.0)},
}


def all_weights(roles) -> dict[str, torch.Tensor]:
    found = {f"average/{name}": value for name, value in roles.generator.final_weights().items()}
    for role in ("generator", "fake_score"):
        own = parameters_of(roles.networks[role])
        found |= {f"{role}/{name}": value.detach().clone() for name, value in own.items()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("name", RUNS)
def test_a_restored_role_makes_the_iterations_again_bitwise(name, before):
    run = RUNS[name]
    roles = tiny_roles(**run)
    for iteration in range(before):
        iterate(roles, iteration, BATCHES)
    snapshots = roles.generator.snapshot(), roles.fake_score.snapshot()
    for role, snapshot in zip((roles.generator, roles.fake_score), snapshots, strict=True):
        assert role.snapshot_bytes() == snapshot.num_bytes
    at_snapshot = all_weights(roles)
    for iteration in range(before, before + 2):
        iterate(roles, iteration, BATCHES)
    expected = all_weights(roles)
    assert_moves(expected, at_snapshot)
    gather(roles, before + 2, BATCHES)
    for restored in (roles, tiny_roles(**run)):
        assert restored.generator.restore(snapshots[0]) == before
        assert restored.fake_score.restore(snapshots[1]) == before
        for iteration in range(before, before + 2):
            iterate(restored, iteration, BATCHES)
        assert same_bits(all_weights(restored), expected)


@pytest.mark.slow
def test_a_snapshot_of_another_network_is_refused():
    full = tiny_roles()
    adapters = tiny_roles(lora=LoraSettings(rank=4, alpha=8.0))
    before = all_weights(full)
    with pytest.raises(CheckpointError, match="restoring the generator"):
        full.generator.restore(adapters.generator.snapshot())
    assert same_bits(all_weights(full), before)
