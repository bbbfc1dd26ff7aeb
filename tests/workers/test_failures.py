"""What roles refuse, and that they are unharmed by it."""

import pickle
from dataclasses import replace

import pytest
import torch

from sgmd_core.errors import NonFiniteError, StaleCallError
from sgmd_core.types import Purpose
from tests.helpers.roles import (
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

TRACKING = pytest.mark.parametrize("tracking", ["shared", "fresh"])


def _scored(roles, iteration=0, micro_batch=0):
    query = roles.generator.rollout(key_of(iteration, micro_batch), text_batch([0, 1]))
    return query, roles.teacher.denoise(query, negative_text())


@TRACKING
def test_a_nan_sample_stops_the_signal_and_says_where(tracking):
    roles = tiny_roles(tracking)
    before = weights(roles.networks["fake_score"])
    query, prediction = _scored(roles, micro_batch=3)
    with pytest.raises(NonFiniteError) as caught:
        roles.fake_score.signal(poisoned(query), prediction, share=0.5)
    message = str(caught.value)
    assert "fake score" in message
    assert "iteration 0, micro-batch 3 (generate)" in message
    assert "fisher = nan" in message
    assert "the generator's x0 and the fake score's velocity not finite" in message
    assert roles.fake_score.forwards_kept == 0
    assert gradients(roles.networks["fake_score"]) == {}
    assert same_bits(weights(roles.networks["fake_score"]), before)


def test_a_nan_prediction_of_the_teacher_is_told_apart_from_a_nan_sample():
    roles = tiny_roles()
    query, prediction = _scored(roles)
    nothing = torch.full_like(prediction.velocity, float("nan"))
    with pytest.raises(NonFiniteError, match="the teacher's velocity not finite") as caught:
        roles.fake_score.signal(query, replace(prediction, velocity=nothing), share=1.0)
    assert "x0" not in caught.value.found.split(";")[1]


def test_a_nan_sample_stops_tracking_before_it_reaches_a_parameter():
    roles = tiny_roles("fresh")
    query = roles.generator.sample(key_of(0, purpose=Purpose.TRACK), text_batch([0, 1]))
    with pytest.raises(NonFiniteError, match="tracking = nan"):
        roles.fake_score.track(poisoned(query), share=1.0)
    assert gradients(roles.networks["fake_score"]) == {}


def test_a_nan_gradient_is_reported_and_updates_nothing():
    roles = tiny_roles()
    before, average = weights(roles.networks["generator"]), roles.generator.final_weights()
    query, prediction = _scored(roles)
    signal = roles.fake_score.signal(query, prediction, share=1.0)
    broken = replace(signal, grad_x0=signal.grad_x0 * float("nan"))
    roles.generator.learn(broken)
    report = roles.generator.gradient_report(0)
    assert not report.finite
    with pytest.raises(NonFiniteError, match="updating the generator in iteration 0"):
        roles.generator.step(0)
    assert same_bits(weights(roles.networks["generator"]), before)
    assert same_bits(roles.generator.final_weights(), average)


@TRACKING
def test_after_a_non_finite_iteration_the_roles_can_go_on(tracking):
    roles, undisturbed = tiny_roles(tracking), tiny_roles(tracking)
    gather(roles, 0, [(0, 1)])
    query, prediction = _scored(roles, micro_batch=1)
    with pytest.raises(NonFiniteError):
        roles.fake_score.signal(poisoned(query), prediction, share=0.5)
    roles.generator.discard()
    roles.fake_score.discard()
    iterate(roles, 0)
    iterate(undisturbed, 0)
    for role in ("generator", "fake_score"):
        assert same_bits(weights(roles.networks[role]), weights(undisturbed.networks[role]))


def test_a_signal_for_a_rollout_that_is_not_kept_is_refused():
    roles = tiny_roles()
    query, prediction = _scored(roles)
    signal = roles.fake_score.signal(query, prediction, share=1.0)
    stray = replace(signal, key=key_of(0, micro_batch=7))
    with pytest.raises(StaleCallError) as caught:
        roles.generator.learn(stray)
    assert "micro_batch=7" in str(caught.value)
    assert "keeps [MicroBatchKey(iteration=0, micro_batch=0" in str(caught.value)
    assert "version 0" in str(caught.value)


def test_a_signal_is_taken_once():
    roles = tiny_roles()
    query, prediction = _scored(roles)
    signal = roles.fake_score.signal(query, prediction, share=1.0)
    roles.generator.learn(signal)
    with pytest.raises(StaleCallError, match="keeps no rollouts"):
        roles.generator.learn(signal)


def test_a_signal_of_another_generator_version_is_refused_and_its_rollout_stays():
    roles = tiny_roles()
    query, prediction = _scored(roles)
    signal = roles.fake_score.signal(query, prediction, share=1.0)
    with pytest.raises(StaleCallError, match="generator version 4; the generator is at version 0"):
        roles.generator.learn(replace(signal, generator_version=4))
    assert roles.generator.rollouts_kept == 1


def test_a_signal_from_before_a_restart_is_refused():
    roles = tiny_roles()
    query, prediction = _scored(roles)
    signal = roles.fake_score.signal(query, prediction, share=1.0)
    with pytest.raises(StaleCallError, match="incarnation=1"):
        roles.generator.learn(replace(signal, key=replace(signal.key, incarnation=1)))


def test_a_prediction_for_another_query_is_refused():
    roles = tiny_roles()
    query, prediction = _scored(roles)
    with pytest.raises(StaleCallError, match="prediction for MicroBatchKey"):
        roles.fake_score.signal(query, replace(prediction, key=key_of(0, 1)), share=1.0)


def test_shared_tracking_refuses_a_query_without_a_signal_and_a_second_call():
    roles = tiny_roles("shared")
    query, prediction = _scored(roles)
    with pytest.raises(StaleCallError, match="keeps no forward passes"):
        roles.fake_score.track(query, share=1.0)
    roles.fake_score.signal(query, prediction, share=1.0)
    roles.fake_score.track(query, share=1.0)
    with pytest.raises(StaleCallError, match="keeps no forward passes"):
        roles.fake_score.track(query, share=1.0)


@TRACKING
def test_calls_of_another_iteration_are_refused(tracking):
    roles = tiny_roles(tracking)
    query, prediction = _scored(roles)
    late = replace(query, key=key_of(5))
    with pytest.raises(StaleCallError, match="the generator has made 0 updates"):
        roles.generator.rollout(key_of(5), text_batch([0]))
    with pytest.raises(StaleCallError, match="the fake score has made 0 updates"):
        roles.fake_score.signal(late, replace(prediction, key=late.key), share=1.0)
    with pytest.raises(StaleCallError, match="tracking a micro-batch of iteration 5"):
        roles.fake_score.track(late, share=1.0)
    with pytest.raises(StaleCallError, match="of iteration 5"):
        roles.fake_score.gradient_report(5)


def test_an_iteration_with_an_unanswered_rollout_or_signal_cannot_be_closed():
    roles = tiny_roles("shared")
    query, prediction = _scored(roles)
    with pytest.raises(StaleCallError, match="rollouts without a signal"):
        roles.generator.gradient_report(0)
    roles.fake_score.signal(query, prediction, share=1.0)
    with pytest.raises(StaleCallError, match="signals that were not tracked"):
        roles.fake_score.gradient_report(0)


def test_a_step_needs_gradients_and_a_report_on_them():
    roles = tiny_roles()
    with pytest.raises(StaleCallError, match="gathered no gradient"):
        roles.generator.gradient_report(0)
    gather(roles, 0, [(0, 1)])
    with pytest.raises(StaleCallError, match="have not been looked at"):
        roles.generator.step(0)
    roles.generator.gradient_report(0)
    assert roles.generator.step(0) == 1
    with pytest.raises(StaleCallError, match="of iteration 0"):
        roles.generator.step(0)


def test_refusals_arrive_from_another_process_as_they_were_raised():
    roles = tiny_roles()
    with pytest.raises(StaleCallError) as caught:
        roles.generator.step(3)
    arrived = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(arrived, StaleCallError)
    assert str(arrived) == str(caught.value)
    assert arrived.found == caught.value.found
