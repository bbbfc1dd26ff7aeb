"""Iterations over the roles: the objective's program, in the order of its schedule.

    generator   r0 r1 | l0 r2 | l1 r3 | ...            | step
    teacher        d0 | d1    | d2    | ...            |
    fake score        | s0 t0 | s1 t1 | s2 t2 | ...    | step

    r rollout   d denoise   s signal (input-only VJP)   t track   l learn

So it goes with shared tracking (the SGMD paper's Algorithm 1). With fresh tracking the generator
steps first, and then come as many tracking updates as the objective wants, each on new samples of
the generator as it is now. `pipelines.distillation.programs` lists the stages of an iteration,
`cluster.schedule.schedule` orders the calls, and this file says what each call is handed.

Only handles pass through here, never a tensor. A role works through its calls in the order in
which they were made, so the schedule's order is what happens; an update comes after all its
micro-batches, so how many of them are in flight changes the waiting and not the numbers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from cluster.joined import join
from cluster.schedule.execution import Asked, Worked, work_through
from cluster.schedule.program import Pass
from cluster.schedule.schedule import GATHER, STEP, Call
from cluster.schedule.staleness import staleness
from cluster.spans import labelled
from cluster.worker_group import Pending, WorkerGroup
from pipelines.config.roles import FAKE_SCORE, GENERATOR, TEACHER
from pipelines.distillation.iteration_plan import IterationPlan
from sgmd_core.errors import NonFiniteError
from sgmd_core.types import Draws, MicroBatchKey, Purpose, Text, TextBatch
from workers.fake_score_tracker import FakeScoreTracker
from workers.generator_learner import GeneratorLearner
from workers.reports import DiversityReport, GradientReport, LearnReport, TrackReport
from workers.score_teacher import ScoreTeacher
from workers.text_encoder import TextEncoder


@dataclass(frozen=True, slots=True)
class Roles:
    """The groups that train together."""

    generator: WorkerGroup[GeneratorLearner]
    fake_score: WorkerGroup[FakeScoreTracker]
    teacher: WorkerGroup[ScoreTeacher]
    text: WorkerGroup[TextEncoder]

    @property
    def scheduled(self) -> dict[str, WorkerGroup[Any]]:
        """Those whose calls a schedule orders, by role."""
        return {GENERATOR: self.generator, TEACHER: self.teacher, FAKE_SCORE: self.fake_score}


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
class IterationReport:
    """What an iteration says about itself; small numbers only.

    Attributes:
        losses: Loss terms, means over the iteration's samples.
        grad_norms: Global gradient norm by role, before clipping; a mean over several updates.
        exit_steps: The rollout step that learnt, one a micro-batch.
        generator_version: Updates the generator has seen, this one included.
        asked: Its calls, and when each was made.
        stale_calls: Those that did not wait for all updates of the iteration before to end.
    """

    losses: Mapping[str, float]
    grad_norms: Mapping[str, float]
    exit_steps: tuple[int, ...]
    generator_version: int
    asked: tuple[Asked, ...]
    stale_calls: int


PromptsOf = Callable[[int], Sequence[PromptBatch]]
"""The batches of an iteration: one, and with fresh tracking one more for each update."""


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
            been updated; with fresh tracking, or with a staleness, the generator may have been.
    """
    (report,) = run_iterations(roles, plan, iteration, 1, lambda _: batches, draws)
    return report


def run_iterations(
    roles: Roles,
    plan: IterationPlan,
    first: int,
    num_iterations: int,
    prompts_of: PromptsOf,
    draws: Mapping[MicroBatchKey, Draws] | None = None,
) -> Iterator[IterationReport]:
    """Iterates; yields a report when an iteration is over, and ends with nothing under way.

    Args:
        roles: The groups.
        plan: How batches are split, how iterations may overlap, how long to wait.
        first: Generator updates made before the first of them.
        num_iterations: How many.
        prompts_of: Asked for the captions of an iteration when they are needed; with a staleness
            that is before the iteration before it is over.
        draws: See `iterate`.

    Raises:
        NonFiniteError: See `iterate`.
    """
    asking = _Asking(roles, plan, prompts_of, draws or {})
    calls = plan.calls(first, num_iterations)
    stale = staleness(calls, plan.program)
    for worked in work_through(calls, roles.scheduled, asking.ask, _heed, plan.timeout_s):
        asking.forget(worked.iteration)
        yield _report(worked, sum(stale[one.place] > 0 for one in worked.asked))


