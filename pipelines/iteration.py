"""One iteration over the roles, in the order of the SGMD paper's Algorithm 1.

    generator   r0 r1 | l0 r2 | l1 r3 | ...            | step
    teacher        d0 | d1    | d2    | ...            |
    fake score        | s0 t0 | s1 t1 | s2 t2 | ...    | step

    r rollout   d denoise   s signal (input-only VJP)   t track   l learn

So it goes with shared tracking. With fresh tracking the generator steps first, and then come as
many tracking updates as the objective wants, each on new samples of the generator as it is now:

    generator   r0 r1 | l0 r2 | ... | step | g0 g1 ...      | g0 g1 ...      |
    fake score        | s0    | ... |      | t0 t1 ... step | t0 t1 ... step |     g sample

Two more calls come in where they are asked for: where a loss reaches x0 through the teacher's input
as well, each signal passes through the teacher on its way back; and for a diversity loss the
teacher takes a few steps from the generator's initial noise.

Only handles pass through here, never a tensor. A role works through its calls in the order in
which they were made, so this order *is* the schedule; an update comes after all its micro-batches,
so how many of them are in flight changes the waiting and not the numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean
from typing import Any, Protocol, TypeVar

from cluster.worker_group import Pending, WorkerGroup
from pipelines.config import DistillConfig
from sgmd_core.errors import NonFiniteError
from sgmd_core.objectives import GradientPath
from sgmd_core.types import Draws, MicroBatchKey, NoisedBatch, Purpose, Text, TextBatch
from workers.fake_score_tracker import FakeScoreTracker
from workers.generator_learner import GeneratorLearner
from workers.reports import DiversityReport, GradientReport, LearnReport, TrackReport
from workers.score_teacher import ScoreTeacher
from workers.text_encoder import TextEncoder

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Roles:
    """The groups that train together."""

    generator: WorkerGroup[GeneratorLearner]
    fake_score: WorkerGroup[FakeScoreTracker]
    teacher: WorkerGroup[ScoreTeacher]
    text: WorkerGroup[TextEncoder]


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """The captions of one batch.

    Attributes:
        captions: One a sample.
        stored: Their embeddings, where the data brought them along.
    """

    captions: tuple[str, ...]
    stored: Pending[Text] | None = None


@dataclass(frozen=True, slots=True)
class IterationPlan:
    """What is the same in every iteration.

    Attributes:
        micro_batches: Parts that the batch is split into.
        window: Rollouts whose graphs the generator may hold at once.
        fresh_updates: Updates of the fake score, each on new samples of the updated generator; 0
            tracks the samples that the generator learns from, once.
        through_teacher: Signals are completed by the teacher.
        diversity: The generator also learns from the teacher's path.
        mixes_weights: The fake score takes in the generator's weights after each of its updates.
        timeout_s: How long a group of calls may take before the run is given up.
        negative: Embedding of the negative prompt, on its way to the teacher.
    """

    micro_batches: int
    window: int
    fresh_updates: int
    through_teacher: bool
    diversity: bool
    mixes_weights: bool
    timeout_s: float
    negative: Pending[Text]

    @property
    def fresh_tracking(self) -> bool:
        """Whether the fake score is tracked on samples of its own."""
        return self.fresh_updates > 0

    @property
    def batches_per_iteration(self) -> int:
        """Caption batches that one iteration takes from the stream."""
        return 1 + self.fresh_updates


def plan_iteration(config: DistillConfig, negative: Pending[Text]) -> IterationPlan:
    """What a run's settings mean for each of its iterations."""
    return IterationPlan(
        micro_batches=config.batch.micro_batches,
        window=config.topology.window,
        fresh_updates=config.fresh_updates,
        through_teacher=config.objective.path is GradientPath.BOTH_SCORES,
        diversity=config.generator.diversity.enabled,
        mixes_weights=config.fake_score.ida_decay < 1,
        timeout_s=config.topology.call_timeout_s,
        negative=negative,
    )


@dataclass(frozen=True, slots=True)
class IterationReport:
    """What an iteration says about itself; small numbers only.

    Attributes:
        losses: Loss terms, means over the iteration's samples.
        grad_norms: Global gradient norm by role, before clipping; a mean over several updates.
        exit_steps: The rollout step that learnt, one a micro-batch.
        generator_version: Updates the generator has seen, this one included.
    """

    losses: Mapping[str, float]
    grad_norms: Mapping[str, float]
    exit_steps: tuple[int, ...]
    generator_version: int


