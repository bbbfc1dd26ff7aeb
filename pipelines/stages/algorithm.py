"""Algorithm of one iteration: its stages as constants, and their order as data.

For each of m micro-batches, shared tracking (the SGMD paper's Algorithm 1):

    generator               teacher                 fake score
    ---------               -------                 ----------
    ROLLOUT  x0 ----------> DENOISE  velocity ----> SIGNAL  d L_G / d x0, through its input only
       |                                            TRACK   L_F backward to its own weights
    LEARN    x0.backward(grad_x0) <---------------- grad_x0

then one update of both learners together. SIGNAL waits for DENOISE, DENOISE for ROLLOUT, LEARN for
SIGNAL; TRACK comes after SIGNAL on the same forward pass. When all LEARN and TRACK are done the
controller asks both learners for their gradient norms and, if both are finite and no spike, lets
both step; otherwise both skip the update (`guards.py`). The next iteration waits for the steps.
ROLLOUT also waits for its captions, which are asked for one iteration ahead and embedded when the
iteration begins. While a role waits for one micro-batch it works on another
(`cluster.schedule.schedule`); columns are the order of the calls, not equal times, and l0 starts
when s0 has ended:

    generator   r0 r1 | l0 r2 | l1 r3 | ...            | step
    teacher        d0 | d1    | d2    | ...            |
    fake score        | s0 t0 | s1 t1 | s2 t2 | ...    | step

Variants are other programs over the same stages:

    fresh tracking      ROLLOUT DENOISE SIGNAL LEARN | update | n times (SAMPLE TRACK | update)
    through the teacher PULLBACK between SIGNAL and LEARN (SiD)
    diversity loss      START before ROLLOUT, ANCHOR by the teacher, DIVERSIFY after LEARN
    one backward pass   SIGNAL accumulates TRACK's gradient too, and TRACK returns the loss terms
    mixing of weights   the fake score takes in the generator's weights between the two updates
    comparing steps     PREDICT, COMPARE_STEPS and COMPLETE in the place of SIGNAL (ADM)
    comparing data      COMPARE_DATA by the discriminator between SIGNAL and LEARN (DMD2's GAN term)
    consistency         NOISE_DATA before ROLLOUT, DENOISE_DATA by the teacher, LEARN_CONSISTENCY
                        after LEARN (rCM); alone, without the stages from ROLLOUT to LEARN (sCM)
    strides             LEARN_FLOW in the place of the stages from ROLLOUT to LEARN (TMD)

A discriminator accumulates its gradient while it compares, and is updated with the generator.

A stage states its role, the method that does the work, what the method is handed and what it sends
back. The dispatcher, the planner and the study read these constants.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from cluster.schedule.program import Pass, Program, Stage, Update, WeightTransfer
from cluster.schedule.schedule import REPORT, STEP, Call
from cluster.worker_group import Future
from pipelines.config.roles import DISCRIMINATOR, FAKE_SCORE, GENERATOR, TEACHER
from pipelines.stages.kind import ALGORITHM_1, IterationKind
from sgmd_core.objectives import ComparedStates
from workers.discriminator import Discriminator
from workers.fake_score_tracker import FakeScoreTracker
from workers.generator_learner import GeneratorLearner
from workers.score_teacher import ScoreTeacher


class Sent(StrEnum):
    """Tensors that a stage sends, by their size for one sample."""

    LATENTS = "latents"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class CallInputs(ABC):
    """Inputs of a stage's call.

    Attributes:
        call: The call.
        results: Results of the stages that it takes, by name.
        batch_size: Samples of the iteration.
        negative: Embedding of the negative prompt.
        rate: Multiple of the generator's learning rate.
    """

    call: Call
    results: Mapping[str, Future[Any]]
    batch_size: int
    negative: Future[Any]
    rate: float

    @property
    def iteration(self) -> int:
        """Generator updates made before this iteration."""
        return self.call.iteration

    @property
    def share(self) -> float:
        """Samples of the call over samples of the iteration."""
        return self.call.num_samples / self.batch_size

    @property
    def weight(self) -> float:
        """0 where the rank has no sample of its own, else 1."""
        return 0.0 if self.call.stands_in else 1.0

    @property
    def skips(self) -> bool:
        """True in an update that is skipped."""
        return False

    @property
    @abstractmethod
    def data(self) -> Future[Any]:
        """Latents of the data, as many as the call has samples; see `StageSpec.needs_data`."""

    @abstractmethod
    def prompts(self) -> tuple[Any, ...]:
        """Key, captions and, where they are given, random numbers of the call's samples."""

    def of(self, *stages: "StageSpec") -> Future[Any]:
        """Result of the first of these stages that made an input of the call."""
        return next(self.results[stage.name] for stage in stages if stage.name in self.results)


