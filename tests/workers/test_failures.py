"""What roles refuse, and that they are unharmed by it."""

import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cluster.ray.service import lent
from sgmd_core.errors import NonFiniteError, StaleCallError
from sgmd_core.objectives import GradientPath
from sgmd_core.objectives.dmd import DmdObjective, matching_direction
from sgmd_core.objectives.dmd2 import Dmd2Objective
from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.objectives.sid import SidObjective
from sgmd_core.objectives.tsg_fisher import TsgFisherObjective
from sgmd_core.objectives.tsg_sim import TsgSimObjective
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.seeds import RolloutRule, draw
from sgmd_core.types import NoisedBatch, Purpose
from tests.helpers.moves import assert_moves
from tests.helpers.roles import (
    SEED,
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
from tests.helpers.tiny_wan import LATENT_SHAPE
from workers.finite import FiniteChecks, require_finite
from workers.score_teacher import ScoreTeacher
from workers.settings import DiversitySettings, TeacherSettings

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


def test_runs_that_share_a_teacher_have_faults_of_their_own():
    """Both are at the same iteration, and either may be asked first."""
    roles = tiny_roles()
    query, _ = _scored(roles)
    first = ScoreTeacher(roles.networks["teacher"], TeacherSettings(), FiniteChecks(raises=False))
    second = lent(first)
    assert isinstance(second, ScoreTeacher)
    second.denoise(poisoned(query), negative_text())
    assert first.diagnose(0).fault is None
    assert second.diagnose(0).fault is not None
    assert lent(second).diagnose(0).fault is None
    assert same_bits(
        {"velocity": first.denoise(query, negative_text()).velocity},
        {"velocity": second.denoise(query, negative_text()).velocity},
    )
    # What records nothing is shared as it is.
    assert lent(query) is query


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
    # The signal is finite; what the parameters gather from it is not.
    next(roles.networks["generator"].parameters()).register_hook(lambda grad: grad * float("nan"))
    roles.generator.learn(signal)
    report = roles.generator.gradient_report(0)
    assert not report.finite
    with pytest.raises(NonFiniteError, match="updating the generator in iteration 0"):
        roles.generator.step(0)
    assert same_bits(weights(roles.networks["generator"]), before)
    assert same_bits(roles.generator.final_weights(), average)


METHODS = {
    "sgmd": SgmdObjective(),
    "sgmd-paper": SgmdObjective(form="paper"),
    "dmd": DmdObjective(),
    "dmd2": Dmd2Objective(),
    "tsg_fisher": TsgFisherObjective(),
    "tsg_sim": TsgSimObjective(),
    "sid": SidObjective(),
}
DIVERSITY = DiversitySettings(weight=0.5, teacher_steps=3, anchor_step=1)


def _broken(value: Tensor, by: float) -> Tensor:
    """The tensor with one entry that is not finite."""
    value = value.clone()
    value.view(-1)[value.numel() // 2] = by
    return value


def _break_weight(roles, role: str, by: float) -> None:
    """One bias of the last layer, which no later layer can hide."""
    with torch.no_grad():
        roles.networks[role].transformer.proj_out.bias[1] = by


def _learn(roles, broken: str, by: float) -> None:
    """One iteration in the order of fresh tracking, up to the first update; one source broken."""
    key, text, negative = key_of(0), text_batch([0, 1]), negative_text()

    def maybe(name: str, value: Tensor) -> Tensor:
        return _broken(value, by) if name == broken else value

    text = replace(text, text=maybe("text", text.text))
    draws = draw(
        SEED, key, text.sample_indices, LATENT_SHAPE, FlowMatchSchedule(), 4, RolloutRule(1)
    )
    draws = replace(
        draws,
        initial_noise=maybe("initial noise", draws.initial_noise),
        noise=maybe("noise", draws.noise),
        sigma=maybe("level", draws.sigma),
    )
    query = roles.generator.rollout(key, text, draws)
    query = replace(query, x0=maybe("sample", query.x0))
    prediction = roles.teacher.denoise(query, maybe("negative", negative))
    prediction = replace(prediction, velocity=maybe("teacher", prediction.velocity))
    signal = roles.fake_score.signal(query, prediction, share=1.0)
    signal = replace(signal, grad_x0=maybe("gradient", signal.grad_x0))
    if signal.teacher_cotangent is not None:
        cotangent = maybe("cotangent", signal.teacher_cotangent)
        signal = replace(signal, teacher_cotangent=cotangent)
        signal = roles.teacher.pullback(query, negative, signal)
    roles.generator.learn(signal)
    start = roles.generator.start(key, text, draws)
    start = replace(start, noise=maybe("start", start.noise))
    target = roles.teacher.anchor(start, negative)
    target = replace(target, velocity=maybe("path", target.velocity))
    roles.generator.diversify(start, target, share=1.0)
    roles.generator.gradient_report(0)
    roles.generator.step(0)
    query = roles.generator.sample(key_of(0, purpose=Purpose.TRACK), text)
    roles.fake_score.track(replace(query, x0=maybe("tracked sample", query.x0)), share=1.0)
    roles.fake_score.gradient_report(0)
    roles.fake_score.step(0)


SOURCES = {
    "text": "the text embedding",
    "initial noise": "the initial noise",
    "noise": "the noise",
    "level": "the noise level",
    "sample": "the generator's x0",
    "negative": "the negative prompt's embedding",
    "teacher": "the teacher's velocity",
    "gradient": "gradient",
    "start": "the initial noise",
    "path": "the teacher's path",
    "generator weights": "the generator's x0",
    "fake_score weights": "the fake score's velocity",
    "teacher weights": "the teacher's velocity",
    "tracked sample": "the generator's x0",
    "cotangent": "the fake score's gradient at the teacher's velocity",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "by",
    [
        float("nan"),
        pytest.param(float("inf"), marks=pytest.mark.slow),
        pytest.param(-float("inf"), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_no_method_learns_from_what_is_not_finite_and_each_names_its_source(method, by):
    objective = replace(METHODS[method], fake_updates=1)
    sources = dict(SOURCES)
    if objective.path is not GradientPath.BOTH_SCORES:
        del sources["cotangent"]
    roles = tiny_roles("fresh", objective=objective, diversity=DIVERSITY)
    start = {role: weights(network) for role, network in roles.networks.items()}
    for source, named in sources.items():
        # What breaks weights, or comes after an update, has roles of its own.
        has_own = source.endswith(" weights") or source == "tracked sample"
        own = tiny_roles("fresh", objective=objective, diversity=DIVERSITY) if has_own else roles
        if source.endswith(" weights"):
            _break_weight(own, source.removesuffix(" weights"), by)
        before = {role: weights(network) for role, network in own.networks.items()}
        with pytest.raises(NonFiniteError) as caught:
            _learn(own, source, by)
        message = str(caught.value)
        assert named in message, (source, message)
        assert "iteration 0, micro-batch 0" in message, (source, message)
        assert "No weight was updated from this micro-batch" in message, (source, message)
        unharmed = ["fake_score"] if source == "tracked sample" else ["generator", "fake_score"]
        for role in unharmed:
            after = weights(own.networks[role])
            for name, value in after.items():
                assert torch.equal(value.nan_to_num(), before[role][name].nan_to_num()), source
        own.generator.discard()
        own.fake_score.discard()
    # The same iteration without a fault moves the weights of these very roles.
    _learn(roles, "nothing", by)
    for role in ("generator", "fake_score"):
        assert_moves(weights(roles.networks[role]), start[role])


def test_only_a_sample_that_both_scores_reproduce_has_no_direction():
    query = NoisedBatch(
        x0=torch.ones(4, 1, 1, 1, 2),
        sigma=torch.full((4,), 0.5),
        noise=torch.ones(4, 1, 1, 1, 2),
        text=torch.zeros(4, 1, 1),
    )
    nan, inf = float("nan"), float("inf")
    fake = torch.tensor([[0.0, 0.0], [1.0, 0.0], [nan, 0.0], [0.0, 0.0]]).reshape(4, 1, 1, 1, 2)
    teacher = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [inf, 0.0]]).reshape(4, 1, 1, 1, 2)
    direction = matching_direction(query, fake, teacher).flatten(1)
    assert direction[0].tolist() == [0.0, 0.0]
    assert not any(row.isfinite().all() for row in direction[1:])


@pytest.mark.slow
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
        start = weights(tiny_roles(tracking).networks[role])
        assert_moves(weights(undisturbed.networks[role]), start)
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
    with pytest.raises(StaleCallError, match="accumulated no gradient"):
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


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_whose_sum_overflows_are_finite_and_a_single_bad_one_is_not(bad):
    largest = torch.full((3, 5), torch.finfo(torch.float32).max)
    assert not torch.isfinite(largest.sum())
    require_finite("adding", {"the largest": largest, "half": torch.full((9,), 6e4).half()}, "")
    largest[1, 2] = bad
    with pytest.raises(NonFiniteError, match="the largest not finite"):
        require_finite("adding", {"the largest": largest}, "")