class Stage(StrEnum):
    """What the controller asks for next."""

    ROLLOUT = "rollout"
    LEARN = "learn"


def stage_order(micro_batches: int, window: int) -> list[tuple[Stage, int]]:
    """The calls of one iteration: rollouts run `window` ahead, then one learns, one rolls out.

    Args:
        micro_batches: Parts of the batch, at least 1.
        window: Most rollouts whose graph is kept at any time, at least 1.

    Returns:
        (stage, micro-batch) in submission order; every micro-batch once per stage.
    """
    ahead = min(window, micro_batches)
    order = [(Stage.ROLLOUT, index) for index in range(ahead)]
    for index in range(micro_batches):
        order.append((Stage.LEARN, index))
        if index + ahead < micro_batches:
            order.append((Stage.ROLLOUT, index + ahead))
    return order


def iterate(
    roles: Roles,
    plan: IterationPlan,
    iteration: int,
    batches: Sequence[PromptBatch],
    draws: Mapping[MicroBatchKey, Draws] | None = None,
) -> IterationReport:
    """Updates the generator once, and the fake score as often as the objective wants.

    Args:
        roles: The groups.
        plan: How the batch is split and how long to wait.
        iteration: Generator updates made before this one.
        batches: One batch, and with fresh tracking one more for each update of the fake score.
        draws: Hands every random number in, to replay a recorded iteration; drawn by counter where
            it is not given.

    Raises:
        NonFiniteError: A loss or gradient is not finite. With shared tracking neither role has
            been updated; with fresh tracking the generator may have been.
    """
    run = _Iteration(roles, plan, iteration, draws or {})
    learned, tracked, diversified = run.distil(batches[0])
    generator_norm = run.check(roles.generator, GeneratorLearner)
    norms: list[float] = []
    if plan.fresh_tracking:
        version = run.step(roles.generator, GeneratorLearner)
        if plan.mixes_weights:
            run.mix_weights()
        for update, batch in enumerate(batches[1:]):
            tracked += run.track_fresh(batch, update)
            norms.append(run.check(roles.fake_score, FakeScoreTracker))
            run.step(roles.fake_score, FakeScoreTracker)
    else:
        norms.append(run.check(roles.fake_score, FakeScoreTracker))
        version = run.step(roles.generator, GeneratorLearner)
        run.step(roles.fake_score, FakeScoreTracker)
    return IterationReport(
        losses=_means([report.metrics for report in [*learned, *tracked, *diversified]]),
        grad_norms={"generator": generator_norm, "fake_score": fmean(norms)},
        exit_steps=tuple(report.exit_step for report in learned),
        generator_version=version,
    )


class Learner(Protocol):
    """A role that gathers gradients and then updates once."""

    def gradient_report(self, iteration: int) -> GradientReport:
        """Norm of what was gathered; updates nothing."""
        ...

    def step(self, iteration: int) -> int:
        """Updates the weights; returns how often they have been updated."""
        ...


L = TypeVar("L", bound=Learner)


