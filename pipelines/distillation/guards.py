"""Numerical guards: skips updates whose gradient is not finite or a spike, up to a budget.

    gradient reports of an update's roles -> sound               -> step
                                          -> bad, budget left    -> step(skip=True) of all roles
                                          -> bad, budget spent   -> error, no role stepped

The unit is an update of the program: with shared tracking generator and fake score update together,
so both skip; a discriminator updates, and skips, with the generator. With fresh tracking the
updates of an iteration are skipped one by one, and with a staleness a role that has stepped before
the other one's gradient is known keeps its update.

An iteration that skips counts as an iteration: its captions and random numbers are used up. It does
not count as an update: learning rates, bias corrections and averages do not move. Decisions depend
on the norms of this iteration and on those in metrics.jsonl, so a resumed run repeats them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from cluster.schedule.schedule import STEP, Call
from cluster.worker_group import WorkerGroup
from pipelines.config.guards import GuardSettings
from pipelines.config.roles import DISCRIMINATOR, FAKE_SCORE, GENERATOR, TEACHER
from pipelines.run.records import RunEvent
from sgmd_core.errors import AlarmError, NonFiniteError, non_finite_remedy
from workers.discriminator import Discriminator
from workers.fake_score_tracker import FakeScoreTracker
from workers.finite import Diagnosis, NumericalFault
from workers.generator_learner import GeneratorLearner
from workers.reports import GradientReport
from workers.score_teacher import ScoreTeacher

_DIAGNOSE = {
    GENERATOR: GeneratorLearner.diagnose,
    TEACHER: ScoreTeacher.diagnose,
    FAKE_SCORE: FakeScoreTracker.diagnose,
    DISCRIMINATOR: Discriminator.diagnose,
}
_MOST_IDS = 16


@dataclass(frozen=True, slots=True)
class SkippedUpdate:
    """An update that was not made.

    Attributes:
        part: Number of the update in the iteration's program.
        roles: Roles that skipped it.
        kind: `non_finite` or `spike`.
        reason: What was found, and where.
        norm: Gradient norm of a spike.
        sample_ids: Samples of the batch.
    """

    part: int
    roles: tuple[str, ...]
    kind: Literal["non_finite", "spike"]
    reason: str
    norm: float | None
    sample_ids: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As metrics.jsonl holds it."""
        # The key of this file, also in older runs.
        return {("phase" if key == "part" else key): value for key, value in asdict(self).items()}

    def event(self, iteration: int) -> RunEvent:
        """Event of an iteration that skips."""
        roles = " and ".join(role.replace("_", " ") for role in self.roles)
        return RunEvent(
            kind="skipped_update",
            cause=self.reason + _samples_in_words(self.sample_ids),
            action=f"The update of the {roles} was skipped",
            iteration=iteration,
        )


