"""Who receives gradient, and who must not."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sgmd_core.errors import StaleCallError
from sgmd_core.objectives import GradientPath
from sgmd_core.objectives.dmd import DmdObjective
from sgmd_core.objectives.dmd2 import Dmd2Objective
from sgmd_core.objectives.sid import SidObjective
from sgmd_core.objectives.tsg_fisher import TsgFisherObjective
from sgmd_core.objectives.tsg_sim import TsgSimObjective
from sgmd_core.types import Purpose
from tests.helpers.moves import assert_moves
from tests.helpers.roles import (
    gather,
    gradients,
    iterate,
    key_of,
    negative_text,
    same_bits,
    text_batch,
    tiny_roles,
    weights,
)

TRACKING = pytest.mark.parametrize("tracking", ["shared", "fresh"])


def _signal(roles):
    query = roles.generator.rollout(key_of(0), text_batch([0, 1]))
    prediction = roles.teacher.denoise(query, negative_text())
    return query, roles.fake_score.signal(query, prediction, share=1.0)


@TRACKING
def test_fake_score_parameters_get_no_gradient_from_the_generator_loss(tracking):
    roles = tiny_roles(tracking)
    computed = _gradients_computed_for(roles.networks["fake_score"])
    _, signal = _signal(roles)
    assert gradients(roles.networks["fake_score"]) == {}
    assert computed == []
    assert signal.grad_x0.abs().max() > 0


def test_fresh_signal_records_a_graph_that_ends_at_x0_alone():
    roles = tiny_roles("fresh")
    ends = _graph_ends_of_outputs(roles.networks["fake_score"])
    query, _ = _signal(roles)
    ((leaf,),) = ends
    assert leaf.shape == query.x0.shape
    assert all(value.requires_grad for value in roles.networks["fake_score"].parameters())


def test_shared_signal_records_a_graph_that_ends_at_x0_and_the_parameters():
    roles = tiny_roles("shared")
    ends = _graph_ends_of_outputs(roles.networks["fake_score"])
    _signal(roles)
    (found,) = ends
    assert len(found) == 1 + len(list(roles.networks["fake_score"].parameters()))


@TRACKING
def test_tracking_gradient_is_the_same_with_and_without_a_signal_before_it(tracking):
    roles, alone = tiny_roles(tracking), tiny_roles("fresh")
    query, _ = _signal(roles)
    roles.fake_score.track(query, share=1.0)
    alone.fake_score.track(query, share=1.0)
    found = gradients(roles.networks["fake_score"])
    assert found.keys() == dict(roles.networks["fake_score"].named_parameters()).keys()
    other = tiny_roles("fresh")
    other.fake_score.track(replace(query, x0=query.x0.flip(0)), share=1.0)
    assert_moves(found, gradients(other.networks["fake_score"]))
    assert same_bits(found, gradients(alone.networks["fake_score"]))


BASELINES = pytest.mark.parametrize(
    "objective",
    [DmdObjective(), Dmd2Objective(), TsgFisherObjective(), TsgSimObjective(), SidObjective()],
    ids=lambda objective: objective.method,
)


@BASELINES
@TRACKING
def test_no_parameter_of_a_score_gets_a_gradient_from_any_generator_loss(objective, tracking):
    roles = tiny_roles(tracking, objective=objective)
    scores = [roles.networks[name] for name in ("fake_score", "teacher")]
    computed = _gradients_computed_for(scores[0])
    query, signal = _signal(roles)
    if objective.path is GradientPath.BOTH_SCORES:
        signal = roles.teacher.pullback(query, negative_text(), signal)
    assert [gradients(score) for score in scores] == [{}, {}]
    assert computed == []
    assert not any(value.requires_grad for value in scores[1].parameters())
    roles.generator.learn(signal)
    generator = roles.networks["generator"]
    assert gradients(generator).keys() == dict(generator.named_parameters()).keys()


@TRACKING
def test_dmd_records_no_graph_from_the_fake_score_to_x0(tracking):
    roles = tiny_roles(tracking, objective=DmdObjective())
    outputs = []
    roles.networks["fake_score"].register_forward_hook(
        lambda _module, _inputs, output: outputs.append(output)
    )
    query, _ = _signal(roles)
    (output,) = outputs
    assert output.requires_grad == (tracking == "shared")
    if output.requires_grad:
        assert all(leaf.shape != query.x0.shape for leaf in _leaves(output))


def test_only_sid_asks_the_teacher_for_a_part_of_the_gradient():
    roles = tiny_roles("fresh", objective=SidObjective())
    query, signal = _signal(roles)
    assert signal.teacher_cotangent is not None
    completed = roles.teacher.pullback(query, negative_text(), signal)
    assert completed.teacher_cotangent is None
    assert not torch.equal(completed.grad_x0, signal.grad_x0)
    _, other = _signal(tiny_roles("fresh", objective=TsgSimObjective()))
    assert other.teacher_cotangent is None


def test_the_teacher_completes_a_signal_once_and_only_that_of_the_query():
    roles = tiny_roles("fresh", objective=SidObjective())
    query, signal = _signal(roles)
    completed = roles.teacher.pullback(query, negative_text(), signal)
    with pytest.raises(StaleCallError, match="without a cotangent"):
        roles.teacher.pullback(query, negative_text(), completed)
    other = roles.generator.rollout(key_of(0, 1), text_batch([2, 3]))
    with pytest.raises(StaleCallError, match="micro_batch=1"):
        roles.teacher.pullback(other, negative_text(), signal)


def test_weights_are_not_mixed_under_a_graph_that_was_made_with_the_old_ones():
    roles = tiny_roles("shared", objective=DmdObjective(), ida_decay=0.9)
    _signal(roles)
    with pytest.raises(StaleCallError, match=r"fake_score\.tracking=fresh"):
        roles.fake_score.mix_weights(roles.generator.trained_weights())


@TRACKING
def test_generator_gets_no_gradient_from_scoring_and_tracking(tracking):
    roles = tiny_roles(tracking)
    query, _ = _signal(roles)
    roles.fake_score.track(query, share=1.0)
    assert gradients(roles.networks["generator"]) == {}
    assert query.x0.grad is None
    assert not query.x0.requires_grad


def test_samples_for_tracking_carry_no_graph():
    roles = tiny_roles("fresh")
    query = roles.generator.sample(key_of(0, purpose=Purpose.TRACK), text_batch([0, 1]))
    assert not query.x0.requires_grad
    assert roles.generator.rollouts_kept == 0


@TRACKING
def test_teacher_gets_no_gradient_and_gives_none(tracking):
    roles = tiny_roles(tracking)
    query = roles.generator.rollout(key_of(0), text_batch([0, 1]))
    prediction = roles.teacher.denoise(query, negative_text())
    assert not prediction.velocity.requires_grad
    # An inference tensor could not be saved for the fake score's backward pass.
    assert not prediction.velocity.is_inference()
    gather(roles, 0, [(0, 1)])
    assert gradients(roles.networks["teacher"]) == {}
    assert not any(value.requires_grad for value in roles.networks["teacher"].parameters())


@TRACKING
def test_every_parameter_of_the_generator_learns_through_x0(tracking):
    roles = tiny_roles(tracking)
    gather(roles, 0, [(0, 1), (2, 3)])
    generator = roles.networks["generator"]
    assert gradients(generator).keys() == dict(generator.named_parameters()).keys()


@TRACKING
def test_an_iteration_leaves_no_gradient_and_no_graph_behind(tracking):
    roles = tiny_roles(tracking)
    iterate(roles, 0)
    assert gradients(roles.networks["generator"]) == {}
    assert gradients(roles.networks["fake_score"]) == {}
    assert roles.generator.rollouts_kept == 0
    assert roles.fake_score.forwards_kept == 0


@pytest.mark.slow
@TRACKING
def test_discard_drops_graphs_and_gradients_and_keeps_the_weights(tracking):
    roles, untouched = tiny_roles(tracking), tiny_roles(tracking)
    gather(roles, 0, [(0, 1), (2, 3)])
    _signal(roles)
    roles.generator.discard()
    roles.fake_score.discard()
    assert gradients(roles.networks["generator"]) == {}
    assert gradients(roles.networks["fake_score"]) == {}
    iterate(roles, 0)
    iterate(untouched, 0)
    for role in ("generator", "fake_score"):
        start = weights(tiny_roles(tracking).networks[role])
        assert_moves(weights(untouched.networks[role]), start)
        assert same_bits(weights(roles.networks[role]), weights(untouched.networks[role]))


def _gradients_computed_for(network: nn.Module) -> list[str]:
    """Fills with the names of parameters whose gradient autograd computes, kept or not."""
    computed: list[str] = []
    for name, value in network.named_parameters():
        value.register_hook(lambda _, name=name: computed.append(name))
    return computed


def _graph_ends_of_outputs(network: nn.Module) -> list[list[Tensor]]:
    """Fills, at each call of the network, with the leaves that its output's graph ends at."""
    ends: list[list[Tensor]] = []
    network.register_forward_hook(lambda _module, _inputs, output: ends.append(_leaves(output)))
    return ends


def _leaves(output: Tensor) -> list[Tensor]:
    leaves: dict[int, Tensor] = {}
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch._C._functions.AccumulateGrad):
            leaves[id(node.variable)] = node.variable
        waiting.extend(follower for follower, _ in node.next_functions)
    return list(leaves.values())
