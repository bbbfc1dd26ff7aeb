"""Runs iterations: executes a program of stages in the order of its schedule.

    stages.algorithm         stages of an iteration, what each is handed        data
    cluster.schedule         order of the calls, waits                          a pure function
    run_iterations           dispatches the calls, checks gradients, reports

Only futures pass through here, never a tensor. A role works through its calls in the order in which
they were made, so the schedule's order is the order of execution. Updates come after all
micro-batches, so the depth (micro-batches in flight) changes how long roles wait and no number.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from cluster.joined import join
from cluster.schedule.execution import IssuedCall, IterationResult, execute_schedule
from cluster.schedule.program import Pass
from cluster.schedule.schedule import REPORT, STEP, Call
from cluster.schedule.staleness import staleness
from cluster.spans import labelled
from cluster.worker_group import Future, WorkerGroup
from pipelines.config.roles import DISCRIMINATOR, FAKE_SCORE, GENERATOR, TEACHER
from pipelines.distillation.guards import SkippedUpdate, UpdateGuard, non_finite_gradient
from pipelines.distillation.iteration_plan import IterationPlan
from pipelines.run.stopping import StopRequests
from pipelines.stages.algorithm import (
    DIVERSIFY,
    LEARN,
    LEARN_CONSISTENCY,
    LEARN_FLOW,
    STAGES,
    TRACK,
    CallInputs,
)
from sgmd_core.objectives.adversarial import finished_gaps
from sgmd_core.types import DataBatch, Draws, MicroBatchKey, Text, TextBatch
from workers.discriminator import Discriminator
from workers.fake_score_tracker import FakeScoreTracker
from workers.generator_learner import GeneratorLearner
from workers.reports import (
    ConsistencyReport,
    DiversityReport,
    FlowReport,
    GradientReport,
    LearnReport,
    TrackReport,
)
from workers.saving import LearningRole
from workers.score_teacher import ScoreTeacher
from workers.text_encoder import TextEncoder

_Losses = LearnReport | TrackReport | DiversityReport | ConsistencyReport | FlowReport


@dataclass(frozen=True, slots=True)
class Roles:
    """The groups that train together."""

    generator: WorkerGroup[GeneratorLearner]
    fake_score: WorkerGroup[FakeScoreTracker]
    teacher: WorkerGroup[ScoreTeacher]
    text: WorkerGroup[TextEncoder]
    discriminator: WorkerGroup[Discriminator] | None = None

    @property
    def learners(self) -> dict[str, WorkerGroup[LearningRole]]:
        """Those that are updated, by role: they have a state."""
        found: dict[str, WorkerGroup[Any]] = {
            GENERATOR: self.generator,
            FAKE_SCORE: self.fake_score,
        }
        if self.discriminator is not None:
            found[DISCRIMINATOR] = self.discriminator
        return found

    @property
    def scheduled(self) -> dict[str, WorkerGroup[Any]]:
        """Those whose calls a schedule orders, by role."""
        return {GENERATOR: self.generator, TEACHER: self.teacher, **self.learners}


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """The captions of one batch.

    Attributes:
        captions: One per sample.
        stored: Their embeddings, where the data brought them along.
        dropped: Rows whose caption is replaced by the empty one; `captions` has them empty already.
        sample_ids: One per sample, where they have names.
        data: Latents of the same rows, where the program asks for them.
    """

    captions: tuple[str, ...]
    stored: Future[Text] | None = None
    dropped: frozenset[int] = frozenset()
    sample_ids: tuple[str, ...] = ()
    data: Future[DataBatch] | None = None


@dataclass(frozen=True, slots=True)
class IterationReport:
    """Report of an iteration; small numbers only.

    Attributes:
        losses: Loss terms, means over the iteration's samples.
        grad_norms: Global gradient norm by role, before clipping; a mean over several updates, of
            those that were made. Where a recipe asks for it, also by `ROLE/LAYER`.
        exit_steps: Rollout step that was learned, for each micro-batch.
        generator_version: Updates the generator has seen, this one included.
        issued: Its calls, with the time at which each was made.
        stale_calls: Calls that did not wait for all updates of the previous iteration.
        skipped: Updates that were skipped, and why.
        learning_rates: By role, of its last update that was made; by its schedule alone.
    """

    losses: Mapping[str, float]
    grad_norms: Mapping[str, float]
    exit_steps: tuple[int, ...]
    generator_version: int
    issued: tuple[IssuedCall, ...]
    stale_calls: int
    skipped: tuple[SkippedUpdate, ...] = ()
    learning_rates: Mapping[str, float] = field(default_factory=dict)


PromptsOf = Callable[[int], Sequence[PromptBatch]]
"""Returns the batches of an iteration: one, and with fresh tracking one more for each update."""


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
        draws: Random numbers of a recorded iteration, to replay it; others are drawn by counter.

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
    guard: UpdateGuard | None = None,
    stops: StopRequests | None = None,
) -> Iterator[IterationReport]:
    """Runs iterations; yields a report after each, and ends with no call under way.

    Args:
        roles: The groups.
        plan: How batches are split, how iterations may overlap, how long to wait.
        first: Number of the first of them.
        num_iterations: How many.
        prompts_of: Returns the captions of an iteration; called when they are needed, which with a
            staleness is before the previous iteration has finished.
        draws: See `iterate`.
        guard: Decides which updates are skipped; None: none, and a bad one raises.
        stops: With a stop that was asked for, the iterations that have begun are the last ones.

    Raises:
        StopNow: A stop was asked for, and its time is over.
        NonFiniteError: See `iterate`; with a guard, only where its budget is spent.
        AlarmError: Gradient norms have spent the guard's budget.
    """
    stops = stops or StopRequests()
    dispatcher = _CallDispatcher(roles, plan, prompts_of, draws or {}, guard, stops)
    calls = plan.calls(first, num_iterations)
    stale = staleness(calls, plan.program, plan.teams)
    results = execute_schedule(
        calls,
        roles.scheduled,
        dispatcher.dispatch,
        dispatcher.on_report,
        plan.timeout_s,
        plan.teams,
        goes_on=lambda: not stops.received,
    )
    for result in results:
        dispatcher.release(result.iteration)
        skipped = guard.skipped_in(result.iteration) if guard is not None else ()
        report = _report(result, sum(stale[one.place] > 0 for one in result.issued), skipped)
        if guard is not None:
            guard.finished(result.iteration, report.grad_norms, skipped)
        yield report


class _CallDispatcher:
    """Makes the calls of a schedule: binds each stage to its group, method and arguments.

    Args:
        roles: The groups.
        plan: Sizes of batch and micro-batches.
        prompts_of: Returns the captions of an iteration.
        draws: Random numbers that are given instead of drawn.
        guard: Decides which updates are skipped.
        stops: Requests from outside to end the run.
    """

    def __init__(
        self,
        roles: Roles,
        plan: IterationPlan,
        prompts_of: PromptsOf,
        draws: Mapping[MicroBatchKey, Draws],
        guard: UpdateGuard | None,
        stops: StopRequests,
    ) -> None:
        self._guard = guard
        self._stops = stops
        self._groups = roles.scheduled
        self._text = roles.text
        self._plan = plan
        self._prompts_of = prompts_of
        self._draws = draws
        passes = [at for at, part in enumerate(plan.program) if isinstance(part, Pass)]
        self._batch_of_part = {part: number for number, part in enumerate(passes)}
        self._prompts: dict[int, Sequence[PromptBatch]] = {}
        self._texts: dict[tuple[int, int], list[Future[TextBatch]]] = {}

    def dispatch(self, call: Call, results: Mapping[str, Future[Any]]) -> Future[Any]:
        """Makes a call with the results of the stages that it takes."""
        self._stops.require_time()
        stage, plan = STAGES[call.role, call.stage], self._plan
        inputs = _Inputs(call, results, plan.batch_size, plan.negative, plan.generator_rate, self)
        arguments = stage.arguments(inputs)
        return self._groups[call.role].call_rank(call.rank, stage.method, *arguments)

    def on_report(self, call: Call, report: Any) -> None:  # noqa: ANN401  (of any stage)
        """Looks at the gradient of an update before it is made.

        Raises:
            NonFiniteError: It is not finite, and may not be skipped.
            AlarmError: Its norm is a spike, and may not be skipped.
        """
        if not isinstance(report, GradientReport):
            return
        if self._guard is not None:
            self._guard.inspect(call, report, self._sample_ids(call))
        elif not report.finite:
            raise non_finite_gradient(call, report)

    def skips(self, call: Call) -> bool:
        """Returns True for an update that is skipped, and for a mixing that would follow it."""
        return self._guard is not None and self._guard.skips(call)

    def _sample_ids(self, call: Call) -> tuple[str, ...]:
        """Samples that an update learns from: those of the last pass before it."""
        batch = max(number for at, number in self._batch_of_part.items() if at < call.part)
        return self._prompts[call.iteration][batch].sample_ids

    def release(self, iteration: int) -> None:
        """Drops the captions of a finished iteration."""
        del self._prompts[iteration]
        for key in [key for key in self._texts if key[0] == iteration]:
            del self._texts[key]

    def data(self, call: Call) -> Future[DataBatch]:
        """Latents of the data of a call's samples."""
        assert call.micro_batch is not None, "data are asked for without a micro-batch"
        batch = self._prompts[call.iteration][self._batch_of_part[call.part]]
        assert batch.data is not None, "the feed reads no latents"
        before = self._plan.rows(call.micro_batch)[0]
        start, stop = call.samples
        return join([(batch.data, (0, self._plan.batch_size))], (before + start, before + stop))

    def prompts(self, call: Call) -> tuple[MicroBatchKey, Future[TextBatch], Draws | None]:
        """Key, captions and, where they are given, random numbers of a call."""
        assert call.micro_batch is not None, "samples are asked for without a micro-batch"
        key = self._plan.key(call.iteration, call.micro_batch, self._batch_of_part[call.part])
        text = self._texts_of(call.iteration, call.part)[call.micro_batch]
        whole = (0, self._plan.micro_batch_sizes[call.micro_batch])
        draws = self._draws.get(replace(key, exit_draw=None, incarnation=0))
        return (
            key,
            join([(text, whole)], call.samples),
            None if draws is None else draws.cut(*call.samples),
        )

    def _texts_of(self, iteration: int, part: int) -> list[Future[TextBatch]]:
        """The captions of a pass, encoded: one future a micro-batch."""
        if (iteration, part) not in self._texts:
            if iteration not in self._prompts:
                self._prompts[iteration] = self._prompts_of(iteration)
            batch = self._batch_of_part[part]
            prompts = self._prompts[iteration][batch]
            first_sample = max(0, batch - 1) * self._plan.batch_size
            texts: list[Future[TextBatch]] = []
            for index in range(self._plan.micro_batches):
                rows = self._plan.rows(index)
                with labelled(iteration, part, index):
                    texts.append(encode_part(self._text, prompts, rows, first_sample))
            self._texts[iteration, part] = texts
        return self._texts[iteration, part]