@dataclass(frozen=True, slots=True)
class _Iteration:
    """The calls of one iteration; holds what they have in common."""

    roles: Roles
    plan: IterationPlan
    number: int
    draws: Mapping[MicroBatchKey, Draws]

    def distil(
        self, prompts: PromptBatch
    ) -> tuple[list[LearnReport], list[TrackReport], list[DiversityReport]]:
        """Rolls out, scores, tracks (in shared mode) and learns, `window` micro-batches deep."""
        roles, share = self.roles, 1 / self.plan.micro_batches
        texts = self._encode(prompts)
        queries: dict[int, Pending[NoisedBatch]] = {}
        learned: list[Pending[LearnReport]] = []
        tracked: list[Pending[TrackReport]] = []
        diversified: list[Pending[DiversityReport]] = []
        for stage, index in stage_order(self.plan.micro_batches, self.plan.window):
            if stage is Stage.ROLLOUT:
                key = self._key(Purpose.GENERATE, index)
                queries[index] = roles.generator.call_rank(
                    0, GeneratorLearner.rollout, key, texts[index], self.draws.get(key)
                )
                continue
            query = queries.pop(index)
            replica = index % roles.teacher.size
            prediction = roles.teacher.call_rank(
                replica, ScoreTeacher.denoise, query, self.plan.negative
            )
            signal = roles.fake_score.call_rank(
                0, FakeScoreTracker.signal, query, prediction, share
            )
            if not self.plan.fresh_tracking:
                tracked.append(roles.fake_score.call_rank(0, FakeScoreTracker.track, query, share))
            if self.plan.through_teacher:
                signal = roles.teacher.call_rank(
                    replica, ScoreTeacher.pullback, query, self.plan.negative, signal
                )
            learned.append(roles.generator.call_rank(0, GeneratorLearner.learn, signal))
            if self.plan.diversity:
                diversified.append(self._diversify(index, texts[index], replica))
        return (
            self._fetch(roles.generator, learned, "learning"),
            self._fetch(roles.fake_score, tracked, "tracking"),
            self._fetch(roles.generator, diversified, "learning diversity"),
        )

    def track_fresh(self, prompts: PromptBatch, update: int) -> list[TrackReport]:
        """Tracks new samples of the generator, which has been updated by now.

        Args:
            prompts: What the samples show.
            update: Which of the iteration's tracking updates this is; its samples and micro-batches
                are counted on from those of the updates before, so that each has draws of its own.
        """
        roles, parts = self.roles, self.plan.micro_batches
        tracked: list[Pending[TrackReport]] = []
        for index, text in enumerate(self._encode(prompts, update * len(prompts.captions))):
            key = self._key(Purpose.TRACK, update * parts + index)
            query = roles.generator.call_rank(
                0, GeneratorLearner.sample, key, text, self.draws.get(key)
            )
            tracked.append(roles.fake_score.call_rank(0, FakeScoreTracker.track, query, 1 / parts))
        return self._fetch(roles.fake_score, tracked, "tracking")

    def mix_weights(self) -> None:
        """Lets the fake score take in the generator's weights."""
        weights = self.roles.generator.call_rank(0, GeneratorLearner.trained_weights)
        mixed = self.roles.fake_score.call_rank(0, FakeScoreTracker.absorb, weights)
        self._fetch(self.roles.fake_score, [mixed], "mixing weights")

    def check(self, group: WorkerGroup[L], role: type[L]) -> float:
        """Gradient norm of a role whose gradients are complete and finite."""
        pending = group.call(role.gradient_report, self.number)
        report = self._fetch(group, pending, "gathering gradients")[0]
        if not report.finite:
            raise NonFiniteError(
                f"updating the {group.name} in iteration {self.number}",
                f"a gradient norm of {report.grad_norm}",
                "finite gradients",
                "The weights are as they were; lower the learning rate or the objective's weights",
            )
        return report.grad_norm

    def step(self, group: WorkerGroup[L], role: type[L]) -> int:
        """Updates a role; returns how often it has been updated."""
        return self._fetch(group, group.call(role.step, self.number), "updating")[0]

    def _diversify(
        self, index: int, text: Pending[TextBatch], replica: int
    ) -> Pending[DiversityReport]:
        """Shows the generator where the teacher goes from a micro-batch's initial noise."""
        roles, share = self.roles, 1 / self.plan.micro_batches
        key = self._key(Purpose.GENERATE, index)
        start = roles.generator.call_rank(0, GeneratorLearner.start, key, text, self.draws.get(key))
        target = roles.teacher.call_rank(replica, ScoreTeacher.anchor, start, self.plan.negative)
        return roles.generator.call_rank(0, GeneratorLearner.diversify, start, target, share)

    def _encode(self, prompts: PromptBatch, first_sample: int = 0) -> list[Pending[TextBatch]]:
        text, captions, stored = self.roles.text, prompts.captions, prompts.stored
        size = len(captions) // self.plan.micro_batches
        parts = [tuple(range(at, at + size)) for at in range(0, len(captions), size)]
        if stored is not None:
            return [
                text.call_rank(0, TextEncoder.place, stored, part, first_sample) for part in parts
            ]
        return [
            text.call_rank(
                0,
                TextEncoder.encode,
                captions[part[0] : part[-1] + 1],
                tuple(first_sample + row for row in part),
            )
            for part in parts
        ]

    def _key(self, purpose: Purpose, micro_batch: int) -> MicroBatchKey:
        return MicroBatchKey(self.number, micro_batch, purpose)

    def _fetch(self, group: WorkerGroup[Any], pending: Sequence[Pending[R]], doing: str) -> list[R]:
        phase = f"{doing} in iteration {self.number}"
        return group.fetch(pending, timeout_s=self.plan.timeout_s, phase=phase)


def _means(terms: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each loss term over the micro-batches, which are all of one size."""
    names = dict.fromkeys(name for part in terms for name in part)
    return {name: fmean(part[name] for part in terms if name in part) for name in names}
