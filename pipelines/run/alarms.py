"""Warnings while a run is under way: what its losses never say, and what they say too late.

    over_saturation     clips more colourful than the teacher's
    motion_collapse     clips that move less than the teacher's
    diversity_collapse  clips of one caption that are more alike than the teacher's
    tracking_growth     a fake score that falls behind the generator
    residual_dominance  a negative residual that outweighs the Fisher term
    tracking_lag        a fake score whose copies improve while the generator waits
    silent_discriminator  one that tells nothing apart, and teaches noise

Losses of this family do not measure quality: they fall, or stay, while colours burn out and motion
stops. The first three alarms are therefore read from validations, as ratios to the teacher on the
same captions and noise; the last one from measurements (`pipelines.distillation.lag`); the others
from the losses, as means over a window of iterations, because a single noise level says little. An
alarm sounds when a limit is crossed, and again only after the figure has come back. Those that a
recipe names in `alarms.stop` end the run.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from pipelines.config.alarms import AlarmName, AlarmSettings
from pipelines.run.records import IterationRecord, ValidationRecord


@dataclass(frozen=True, slots=True)
class Alarm:
    """A limit that was crossed; one line of alarms.jsonl.

    Attributes:
        iteration: Generator updates made when it was.
        name: Which alarm.
        message: What it means, for people.
        value: The figure.
        limit: The limit.
    """

    iteration: int
    name: AlarmName
    message: str
    value: float
    limit: float

    def to_json(self) -> dict[str, Any]:
        """As alarms.jsonl holds it."""
        return asdict(self)

    def in_words(self) -> str:
        """One line of warning."""
        found = f"{self.name.replace('_', ' ')} at iteration {self.iteration}"
        return f"ALARM {found} ({self.value:.3g}, limit {self.limit:g}): {self.message}"


@dataclass(frozen=True, slots=True)
class _Limit:
    """One side of a figure that it should not be on."""

    name: AlarmName
    value: float
    limit: float
    message: str
    from_below: bool = False

    @property
    def crossed(self) -> bool:
        return self.value < self.limit if self.from_below else self.value > self.limit


class AlarmWatch:
    """Remembers what it takes to hear a limit being crossed.

    Args:
        settings: The limits.
    """

    def __init__(self, settings: AlarmSettings) -> None:
        self._settings = settings
        self._losses: deque[Mapping[str, float]] = deque(maxlen=settings.window)
        self._lowest_tracking = float("inf")
        self._num_seen = 0
        self._sounding: set[AlarmName] = set()

    def iteration(self, record: IterationRecord) -> list[Alarm]:
        """Returns the alarms of an iteration's losses; those of a skipped update say nothing."""
        return self._of(record.iteration + 1, record.losses, record.lag, bool(record.skipped))

    def validation(self, record: ValidationRecord) -> list[Alarm]:
        """Returns the alarms of a validation."""
        return self._sound(record.iteration, _quality_limits(record.figures, self._settings))

    def replay(
        self,
        metrics: Iterable[Mapping[str, Any]],
        validations: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """Takes note of what an earlier part of the run has logged.

        Args:
            metrics: Lines of metrics.jsonl.
            validations: Lines of validation.jsonl.
        """
        for line in metrics:
            lag, skipped = line.get("lag", {}), bool(line.get("skipped"))
            self._of(line["iteration"] + 1, line["losses"], lag, skipped)
        for line in validations:
            self._sound(line["iteration"], _quality_limits(line["figures"], self._settings))

    def _of(
        self, updates: int, losses: Mapping[str, float], lag: Mapping[str, float], skipped: bool
    ) -> list[Alarm]:
        found = self._sound(updates, _lag_limits(lag, self._settings))
        return found if skipped else found + self._losses_of(updates, losses)

    def _losses_of(self, updates: int, losses: Mapping[str, float]) -> list[Alarm]:
        self._losses.append(losses)
        self._num_seen += 1
        if len(self._losses) < self._settings.window:
            return []
        means = {
            name: fmean(entry[name] for entry in self._losses)
            for name in ("tracking", "fisher_norm", "nr_norm", "logit_gap")
            if all(name in entry for entry in self._losses)
        }
        self._lowest_tracking = min(self._lowest_tracking, means.get("tracking", float("inf")))
        if self._num_seen < 2 * self._settings.window:
            means.pop("logit_gap", None)
        return self._sound(updates, _loss_limits(means, self._lowest_tracking, self._settings))

    def _sound(self, updates: int, limits: Iterable[_Limit]) -> list[Alarm]:
        alarms: list[Alarm] = []
        for limit in limits:
            if not limit.crossed:
                self._sounding.discard(limit.name)
            elif limit.name not in self._sounding:
                self._sounding.add(limit.name)
                alarms.append(Alarm(updates, limit.name, limit.message, limit.value, limit.limit))
        return alarms


def _quality_limits(figures: Mapping[str, float], settings: AlarmSettings) -> Iterator[_Limit]:
    if "saturation_ratio" in figures:
        message = "clips are more saturated than the teacher's: lower the generator's rate"
        ratio, limit = figures["saturation_ratio"], settings.saturation_above
        yield _Limit("over_saturation", ratio, limit, message)
    if "flow_top_ratio" in figures:
        message = "clips move less than the teacher's: lower lambda_nr, or raise the tracker's rate"
        ratio, limit = figures["flow_top_ratio"], settings.motion_below
        yield _Limit("motion_collapse", ratio, limit, message, from_below=True)
    if "diversity_ratio" in figures:
        message = "clips of one caption are more alike than the teacher's: lower the rates"
        ratio, limit = figures["diversity_ratio"], settings.diversity_below
        yield _Limit("diversity_collapse", ratio, limit, message, from_below=True)


def _loss_limits(
    means: Mapping[str, float], lowest_tracking: float, settings: AlarmSettings
) -> Iterator[_Limit]:
    if "tracking" in means and lowest_tracking > 0:
        message = "the fake score falls behind: raise its rate, or lower the generator's"
        ratio = means["tracking"] / lowest_tracking
        yield _Limit("tracking_growth", ratio, settings.tracking_growth, message)
    if means.get("fisher_norm", 0.0) > 0 and "nr_norm" in means:
        message = "the negative residual outweighs the Fisher term: lower lambda_nr"
        ratio = means["nr_norm"] / means["fisher_norm"]
        yield _Limit("residual_dominance", ratio, settings.residual_over_fisher, message)
    if "logit_gap" in means:
        message = (
            "the discriminator tells nothing apart, so what it teaches is noise: raise its rate, "
            "or the step that it compares (objective.delta of adm)"
        )
        gap, limit = means["logit_gap"], settings.logit_gap_below
        yield _Limit("silent_discriminator", gap, limit, message, from_below=True)


def _lag_limits(lag: Mapping[str, float], settings: AlarmSettings) -> Iterator[_Limit]:
    if "tracking_lag" in lag:
        message = (
            "so much of the tracking loss drops while the generator waits: raise the fake score's "
            "rate or its updates, or lower the generator's rate"
        )
        yield _Limit("tracking_lag", lag["tracking_lag"], settings.lag_above, message)