class _Asking:
    """What each call of a schedule is handed.

    Args:
        roles: The groups.
        plan: How batches are split.
        prompts_of: Gives the captions of an iteration.
        draws: Random numbers that are handed in.
    """

    def __init__(
        self,
        roles: Roles,
        plan: IterationPlan,
        prompts_of: PromptsOf,
        draws: Mapping[MicroBatchKey, Draws],
    ) -> None:
        self._roles = roles
        self._plan = plan
        self._prompts_of = prompts_of
        self._draws = draws
        passes = [at for at, part in enumerate(plan.program) if isinstance(part, Pass)]
        self._batch_of_phase = {phase: number for number, phase in enumerate(passes)}
        self._prompts: dict[int, Sequence[PromptBatch]] = {}
        self._texts: dict[tuple[int, int], list[Pending[TextBatch]]] = {}

    def forget(self, iteration: int) -> None:
        """Lets go of an iteration's captions."""
        del self._prompts[iteration]
        for key in [key for key in self._texts if key[0] == iteration]:
            del self._texts[key]

    def ask(self, call: Call, given: Mapping[str, Pending[Any]]) -> Pending[Any]:
        """Makes a call."""
        if call.role == GENERATOR:
            return self._ask_generator(call, given)
        if call.role == TEACHER:
            return self._ask_teacher(call, given)
        return self._ask_fake_score(call, given)

    def _ask_generator(self, call: Call, given: Mapping[str, Pending[Any]]) -> Pending[Any]:
        group, rank = self._roles.generator, call.rank
        match call.stage:
            case "rollout":
                return group.call_rank(rank, GeneratorLearner.rollout, *self._wanted(call))
            case "sample":
                return group.call_rank(rank, GeneratorLearner.sample, *self._wanted(call))
            case "start":
                return group.call_rank(rank, GeneratorLearner.start, *self._wanted(call))
            case "learn":
                signal = given.get("pullback") or given["signal"]
                return group.call_rank(rank, GeneratorLearner.learn, signal)
            case "diversify":
                start, target = given["start"], given["anchor"]
                share = self._share(call)
                return group.call_rank(rank, GeneratorLearner.diversify, start, target, share)
            case "trained_weights":
                return group.call_rank(rank, GeneratorLearner.trained_weights)
            case _:
                return _ask_to_update(group, GeneratorLearner, call)

    def _ask_teacher(self, call: Call, given: Mapping[str, Pending[Any]]) -> Pending[Any]:
        group, rank, negative = self._roles.teacher, call.rank, self._plan.negative
        match call.stage:
            case "denoise":
                return group.call_rank(rank, ScoreTeacher.denoise, given["rollout"], negative)
            case "anchor":
                return group.call_rank(rank, ScoreTeacher.anchor, given["start"], negative)
            case _:
                query, signal = given["rollout"], given["signal"]
                return group.call_rank(rank, ScoreTeacher.pullback, query, negative, signal)

    def _ask_fake_score(self, call: Call, given: Mapping[str, Pending[Any]]) -> Pending[Any]:
        group, rank = self._roles.fake_score, call.rank
        match call.stage:
            case "signal":
                query, prediction = given["rollout"], given["denoise"]
                share = self._share(call)
                return group.call_rank(rank, FakeScoreTracker.signal, query, prediction, share)
            case "track":
                query = given.get("rollout") or given["sample"]
                return group.call_rank(rank, FakeScoreTracker.track, query, self._share(call))
            case "absorb":
                weights = given["trained_weights"]
                return group.call_rank(rank, FakeScoreTracker.absorb, weights)
            case _:
                return _ask_to_update(group, FakeScoreTracker, call)

    def _share(self, call: Call) -> float:
        """Samples of a call over samples of the iteration."""
        return call.num_samples / self._plan.batch_size

    def _wanted(self, call: Call) -> tuple[MicroBatchKey, Pending[TextBatch], Draws | None]:
        """Key, captions and, where they are handed in, random numbers of a call."""
        assert call.micro_batch is not None, "asked for samples without a micro-batch"
        update = self._batch_of_phase[call.phase]
        # Micro-batches of the tracking updates are counted on, so that each has draws of its own.
        index = max(0, update - 1) * self._plan.micro_batches + call.micro_batch
        purpose = Purpose.TRACK if update else Purpose.GENERATE
        key = MicroBatchKey(call.iteration, index, purpose)
        text = self._texts_of(call.iteration, call.phase)[call.micro_batch]
        whole = (0, self._plan.micro_batch_size)
        draws = self._draws.get(key)
        return (
            key,
            join([(text, whole)], call.samples),
            None if draws is None else draws.cut(*call.samples),
        )

    def _texts_of(self, iteration: int, phase: int) -> list[Pending[TextBatch]]:
        """The captions of a pass, encoded: one claim a micro-batch."""
        if (iteration, phase) not in self._texts:
            if iteration not in self._prompts:
                self._prompts[iteration] = self._prompts_of(iteration)
            batch = self._batch_of_phase[phase]
            prompts = self._prompts[iteration][batch]
            first_sample = max(0, batch - 1) * self._plan.batch_size
            self._texts[iteration, phase] = [
                self._encode(iteration, phase, index, prompts, first_sample)
                for index in range(self._plan.micro_batches)
            ]
        return self._texts[iteration, phase]

    def _encode(
        self, iteration: int, phase: int, index: int, prompts: PromptBatch, first_sample: int
    ) -> Pending[TextBatch]:
        text, size = self._roles.text, self._plan.micro_batch_size
        rows = tuple(range(index * size, (index + 1) * size))
        with labelled(iteration, phase, index):
            if prompts.stored is not None:
                return text.call_rank(0, TextEncoder.place, prompts.stored, rows, first_sample)
            captions = prompts.captions[rows[0] : rows[-1] + 1]
            indices = tuple(first_sample + row for row in rows)
            return text.call_rank(0, TextEncoder.encode, captions, indices)


