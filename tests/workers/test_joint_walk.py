"""One backward pass for both gradients of the fake score has the bits of two passes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sgmd_core.errors import ConfigError, NonFiniteError, StaleCallError
from sgmd_core.objectives.dmd import DmdObjective
from sgmd_core.objectives.sid import SidObjective
from sgmd_core.objectives.tsg_sim import TsgSimObjective
from tests.helpers.moves import assert_every_tensor_moves, relative_error
from tests.helpers.roles import (
    Roles,
    gather,
    gradients,
    iterate,
    key_of,
    negative_text,
    poisoned,
    same_bits,
    text_batch,
    tiny_roles,
    weights,
)
from workers.joint_walk import JointWalk
from workers.network_settings import ComputeSettings, LoraSettings
from workers.settings import FakeScoreSettings

AGAIN = ComputeSettings(checkpointing=True)
SELECTIVE = ComputeSettings(checkpointing="selective")
BATCHES = ((0, 1), (2, 3))


def gathered(roles: Roles) -> dict[str, dict[str, Tensor]]:
    gather(roles, 0, BATCHES)
    return {role: gradients(roles.networks[role]) for role in ("generator", "fake_score")}


def asked(roles: Roles, batch: tuple[int, ...] = (0, 1)):
    query = roles.generator.rollout(key_of(0), text_batch(batch))
    return query, roles.teacher.denoise(query, negative_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"form": "paper"},
        {"objective": TsgSimObjective()},
        {"compute": replace(AGAIN, precision="bf16")},
        {"lora": LoraSettings(rank=2, alpha=2.0)},
        {"compute": SELECTIVE},
        {"compute": ComputeSettings(checkpointing="offload")},
    ],
    ids=["sgmd", "paper", "tsg_sim", "bf16", "adapters", "selective", "offload"],
)
def test_one_walk_has_the_bits_of_two_over_two_micro_batches(settings):
    settings = {"compute": AGAIN, **settings}
    one, two = (gathered(tiny_roles(walk=walk, **settings)) for walk in ("joint", "apart"))
    for role in two:
        assert two[role]
        assert same_bits(one[role], two[role])


@pytest.mark.slow
def test_three_iterations_of_both_players_have_the_same_bits():
    players = [tiny_roles(compute=AGAIN, walk=walk) for walk in ("joint", "apart")]
    before = weights(players[0].networks["fake_score"])
    for roles in players:
        for iteration in range(3):
            iterate(roles, iteration)
    for role in ("generator", "fake_score"):
        assert same_bits(*(weights(roles.networks[role]) for roles in players))
    assert_every_tensor_moves(before, weights(players[0].networks["fake_score"]))


@pytest.mark.slow
def test_each_cotangent_moves_its_own_gradient_and_no_other():
    found = []
    for generator, tracking in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.5)):
        roles = tiny_roles(compute=AGAIN)
        query, prediction = asked(roles)
        leaf = replace(query, x0=query.x0.detach().requires_grad_())
        walk = JointWalk(roles.networks["fake_score"], leaf)
        loss = roles.objective.generator_loss(leaf, walk.velocity, prediction.velocity)
        tracked = roles.objective.tracking_loss(query, walk.velocity)
        at_x0 = walk.back(generator * loss.value, tracking * tracked.value)
        found.append(({"x0": at_x0}, gradients(roles.networks["fake_score"])))
    (at_x0, in_weights), (half_at_x0, same_in_weights), (same_at_x0, half_in_weights) = found
    assert same_bits(in_weights, same_in_weights)
    assert same_bits(at_x0, same_at_x0)
    assert relative_error(half_at_x0, at_x0) > 0.4
    assert relative_error(half_in_weights, in_weights) > 0.4


def test_no_gradient_of_the_generators_loss_reaches_a_parameter():
    found = []
    for size in (1.0, 1000.0):
        roles = tiny_roles(compute=AGAIN, walk="joint")
        query, prediction = asked(roles)
        # Another teacher is another loss of the generator, and nothing to tracking.
        other = replace(prediction, velocity=size * prediction.velocity)
        signal = roles.fake_score.signal(query, other, 0.5)
        found.append((gradients(roles.networks["fake_score"]), {"x0": signal.grad_x0}))
    (first, at_first), (second, at_second) = found
    assert same_bits(first, second)
    assert relative_error(at_first, at_second) > 0.1
    assert first
    assert all(value.abs().sum() > 0 for value in first.values())


def test_attention_whose_outputs_are_kept_is_not_made_again():
    roles, attentions = tiny_roles(compute=SELECTIVE, walk="joint"), []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            is_attention = (
                func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
            )
            if is_attention and args[0].shape == args[1].shape:
                attentions.append(func)
            return func(*args, **(kwargs or {}))

    query, prediction = asked(roles)
    with Counting():
        roles.fake_score.signal(query, prediction, 0.5)
    assert len(attentions) == len(roles.networks["fake_score"].blocks)


def test_streams_of_layers_are_kept_where_offloading_puts_them(monkeypatch):
    moved = []
    monkeypatch.setattr("workers.joint_walk.on_host", lambda value: moved.append(value) or value)
    roles = tiny_roles(compute=replace(AGAIN, checkpointing="offload"), walk="joint")
    roles.fake_score.signal(*asked(roles), 0.5)
    blocks = roles.networks["fake_score"].blocks
    assert len(moved) == len(blocks)
    assert not any(value.requires_grad for value in moved)


@pytest.mark.parametrize(("walk", "passes"), [("joint", 2), ("apart", 3)])
def test_layers_are_made_again_once_in_a_joint_walk(walk, passes):
    roles = tiny_roles(compute=AGAIN, walk=walk)
    blocks, calls = roles.networks["fake_score"].blocks, []
    for block in blocks:
        block.register_forward_pre_hook(lambda module, _: calls.append(module))
    query, prediction = asked(roles)
    roles.fake_score.signal(query, prediction, 0.5)
    roles.fake_score.track(query, 0.5)
    assert [calls.count(block) for block in blocks] == [passes] * len(blocks)


class TestCalls:
    def test_tracking_is_asked_for_once_with_the_share_of_the_signal(self):
        roles = tiny_roles(compute=AGAIN, walk="joint")
        query, prediction = asked(roles)
        with pytest.raises(StaleCallError, match="no forward passes"):
            roles.fake_score.track(query, 0.5)
        roles.fake_score.signal(query, prediction, 0.5)
        with pytest.raises(StaleCallError, match="accumulated already"):
            roles.fake_score.signal(query, prediction, 0.5)
        with pytest.raises(StaleCallError, match="were not tracked"):
            roles.fake_score.gradient_report(0)
        with pytest.raises(StaleCallError, match="with this share"):
            roles.fake_score.track(query, 0.25)
        report = roles.fake_score.track(query, 0.5)
        apart = tiny_roles(compute=AGAIN)
        apart.fake_score.signal(*asked(apart), 0.5)
        assert report == apart.fake_score.track(query, 0.5)
        with pytest.raises(StaleCallError, match="no forward passes"):
            roles.fake_score.track(query, 0.5)

    def test_a_broken_query_gathers_nothing(self):
        roles = tiny_roles(compute=AGAIN, walk="joint")
        query, prediction = asked(roles)
        with pytest.raises(NonFiniteError, match="the generator's x0"):
            roles.fake_score.signal(poisoned(query), prediction, 0.5)
        assert not gradients(roles.networks["fake_score"])

    def test_a_broken_gradient_of_finite_losses_keeps_the_iteration_from_being_closed(
        self, monkeypatch
    ):
        roles = tiny_roles(compute=AGAIN, walk="joint")
        query, prediction = asked(roles)
        back = "workers.signals_that_track.JointWalk.back"
        monkeypatch.setattr(back, lambda *_: torch.full_like(query.x0, torch.inf))
        with pytest.raises(NonFiniteError, match="grad_x0_norm"):
            roles.fake_score.signal(query, prediction, 0.5)
        with pytest.raises(StaleCallError, match="and refused"):
            roles.fake_score.track(query, 0.5)
        with pytest.raises(StaleCallError, match="were not tracked"):
            roles.fake_score.gradient_report(0)
        roles.fake_score.discard()
        assert not gradients(roles.networks["fake_score"])


@pytest.mark.parametrize("objective", [DmdObjective(), SidObjective()], ids=lambda one: one.method)
def test_losses_of_other_paths_are_refused(objective):
    with pytest.raises(ConfigError, match=f"the losses of {objective.method}"):
        tiny_roles(compute=AGAIN, walk="joint", objective=objective)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tracking": "fresh"}, "fake_score.tracking"),
        ({"compute": ComputeSettings()}, "fake_score.compute.checkpointing is False"),
        ({"compute": ComputeSettings(checkpointing=True, compile=True)}, "compute.compile"),
        ({"walk": "both"}, "fake_score.walk"),
    ],
)
def test_what_one_walk_does_not_go_with_is_refused_by_name(settings, words):
    with pytest.raises(ConfigError, match=words):
        FakeScoreSettings(**{"compute": AGAIN, "walk": "joint", **settings})