class UpdateGuard:
    """Decides for each update whether it is made.

    Args:
        settings: Budget and limits.
        roles: Groups by role, asked for the cause of a gradient that is not finite.
        timeout_s: Limit of their answers.
        lines: Lines of metrics.jsonl of the run so far.
    """

    def __init__(
        self,
        settings: GuardSettings,
        roles: Mapping[str, WorkerGroup[Any]],
        timeout_s: float,
        lines: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self._settings = settings
        self._groups = roles
        self._timeout_s = timeout_s
        self._weights_are_finite = True
        self.replay(lines)

    @property
    def weights_are_finite(self) -> bool:
        """False once a role has reported a weight that is not finite."""
        return self._weights_are_finite

    def replay(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Stands where a run with these lines of metrics.jsonl stands."""
        self._norms: dict[str, list[float]] = {role: [] for role in self._groups if role != TEACHER}
        self._iterations: list[int] = []
        self._bad: dict[tuple[int, int], SkippedUpdate] = {}
        for line in lines:
            self._take(line["iteration"], line.get("grad_norms", {}), bool(line.get("skipped")))

    def inspect(self, call: Call, report: GradientReport, sample_ids: Sequence[str]) -> None:
        """Looks at the gradient of one rank before its update.

        Args:
            call: The call that reported it.
            report: The gradient.
            sample_ids: Samples that it was accumulated from.

        Raises:
            NonFiniteError: It is not finite, and the budget is spent or a weight is not finite.
            AlarmError: It is a spike, and the budget is spent.
        """
        place = (call.iteration, call.part)
        if place in self._bad:
            return
        ids = tuple(sample_ids)
        if not report.finite:
            error: NonFiniteError | AlarmError = self._cause(call, report)
            found = SkippedUpdate(call.part, (), "non_finite", _in_short(error), None, ids)
            if not self._weights_are_finite:
                raise _with(error, "", ids)
        else:
            limit = self._limit(call.role)
            if report.grad_norm <= limit:
                return
            error = _spike(call, report.grad_norm, limit, self._settings)
            found = SkippedUpdate(call.part, (), "spike", _in_short(error), report.grad_norm, ids)
        self._require_budget(call.iteration, error, ids)
        self._bad[place] = found

    def skips(self, call: Call) -> bool:
        """Returns True if an update, or what follows from one, is to be skipped.

        Remembers the role of the update. Weights are mixed after the generator's update, and only
        if it was made.
        """
        if call.stage != STEP:
            return any(at[0] == call.iteration and at[1] < call.part for at in self._bad)
        place = (call.iteration, call.part)
        found = self._bad.get(place)
        if found is None:
            return False
        if call.role not in found.roles:
            self._bad[place] = SkippedUpdate(
                found.part,
                (*found.roles, call.role),
                found.kind,
                found.reason,
                found.norm,
                found.sample_ids,
            )
        return True

    def skipped_in(self, iteration: int) -> tuple[SkippedUpdate, ...]:
        """Updates that an iteration has skipped."""
        return tuple(one for (number, _), one in self._bad.items() if number == iteration)

    def finished(
        self, iteration: int, norms: Mapping[str, float], skipped: Sequence[SkippedUpdate]
    ) -> None:
        """Takes note of an iteration that is over.

        Args:
            iteration: The iteration.
            norms: Gradient norms of the updates that were made, as metrics.jsonl has them.
            skipped: Updates that were not made.
        """
        self._take(iteration, norms, bool(skipped))
        self._bad = {place: one for place, one in self._bad.items() if place[0] > iteration}

    def _take(self, iteration: int, norms: Mapping[str, float], skipped: bool) -> None:
        for role, known in self._norms.items():
            known += [norms[role]] if role in norms else []
            del known[: -self._settings.spike_window]
        if skipped:
            self._iterations = [*self._iterations, iteration][-self._settings.max_skipped - 1 :]

    def _limit(self, role: str) -> float:
        """Largest norm that is not a spike."""
        known, settings = self._norms[role], self._settings
        if settings.spike_factor is None or len(known) * 2 < settings.spike_window:
            return math.inf
        return settings.spike_factor * median(known)

    def _require_budget(
        self, iteration: int, error: NonFiniteError | AlarmError, ids: tuple[str, ...]
    ) -> None:
        """Raises the error if one more iteration that skips is too many."""
        settings = self._settings
        before = {one for one in self._iterations if one > iteration - settings.window}
        now = {number for number, _ in self._bad}
        if iteration in now or len(before | now) < settings.max_skipped:
            return
        numbers = ", ".join(str(one) for one in sorted(before | now))
        spent = (
            f"Updates were skipped in iterations {numbers} already, and guards.max_skipped is "
            f"{settings.max_skipped} of {settings.window}"
            if numbers
            else "guards.max_skipped=0 skips no update"
        )
        raise _with(error, spent, ids)

    def _cause(self, call: Call, report: GradientReport) -> NonFiniteError:
        """The error that names what was not finite first, or a weight that is not finite."""
        asked = [
            (role, rank, future)
            for role, method in _DIAGNOSE.items()
            if role in self._groups
            for rank, future in enumerate(self._groups[role].call(method, call.iteration))
        ]
        attempted = f"asking for the cause of a gradient in iteration {call.iteration}"
        fetch = self._groups[call.role].fetch
        answers: list[Diagnosis] = fetch([one[2] for one in asked], self._timeout_s, attempted)
        for (role, rank, _), answer in zip(asked, answers, strict=True):
            if answer.broken_weight is not None:
                self._weights_are_finite = False
                return _broken_weight(call.iteration, role, rank, answer.broken_weight)
        faults = [answer.fault for answer in answers if answer.fault is not None]
        if faults:
            return _first(faults).error()
        return non_finite_gradient(call, report)


def non_finite_gradient(call: Call, report: GradientReport) -> NonFiniteError:
    """The error for a gradient that is not finite though all that it was made from is."""
    return NonFiniteError(
        f"updating the {call.role} in iteration {call.iteration}",
        f"a gradient norm of {report.grad_norm}",
        "finite gradients",
        f"The {call.role.replace('_', ' ')} was not updated. "
        + non_finite_remedy(call.iteration, f"{call.role}.optimizer.lr"),
    )


def _first(faults: Sequence[NumericalFault]) -> NumericalFault:
    """The fault that the others come from."""
    return min(faults, key=lambda fault: (fault.micro_batch, fault.stages_before))


def _broken_weight(iteration: int, role: str, rank: int, name: str) -> NonFiniteError:
    return NonFiniteError(
        f"updating in iteration {iteration}",
        f"the weight {name} of the {role.replace('_', ' ')} (rank {rank}) is not finite",
        "finite weights: with this one every further update would be skipped",
        f"Lower {role}.optimizer.lr and go on from a checkpoint before"
        if role != TEACHER
        else "Check the memory of its machine; a teacher is never updated",
    )


def _spike(call: Call, norm: float, limit: float, settings: GuardSettings) -> AlarmError:
    return AlarmError(
        f"updating the {call.role.replace('_', ' ')} in iteration {call.iteration}",
        f"a gradient norm of {norm:.4g}",
        f"at most {limit:.4g}, {settings.spike_factor:g} times the median of the last norms "
        "(guards.spike_factor)",
        f"Look at the samples; lower {call.role}.optimizer.lr where spikes come often",
    )


def _in_short(error: NonFiniteError | AlarmError) -> str:
    """Words of an error without its remedy."""
    return f"{error.found}, while {error.attempted}"


def _with(
    error: NonFiniteError | AlarmError, spent: str, ids: tuple[str, ...]
) -> NonFiniteError | AlarmError:
    """The same error with the samples of its batch and the state of the budget."""
    remedy = f"{spent}. {error.remedy}" if spent else error.remedy
    found = error.found + _samples_in_words(ids)
    return type(error)(error.attempted, found, error.expected, remedy)


def _samples_in_words(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - _MOST_IDS} more" if len(ids) > _MOST_IDS else ""
    return f"; samples of its batch: {', '.join(ids[:_MOST_IDS])}{more}" if ids else ""