def _ask_to_update(
    group: WorkerGroup[Any], role: type[GeneratorLearner] | type[FakeScoreTracker], call: Call
) -> Pending[Any]:
    method = role.gradient_report if call.stage == GATHER else role.step
    return group.call_rank(call.rank, method, call.iteration)


def _heed(call: Call, report: Any) -> None:  # noqa: ANN401  (whatever a stage returns)
    """Stops before an update on gradients that are not finite."""
    if isinstance(report, GradientReport) and not report.finite:
        raise NonFiniteError(
            f"updating the {call.role} in iteration {call.iteration}",
            f"a gradient norm of {report.grad_norm}",
            "finite gradients",
            "The weights are as they were; lower the learning rate or the objective's weights",
        )


def _report(worked: Worked, stale_calls: int) -> IterationReport:
    learned: list[LearnReport] = [report for _, report in worked.of("learn")]
    tracked: list[TrackReport] = [report for _, report in worked.of("track")]
    diversified: list[DiversityReport] = [report for _, report in worked.of("diversify")]
    norms: dict[str, list[float]] = {GENERATOR: [], FAKE_SCORE: []}
    for call, report in worked.of(GATHER):
        if call.rank == 0:
            norms[call.role].append(report.grad_norm)
    exits = {call.micro_batch: report.exit_step for call, report in worked.of("learn")}
    versions = [version for call, version in worked.of(STEP) if call.role == GENERATOR]
    return IterationReport(
        losses=_means([report.metrics for report in [*learned, *tracked, *diversified]]),
        grad_norms={role: fmean(found) for role, found in norms.items()},
        exit_steps=tuple(exits.values()),
        generator_version=versions[0],
        asked=worked.asked,
        stale_calls=stale_calls,
    )


def _means(terms: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each loss term over the calls of its stage, which are all about as many samples."""
    names = dict.fromkeys(name for part in terms for name in part)
    return {name: fmean(part[name] for part in terms if name in part) for name in names}