@dataclass(frozen=True, slots=True, eq=False)
class StageSpec:
    """A stage: one method of one role.

    Attributes:
        role: Who does it.
        method: The role's method.
        arguments: Arguments of the method, from the inputs of a call.
        sends: Tensors of its result that travel to another role.
        accumulates: Adds to the gradient that the role's next update uses.
        needs_data: Whether it takes latents of the data, which the feed then reads beside captions.
        fed: Whether it takes captions or data, which may arrive later than other stages' results.
    """

    role: str
    method: Callable[..., Any]
    arguments: Callable[[CallInputs], tuple[Any, ...]]
    sends: tuple[Sent, ...] = ()
    accumulates: bool = False
    needs_data: bool = False
    fed: bool = False

    @property
    def name(self) -> str:
        """Name in schedules, metrics and traces: that of the method."""
        return self.method.__name__

    def step(self, *takes: "StageSpec", keeps_until: "StageSpec | None" = None) -> Stage:
        """The stage in a program, with the stages whose results it takes."""
        names = tuple(stage.name for stage in takes)
        until = None if keeps_until is None else keeps_until.name
        return Stage(self.name, self.role, names, until, self.accumulates, self.fed)


_X0_AND_NOISE = (Sent.LATENTS, Sent.LATENTS, Sent.TEXT)

