"""Measured lag of the fake score: how much of its loss goes away while the generator waits.

    loss     held_loss                                on held batches of the present generator
    copies   begin_extra                              one settles, then one for each of `lag.rates`
               updates x (extra_track, extra_step)    on new samples; the rate falls to 0
               held_loss                              on the same held batches
             end_extra                                back, bit for bit

    lag      sgmd_core.metrics.lag

A tracking loss alone says nothing of lag: most of it is noise that no network can predict, and that
part changes with the samples. Its drop is error that the fake score had: a lower limit of what it
lags by, whatever the truth is. Three choices make it comparable:

* It is divided by the loss before, so neither the form of the objective, its weights nor the scale
  of the latents enter. Not by the gap to the teacher, which vanishes as the generator succeeds.
* The held batches are the same before and after, so what cannot be predicted cancels.
* The copies learn at several multiples of the fake score's rate, and the best one counts.

All samples are made from the captions of the iteration that comes next, with draws of their own
(`Purpose.LAG`): the measurement depends on the state and on nothing else, so a resumed run repeats
it. One batch is in flight at a time. It costs `costs.lag_passes`.

A stop that is asked for ends a measurement after its batch, without a figure. Before an iteration
at which the fake score starts again nothing is measured: the weights there are at their end.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from cluster.joined import join
from cluster.schedule.execution import execute_schedule
from cluster.schedule.program import Pass
from cluster.schedule.schedule import Call, order_calls
from cluster.worker_group import Future
from pipelines.config.lag import LagSettings
from pipelines.distillation.iteration import PromptBatch, PromptsOf, Roles, encode_part
from pipelines.distillation.iteration_plan import IterationPlan
from pipelines.run.stopping import StopRequests
from pipelines.stages.algorithm import EXTRA_TRACK, HELD_LOSS, SAMPLE, CallInputs, StageSpec
from sgmd_core.metrics.lag import falling_rate, settling_updates, tracking_lag
from sgmd_core.types import Purpose
from workers.extra_updates import HELD
from workers.fake_score_tracker import FakeScoreTracker

TRACKING_LAG, HELD_TRACKING = "tracking_lag", "held_tracking"
COPY_RATE, GENERATOR_RATE = "copy_rate", "generator_rate"
"""Figures of a measurement, as the group `lag` of metrics.jsonl has them."""


def measure_lag(
    roles: Roles,
    plan: IterationPlan,
    settings: LagSettings,
    iteration: int,
    prompts: Sequence[PromptBatch],
    stops: StopRequests | None = None,
) -> dict[str, float]:
    """Measures the lag between two iterations; the roles are then as they were, bit for bit.

    Args:
        roles: The groups; nothing is under way.
        plan: How batches are split, and how long to wait.
        settings: What is measured on.
        iteration: The iteration that comes next.
        prompts: Its batches of captions.
        stops: Requests from outside to end the run.

    Returns:
        `tracking_lag`, `held_tracking` (the loss before) and `copy_rate` (the multiple of the
        copy that counts). Only `held_tracking` where that loss, or those of all copies, are no
        finite number above 0. Nothing where a stop was asked for.

    Raises:
        StopNow: A stop was asked for, and its time is over; extra updates may not be taken back
            yet: `discard` does that.
    """
    batches = _Batches(roles, plan, iteration, prompts, stops or StopRequests())
    try:
        before = batches.held(settings.batches)
        settled = _after(batches, settings, 1.0, settling_updates(settings.updates))
        after = {rate: _after(batches, settings, rate, settings.updates) for rate in settings.rates}
    except _StopAskedFor:
        return {}
    found = tracking_lag(before, settled, after)
    if found is None:
        return {HELD_TRACKING: before}
    lag, rate = found
    return {TRACKING_LAG: lag, HELD_TRACKING: before, COPY_RATE: rate}


class _StopAskedFor(Exception):
    """Ends a measurement between two batches."""


class LagGovernor:
    """Slows the generator while the lag is above its limit.

    A larger lag than `lag.slow_above` halves the generator's learning rate, down to `lag.slowest`
    of it; a smaller one doubles it again. So the rate is a function of the lags that the run has
    recorded, and needs no state of its own: a resumed run has it from metrics.jsonl.

    Args:
        settings: The limit; with None the rate stays 1.
        lines: Lines of metrics.jsonl of the run so far.
    """

    def __init__(self, settings: LagSettings, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        self._settings = settings
        self.replay(lines)

    @property
    def rate(self) -> float:
        """Multiple of the generator's learning rate."""
        return self._rate

    def replay(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Stands where a run with these lines of metrics.jsonl stands."""
        self._rate = 1.0
        for line in lines:
            self.take(line.get("lag", {}))

    def take(self, figures: Mapping[str, float]) -> None:
        """Takes note of a measurement."""
        limit = self._settings.slow_above
        if limit is None or TRACKING_LAG not in figures:
            return
        if figures[TRACKING_LAG] > limit:
            self._rate = max(self._settings.slowest, self._rate / 2)
        else:
            self._rate = min(1.0, self._rate * 2)


class LagWatch:
    """Measures the lag of a run when it is time to, and tells the generator's rate.

    Args:
        settings: How often, on what, and the governor.
        roles: The groups.
        lines: Lines of metrics.jsonl of the run so far.
        restarts: Iterations before which the fake score goes back to its first weights.
    """

    def __init__(
        self,
        settings: LagSettings,
        roles: Roles,
        lines: Iterable[Mapping[str, Any]],
        restarts: Collection[int] = (),
    ) -> None:
        self._settings = settings
        self._restarts = restarts
        self._roles = roles
        self._governor = LagGovernor(settings, lines)
        self._found: dict[int, dict[str, float]] = {}

    @property
    def rate(self) -> float:
        """Multiple of the generator's learning rate from here on."""
        return self._governor.rate

    def replay(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Stands where a run with these lines of metrics.jsonl stands."""
        self._found.clear()
        self._governor.replay(lines)

    def is_due(self, iteration: int) -> bool:
        """Returns True if the lag is measured before an iteration."""
        return self._settings.is_due(iteration) and iteration not in self._restarts

    def measure(
        self, plan: IterationPlan, iteration: int, prompts: PromptsOf, stops: StopRequests
    ) -> str:
        """Measures the lag, if it is due; see `measure_lag`.

        Returns:
            Why there is no figure, in a sentence; empty where there is one, or none is due.
        """
        if not self.is_due(iteration):
            return ""
        figures = measure_lag(
            self._roles, plan, self._settings, iteration, prompts(iteration), stops
        )
        if not figures:
            return ""
        if TRACKING_LAG not in figures:
            return no_lag(iteration, figures[HELD_TRACKING], self._settings)
        self._governor.take(figures)
        if self._settings.slow_above is not None:
            figures[GENERATOR_RATE] = self.rate
        self._found[iteration] = figures
        return ""

    def take(self, iteration: int) -> dict[str, float]:
        """Figures that were measured before an iteration, once; empty where none were."""
        return self._found.pop(iteration, {})


def no_lag(iteration: int, before: float, settings: LagSettings) -> str:
    """Reason that a measurement has no figure."""
    if not (math.isfinite(before) and before > 0):
        return (
            f"no lag before iteration {iteration}: the held tracking loss is {before:g}, expected "
            "a number above 0. Lower fake_score.optimizer.lr"
        )
    rates = ", ".join(f"{rate:g}" for rate in settings.rates)
    return (
        f"no lag before iteration {iteration}: copies of the fake score at {rates} times its rate "
        "have a loss that is not finite. Lower lag.rates"
    )


def _after(batches: "_Batches", settings: LagSettings, rate: float, updates: int) -> float:
    """Held loss of a copy after its extra updates."""
    fake_score = batches.roles.fake_score
    done: list[Future[None]] = fake_score.call(FakeScoreTracker.begin_extra, batches.iteration)
    try:
        for update in range(updates):
            batches.run(EXTRA_TRACK, settings.batches + update)
            now = falling_rate(rate, update, updates)
            done += fake_score.call(FakeScoreTracker.extra_step, now)
        held = batches.held(settings.batches)
    except _StopAskedFor:
        _end(batches, done)
        raise
    _end(batches, done)
    return held


def _end(batches: "_Batches", done: list[Future[None]]) -> None:
    """Takes extra updates back, and waits until that is done."""
    done += batches.roles.fake_score.call(FakeScoreTracker.end_extra)
    attempted = f"measuring the lag before iteration {batches.iteration}"
    batches.roles.fake_score.fetch(done, batches.plan.timeout_s, attempted)


@dataclass(frozen=True, slots=True)
class _Batches:
    """Batches of the present generator, one in flight at a time."""

    roles: Roles
    plan: IterationPlan
    iteration: int
    prompts: Sequence[PromptBatch]
    stops: StopRequests

    def held(self, count: int) -> float:
        """Mean loss of the first batches."""
        return fmean(self.run(HELD_LOSS, number) for number in range(count))

    def run(self, stage: StageSpec, number: int) -> float:
        """Has a batch sampled, and worked on by a stage; returns the mean loss.

        Args:
            stage: What the fake score does with it.
            number: Number of the batch, by which its draws are counted.
        """
        if self.stops.received:
            raise _StopAskedFor
        plan = self.plan
        calls = order_calls(
            (Pass((SAMPLE.step(), stage.step(SAMPLE))),),
            plan.teams,
            plan.micro_batches,
            plan.depth,
            samples_per_micro_batch=plan.micro_batch_sizes,
            iterations=range(self.iteration, self.iteration + 1),
            stage_seconds=plan.stage_seconds,
        )
        texts = [self._text(part, number) for part in range(plan.micro_batches)]
        stages = {SAMPLE.name: SAMPLE, stage.name: stage}

        def dispatch(call: Call, results: Mapping[str, Future[Any]]) -> Future[Any]:
            self.stops.require_time()
            asked = stages[call.stage]
            given = (call, results, plan.batch_size, plan.negative, 1.0)
            arguments = asked.arguments(_Inputs(*given, plan, number, texts))
            group = self.roles.scheduled[call.role]
            return group.call_rank(call.rank, asked.method, *arguments)

        (result,) = execute_schedule(
            calls,
            self.roles.scheduled,
            dispatch,
            lambda call, report: None,
            plan.timeout_s,
            plan.teams,
        )
        reports = [
            (call.num_samples, report) for call, report in result.of(stage.name) if call.counts
        ]
        losses = [report.metrics[HELD] for _, report in reports]
        return fmean(losses, [samples for samples, _ in reports])

    def _text(self, part: int, number: int) -> Future[Any]:
        prompts, rows = self.prompts[number % len(self.prompts)], self.plan.rows(part)
        return encode_part(self.roles.text, prompts, rows, number * self.plan.batch_size)


@dataclass(frozen=True, slots=True)
class _Inputs(CallInputs):
    plan: IterationPlan
    number: int
    texts: Sequence[Future[Any]]

    @property
    def data(self) -> Future[Any]:
        raise AssertionError("no stage of a measurement takes data")

    def prompts(self) -> tuple[Any, ...]:
        call, part = self.call, self.call.micro_batch
        assert part is not None, "samples are made by the micro-batch"
        text = join([(self.texts[part], (0, self.plan.micro_batch_sizes[part]))], call.samples)
        key = self.plan.key(call.iteration, part, 1 + self.number)
        return replace(key, purpose=Purpose.LAG), text