def encode_part(
    text: WorkerGroup[TextEncoder], prompts: PromptBatch, rows: range, first_sample: int
) -> Future[TextBatch]:
    """Has some captions of a batch encoded, or their embeddings taken.

    Args:
        text: The encoder.
        prompts: The captions.
        rows: Which of them.
        first_sample: Place of the batch's first sample, by which random draws are counted.
    """
    if prompts.stored is not None:
        dropped = tuple(sorted(prompts.dropped))
        return text.call_rank(
            0, TextEncoder.place, prompts.stored, tuple(rows), first_sample, dropped
        )
    captions = prompts.captions[rows.start : rows.stop]
    indices = tuple(first_sample + row for row in rows)
    return text.call_rank(0, TextEncoder.encode, captions, indices)


@dataclass(frozen=True, slots=True)
class _Inputs(CallInputs):
    dispatcher: _CallDispatcher

    @property
    def skips(self) -> bool:
        return self.dispatcher.skips(self.call)

    @property
    def data(self) -> Future[DataBatch]:
        return self.dispatcher.data(self.call)

    def prompts(self) -> tuple[MicroBatchKey, Future[TextBatch], Draws | None]:
        return self.dispatcher.prompts(self.call)


def _report(
    result: IterationResult, stale_calls: int, skipped: tuple[SkippedUpdate, ...]
) -> IterationReport:
    reported: list[tuple[Call, _Losses]] = [
        (call, report)
        for stage in (LEARN, TRACK, DIVERSIFY, LEARN_CONSISTENCY, LEARN_FLOW)
        for call, report in result.of(stage.name)
        if call.counts
    ]
    norms: dict[str, list[float]] = {}
    rates: dict[str, float] = {}
    not_made = {(one.part, role) for one in skipped for role in one.roles}
    for call, report in result.of(REPORT):
        if call.rank == 0 and (call.part, call.role) not in not_made:
            norms.setdefault(call.role, []).append(report.grad_norm)
            rates[call.role] = report.learning_rate
            for block, norm in report.blocks.items():
                norms.setdefault(f"{call.role}/{block}", []).append(norm)
    exits = {call.micro_batch: report.exit_step for call, report in result.of(LEARN.name)}
    versions = [version for call, version in result.of(STEP) if call.role == GENERATOR]
    return IterationReport(
        losses=finished_gaps(
            _means([(call.num_samples, report.metrics) for call, report in reported])
        ),
        grad_norms={role: fmean(found) for role, found in norms.items() if found},
        exit_steps=tuple(exits.values()),
        generator_version=versions[0],
        issued=result.issued,
        stale_calls=stale_calls,
        skipped=skipped,
        learning_rates=rates,
    )


def _means(terms: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Mean of each loss term over the samples of its stage's calls."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for _, part in terms for name in part):
        own = [(samples, part[name]) for samples, part in terms if name in part]
        sizes, values = zip(*own, strict=True)
        mean = fmean(values, None if len({*sizes}) == 1 else sizes)
        # Of an update that was skipped; JSON has no NaN.
        if math.isfinite(mean):
            found[name] = mean
    return found