ROLLOUT = StageSpec(
    GENERATOR, GeneratorLearner.rollout, lambda call: call.prompts(), sends=_X0_AND_NOISE, fed=True
)
SAMPLE = StageSpec(
    GENERATOR, GeneratorLearner.sample, lambda call: call.prompts(), sends=_X0_AND_NOISE, fed=True
)
DENOISE = StageSpec(
    TEACHER,
    ScoreTeacher.denoise,
    lambda call: (call.of(ROLLOUT), call.negative),
    sends=(Sent.LATENTS,),
)
SIGNAL = StageSpec(
    FAKE_SCORE,
    FakeScoreTracker.signal,
    lambda call: (call.of(ROLLOUT), call.of(DENOISE), call.share),
    sends=(Sent.LATENTS,),
)
TRACK = StageSpec(
    FAKE_SCORE,
    FakeScoreTracker.track,
    lambda call: (call.of(ROLLOUT, SAMPLE), call.share),
    accumulates=True,
)
PULLBACK = StageSpec(
    TEACHER,
    ScoreTeacher.pullback,
    lambda call: (call.of(ROLLOUT), call.negative, call.of(SIGNAL)),
    sends=(Sent.LATENTS,),
)
PREDICT = StageSpec(
    FAKE_SCORE,
    FakeScoreTracker.predict,
    lambda call: (call.of(ROLLOUT),),
    sends=(Sent.LATENTS,),
)
COMPARE_STEPS = StageSpec(
    DISCRIMINATOR,
    Discriminator.compare_steps,
    lambda call: (call.of(ROLLOUT), call.of(DENOISE), call.of(PREDICT), call.share),
    sends=(Sent.LATENTS, Sent.LATENTS),
    accumulates=True,
)
COMPLETE = StageSpec(
    FAKE_SCORE,
    FakeScoreTracker.complete,
    lambda call: (call.of(COMPARE_STEPS),),
    sends=(Sent.LATENTS,),
)
COMPARE_DATA = StageSpec(
    DISCRIMINATOR,
    Discriminator.compare_data,
    lambda call: (call.of(ROLLOUT), call.data, call.of(PULLBACK, SIGNAL), call.share),
    sends=(Sent.LATENTS,),
    accumulates=True,
    needs_data=True,
    fed=True,
)
LEARN = StageSpec(
    GENERATOR,
    GeneratorLearner.learn,
    lambda call: (call.of(COMPLETE, COMPARE_DATA, PULLBACK, SIGNAL), call.weight),
    accumulates=True,
)
NOISE_DATA = StageSpec(
    GENERATOR,
    GeneratorLearner.noise_data,
    lambda call: (*call.prompts()[:2], call.data),
    sends=_X0_AND_NOISE,
    needs_data=True,
    fed=True,
)
DENOISE_DATA = StageSpec(
    TEACHER,
    ScoreTeacher.denoise_data,
    lambda call: (call.of(NOISE_DATA), call.negative),
    sends=(Sent.LATENTS,),
)
LEARN_CONSISTENCY = StageSpec(
    GENERATOR,
    GeneratorLearner.learn_consistency,
    lambda call: (call.of(NOISE_DATA), call.of(DENOISE_DATA), call.share),
    accumulates=True,
)
LEARN_FLOW = StageSpec(
    GENERATOR,
    GeneratorLearner.learn_flow,
    lambda call: (*call.prompts()[:2], call.data, call.negative, call.share),
    accumulates=True,
    needs_data=True,
    fed=True,
)
START = StageSpec(
    GENERATOR,
    GeneratorLearner.start,
    lambda call: call.prompts(),
    sends=(Sent.LATENTS, Sent.TEXT),
    fed=True,
)
ANCHOR = StageSpec(
    TEACHER,
    ScoreTeacher.anchor,
    lambda call: (call.of(START), call.negative),
    sends=(Sent.LATENTS,),
)
DIVERSIFY = StageSpec(
    GENERATOR,
    GeneratorLearner.diversify,
    lambda call: (call.of(START), call.of(ANCHOR), call.share),
    accumulates=True,
)
TRAINED_WEIGHTS = StageSpec(GENERATOR, GeneratorLearner.trained_weights, lambda call: ())
MIX_WEIGHTS = StageSpec(
    FAKE_SCORE, FakeScoreTracker.mix_weights, lambda call: (call.of(TRAINED_WEIGHTS), call.skips)
)
HELD_LOSS = StageSpec(FAKE_SCORE, FakeScoreTracker.held_loss, lambda call: (call.of(SAMPLE),))
"""Of a measurement of the lag, as the next one; no iteration has them: see `lag`."""
EXTRA_TRACK = StageSpec(
    FAKE_SCORE,
    FakeScoreTracker.extra_track,
    lambda call: (call.of(SAMPLE), call.share),
    accumulates=True,
)
_UPDATES = (
    *(
        StageSpec(role, learner.gradient_report, lambda call: (call.iteration,))
        for role, learner in (
            (GENERATOR, GeneratorLearner),
            (FAKE_SCORE, FakeScoreTracker),
            (DISCRIMINATOR, Discriminator),
        )
    ),
    StageSpec(
        GENERATOR, GeneratorLearner.step, lambda call: (call.iteration, call.skips, call.rate)
    ),
    *(
        StageSpec(role, learner.step, lambda call: (call.iteration, call.skips))
        for role, learner in ((FAKE_SCORE, FakeScoreTracker), (DISCRIMINATOR, Discriminator))
    ),
)

STAGES = {
    (stage.role, stage.name): stage
    for stage in (
        ROLLOUT,
        SAMPLE,
        DENOISE,
        SIGNAL,
        TRACK,
        PULLBACK,
        PREDICT,
        COMPARE_STEPS,
        COMPLETE,
        COMPARE_DATA,
        LEARN,
        START,
        ANCHOR,
        DIVERSIFY,
        NOISE_DATA,
        DENOISE_DATA,
        LEARN_CONSISTENCY,
        LEARN_FLOW,
        TRAINED_WEIGHTS,
        MIX_WEIGHTS,
        *_UPDATES,
    )
}
"""Every stage that a call of a schedule can name, by role and name."""

