"""Extra updates of the fake score are taken back, bit for bit, and count for nothing."""

import pytest
import torch

from sgmd_core.errors import StaleCallError
from sgmd_core.types import Purpose
from tests.helpers.moves import assert_moves
from tests.helpers.roles import (
    gather,
    iterate,
    key_of,
    make_extra,
    same_bits,
    text_batch,
    tiny_roles,
)
from tests.workers.test_snapshots import RUNS, all_weights
from workers.extra_updates import HELD

BATCHES = ((0, 1),)


@pytest.mark.parametrize(
    ("name", "tracking"),
    [
        ("plain", "shared"),
        ("plain", "fresh"),
        ("momentum", "shared"),
        ("offloaded", "fresh"),
        ("adapters", "shared"),
    ],
)
@pytest.mark.slow
def test_a_run_goes_on_as_if_they_had_not_been_made(name: str, tracking: str):
    run = RUNS.get(name, {}) | {"tracking": tracking}
    calm, measured = tiny_roles(**run), tiny_roles(**run)
    for iteration in range(2):
        before = all_weights(measured)
        make_extra(measured, iteration)
        moved = all_weights(measured)
        measured.fake_score.end_extra()
        assert_moves(
            {key: value for key, value in moved.items() if key.startswith("fake_score")},
            {key: value for key, value in before.items() if key.startswith("fake_score")},
        )
        assert same_bits(all_weights(measured), before)
        for roles in (calm, measured):
            iterate(roles, iteration, BATCHES)
    assert same_bits(all_weights(measured), all_weights(calm))


@pytest.mark.slow
def test_they_lower_the_loss_of_held_samples_and_are_measured_without_a_gradient():
    roles = tiny_roles(lr=1e-3)
    held = roles.generator.sample(key_of(0, 99, Purpose.LAG), text_batch((100, 101)))
    before = roles.fake_score.held_loss(held).metrics[HELD]
    roles.fake_score.begin_extra(0)
    for update in range(8):
        key = key_of(0, update, Purpose.LAG)
        roles.fake_score.extra_track(roles.generator.sample(key, text_batch((100, 101))), 1.0)
        roles.fake_score.extra_step(1 - update / 8)
    after = roles.fake_score.held_loss(held).metrics[HELD]
    assert after < 0.95 * before
    assert all(value.grad is None for value in roles.networks["fake_score"].parameters())
    roles.fake_score.end_extra()
    assert roles.fake_score.held_loss(held).metrics[HELD] == before


def test_an_iteration_that_is_given_up_takes_them_back():
    roles = tiny_roles()
    before = all_weights(roles)
    roles.fake_score.begin_extra(0)
    query = roles.generator.sample(key_of(0, 0, Purpose.LAG), text_batch((0, 1)))
    roles.fake_score.extra_track(query, 1.0)
    roles.fake_score.extra_step(1.0)
    roles.fake_score.discard()
    assert same_bits(all_weights(roles), before)
    roles.fake_score.begin_extra(0)


def test_they_are_made_between_two_iterations_only():
    roles = tiny_roles()
    with pytest.raises(StaleCallError, match="iteration 1"):
        roles.fake_score.begin_extra(1)
    with pytest.raises(StaleCallError, match="taken back to"):
        roles.fake_score.extra_step(1.0)
    roles.fake_score.begin_extra(0)
    with pytest.raises(StaleCallError, match="not taken back"):
        roles.fake_score.begin_extra(0)
    roles.fake_score.end_extra()
    query = roles.generator.rollout(key_of(0), text_batch((0, 1)))
    roles.fake_score.signal(query, roles.teacher.denoise(query, text_batch((999,)).text), 1.0)
    with pytest.raises(StaleCallError, match="not tracked"):
        roles.fake_score.begin_extra(0)


def test_samples_of_a_measurement_share_no_draw_with_those_that_train():
    roles = tiny_roles()
    made = {
        purpose: roles.generator.sample(key_of(0, 0, purpose), text_batch((0, 1)))
        for purpose in Purpose
    }
    for one in Purpose:
        for other in Purpose:
            differ = (made[one].noise - made[other].noise).abs().amax()
            assert (differ > 0.1) == (one is not other)


def test_an_update_at_another_rate_moves_in_proportion():
    moves: dict[float, torch.Tensor] = {}
    for rate in (1.0, 0.5):
        roles = tiny_roles(ema_decay=0.0)
        before = all_weights(roles)
        gather(roles, 0, BATCHES)
        roles.generator.gradient_report(0)
        roles.generator.step(0, False, rate)
        after = all_weights(roles)
        own = [name for name in before if name.startswith("generator/")]
        moves[rate] = torch.cat([(after[name] - before[name]).flatten() for name in own])
    assert moves[1.0].abs().max() > 1e-4
    assert torch.allclose(moves[0.5], moves[1.0] / 2, atol=2e-7)