assert {stage.name for stage in _UPDATES} == {REPORT, STEP}, "updates have names of their own"


def iteration_program(kind: IterationKind = ALGORITHM_1) -> Program:
    """Program of one iteration: passes over the micro-batches, and updates.

    Args:
        kind: Kind of the iteration.

    Returns:
        The program; of Algorithm 1, which is the default:

            (
                Pass((
                    ROLLOUT.step(keeps_until=LEARN),
                    DENOISE.step(ROLLOUT),
                    SIGNAL.step(ROLLOUT, DENOISE, keeps_until=TRACK),
                    TRACK.step(ROLLOUT),
                    LEARN.step(SIGNAL),
                )),
                Update((GENERATOR, FAKE_SCORE)),
            )
    """
    distil = Pass(tuple(_distilling(kind)))
    judges = () if kind.compared is None else (DISCRIMINATOR,)
    if kind.shared:
        return (distil, Update((GENERATOR, FAKE_SCORE, *judges)))
    mix = WeightTransfer((GENERATOR, TRAINED_WEIGHTS.name), (FAKE_SCORE, MIX_WEIGHTS.name))
    track = Pass((SAMPLE.step(), TRACK.step(SAMPLE)))
    return (
        distil,
        Update((GENERATOR, *judges)),
        *((mix,) if kind.mixes_weights else ()),
        *(track, Update((FAKE_SCORE,))) * kind.fresh_updates,
    )


def _distilling(kind: IterationKind) -> Iterator[Stage]:
    """Stages of the pass that the generator learns from."""
    if kind.diversity:
        yield START.step()
    if kind.consistency:
        yield NOISE_DATA.step()
    if kind.matching:
        yield ROLLOUT.step(keeps_until=LEARN)
        yield DENOISE.step(ROLLOUT, keeps_until=PULLBACK if kind.through_teacher else None)
    if kind.consistency:
        yield DENOISE_DATA.step(NOISE_DATA)
    if kind.diversity:
        yield ANCHOR.step(START)
    if kind.matching:
        comparing = kind.compared is ComparedStates.STEPS
        yield from _learning_by_steps(kind) if comparing else _learning(kind)
    if kind.consistency:
        yield LEARN_CONSISTENCY.step(NOISE_DATA, DENOISE_DATA)
    if kind.flow:
        yield LEARN_FLOW.step()
    if kind.diversity:
        yield DIVERSIFY.step(START, ANCHOR)


def _learning(kind: IterationKind) -> Iterator[Stage]:
    """Stages from the teacher's answer to the generator's learning."""
    signal = SIGNAL.step(ROLLOUT, DENOISE, keeps_until=TRACK if kind.shared else None)
    yield replace(signal, accumulates=kind.joint)
    if kind.shared:
        yield TRACK.step(ROLLOUT)
    last = SIGNAL
    if kind.through_teacher:
        yield PULLBACK.step(ROLLOUT, SIGNAL)
        last = PULLBACK
    if kind.compared is ComparedStates.DATA:
        yield COMPARE_DATA.step(ROLLOUT, last)
        last = COMPARE_DATA
    yield LEARN.step(last)


def _learning_by_steps(kind: IterationKind) -> Iterator[Stage]:
    """The same where a discriminator compares steps of teacher and fake score."""
    yield PREDICT.step(ROLLOUT, keeps_until=TRACK if kind.shared else COMPLETE)
    yield COMPARE_STEPS.step(ROLLOUT, DENOISE, PREDICT)
    yield COMPLETE.step(COMPARE_STEPS)
    if kind.shared:
        # After COMPLETE, because tracking frees the graph that both go through.
        yield TRACK.step(ROLLOUT, COMPLETE)
    yield LEARN.step(COMPLETE)


def needs_data(kind: IterationKind) -> bool:
    """Returns True if a stage of such an iteration takes latents of the data."""
    return any(
        STAGES[stage.role, stage.name].needs_data
        for part in iteration_program(kind)
        if isinstance(part, Pass)
        for stage in part.stages
    )
