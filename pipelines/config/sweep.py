"""The section `sweep:` of a recipe: the space of settings, how it is searched, what ranks."""

import json
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from pipelines.config.checkpointing import Figure
from pipelines.config.figures import Mode
from pipelines.config.section import Section

_KINDS = ("choice", "uniform", "log_uniform", "integers", "log_integers")


class Dimension(Section):
    """Values that one setting may take: exactly one of the kinds, and where it applies."""

    choice: list[JsonValue] | None = None
    """One of these."""
    uniform: tuple[float, float] | None = None
    """A number between two ends."""
    log_uniform: tuple[float, float] | None = None
    """The same, by its logarithm; both ends above 0."""
    integers: tuple[int, int] | None = None
    """A whole number, both ends included."""
    log_integers: tuple[int, int] | None = None
    """The same, by its logarithm; both ends above 0."""
    when: dict[str, JsonValue] = Field(default_factory=dict)
    """Searched only where other keys of the space have these values (a list: one of them).
    Elsewhere the setting stays as in the recipe."""

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        given = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"one of {', '.join(_KINDS)} is needed, found {given or 'none'}")
        if self.choice is not None:
            if not self.choice:
                raise ValueError("choice is empty")
            return self
        low, high = self.ends
        if low >= high:
            raise ValueError(f"{given[0]} is [{low}, {high}], expected the smaller end first")
        if self.is_log and low <= 0:
            raise ValueError(f"{given[0]} begins at {low}, expected more than 0")
        return self

    @property
    def is_log(self) -> bool:
        """True where values are spread by their logarithm."""
        return self.log_uniform is not None or self.log_integers is not None

    @property
    def is_whole(self) -> bool:
        """True where values are whole numbers of a range."""
        return self.integers is not None or self.log_integers is not None

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends of a range.

        Raises:
            ValueError: It is a choice.
        """
        for ends in (self.uniform, self.log_uniform, self.integers, self.log_integers):
            if ends is not None:
                return ends
        raise ValueError("a choice has no ends")

    @property
    def corners(self) -> list[Any]:
        """The values at which a setting is checked: all of a choice, both ends of a range."""
        return list(self.choice) if self.choice is not None else list(self.ends)

    def applies(self, settings: Mapping[str, Any]) -> bool:
        """Returns True if its condition holds in these settings."""
        return all(
            key in settings and settings[key] in _listed(self.when[key]) for key in self.when
        )

    @property
    def places(self) -> dict[str, JsonValue]:
        """Settings in which it applies: the first value of each condition."""
        return {key: _listed(wanted)[0] for key, wanted in self.when.items()}


def _listed(wanted: JsonValue) -> list[JsonValue]:
    return wanted if isinstance(wanted, list) else [wanted]


class SchedulerSettings(Section):
    """Ends trials that do worse than others at the same iteration."""

    method: Literal["none", "asha", "median"] = "none"
    """`asha`: at each rung the best 1 / `reduction_factor` go on. `median`: who is worse than the
    median of the others' means so far ends."""
    grace_iterations: int = Field(default=10, ge=1)
    """No trial ends before."""
    reduction_factor: int = Field(default=3, ge=2)
    """Of ASHA: rungs are at `grace_iterations` times its powers."""


class SweepSettings(Section):
    """Search of `sgmd sweep`: many short runs of this recipe."""

    grid: dict[str, list[JsonValue]] = Field(default_factory=dict)
    """Values to try by dotted key, for example `objective.lambda_nr: [0.05, 0.1]`."""
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    """Settings in which every trial differs from the recipe, by dotted key."""
    iterations: int = Field(default=50, ge=1)
    """Length of one trial."""
    score: Figure = "frechet"
    """Validation figure that ranks the trials."""
    mode: Mode = "min"
    """Direction of a good score: `min`, a small one, or `max`."""
    concurrent_trials: int = Field(default=1, ge=1)
    """Trials that run side by side."""
    space: dict[str, Dimension] = Field(default_factory=dict)
    """More keys, for example `objective.lambda_nr: {log_uniform: [0.01, 1.0]}`."""
    search: Literal["grid", "random", "tpe", "pb2"] = "grid"
    """`grid`: every combination. `random`: drawn. `tpe`: Optuna's, which learns from the trials
    before. `pb2`: a population whose worst members go on from the state of the best."""
    trials: int = Field(default=16, ge=1)
    """Points that are drawn; `grid` tries all instead."""
    seeds: list[int] = Field(default_factory=list)
    """Each point is run once with each; []: once, with the recipe's."""
    validate_every: int | None = Field(default=None, ge=1)
    """Iterations between two validations of a trial, by which a scheduler decides; null: at its end
    only."""
    scheduler: SchedulerSettings = SchedulerSettings()
    """Ends trials early."""
    tradeoffs: dict[Figure, Mode] = Field(default_factory=dict)
    """Other figures that are searched beside the score; the result is a Pareto front."""
    start_from: str | None = None
    """Folder of a run; every trial goes on from its newest checkpoint."""
    share_teacher: bool = False
    """Share one teacher pool and one text encoder, with its cache, among all trials, instead of
    copies of their own; needs `topology.mode: pools` and a teacher of one rank."""

    def contradictions(self) -> Iterator[str]:
        """Sentences on settings that do not fit together."""
        return _contradictions(self)

    def unsearchable(self) -> Iterator[str]:
        """Sentences on what compares nothing, which only a new sweep is refused for.

        Recipes that runs and older sweeps have kept may say it, and are read.
        """
        return _unsearchable(self)

    @property
    def dimensions(self) -> dict[str, Dimension]:
        """Everything that is searched, by dotted key; keys come after those they depend on."""
        found = {key: Dimension(choice=values) for key, values in self.grid.items() if values}
        found |= self.space
        ordered: dict[str, Dimension] = {}
        while len(ordered) < len(found):
            ready = {
                key: each
                for key, each in found.items()
                if key not in ordered and all(other in ordered for other in each.when)
            }
            if not ready:
                return {**ordered, **found}
            ordered |= ready
        return ordered

    @property
    def objectives(self) -> dict[str, Mode]:
        """Every figure that is searched, the score first."""
        return {self.score: self.mode, **self.tradeoffs}

    @property
    def is_continuous(self) -> bool:
        """True if a range is among what is searched."""
        return any(each.choice is None for each in self.space.values())


_OF_SWEEP = {
    "seed": "seeds runs a point with several",
    "name": "trials are named by their points",
    "output": "trials lie in the folder of the sweep",
    "iterations": "all trials have those of sweep.iterations",
    "validation.every": "all trials are validated at sweep.validate_every",
    "sweep": "a trial does not read it",
    "study": "a trial does not read it",
}
"""Settings and sections that neither points nor all trials may have, each with what there is."""


def _contradictions(sweep: SweepSettings) -> Iterator[str]:
    keys = {**sweep.grid, **sweep.space}
    for key in sweep.grid.keys() & sweep.space.keys():
        yield f"{key} is in grid and in space"
    for key in keys.keys() & sweep.settings.keys():
        yield f"{key} is searched, and settings gives it one value"
    for key, each in sweep.space.items():
        for other, wanted in each.when.items():
            if other == key or other not in keys:
                yield f"space.{key} has a condition on {other}, which is not searched beside it"
                continue
            known = keys[other]
            choice = known.choice if isinstance(known, Dimension) else known
            if choice is None or any(value not in choice for value in _listed(wanted)):
                yield (
                    f"space.{key} applies when {other} is {wanted}, which is not one of its choices"
                )
    if _has_cycle(sweep):
        yield "conditions of the space depend on one another in a circle"
    if sweep.score in sweep.tradeoffs:
        yield f"tradeoffs names {sweep.score}, which is the score"
    if len(set(sweep.seeds)) < len(sweep.seeds) or any(seed < 0 for seed in sweep.seeds):
        yield f"seeds is {sweep.seeds}, expected different numbers from 0"
    if sweep.search == "grid" and sweep.is_continuous:
        yield "search is grid, and a range has no grid; set search to random or tpe"
    yield from _scheduler_contradictions(sweep)
    if sweep.search == "pb2":
        yield from _pb2_contradictions(sweep)


def _unsearchable(sweep: SweepSettings) -> Iterator[str]:
    for keys, words in (
        ({**sweep.grid, **sweep.space}, "searched"),
        (sweep.settings, "one of sweep.settings"),
    ):
        for key in keys:
            instead = _OF_SWEEP.get(key, _OF_SWEEP.get(key.partition(".")[0]))
            if instead is not None:
                yield f"{key} cannot be {words}; {instead}"
    for key, each in sweep.dimensions.items():
        values = each.choice or []
        counts = Counter(map(_as_compared, values))
        for compared, value in {_as_compared(value): value for value in values}.items():
            if counts[compared] > 1:
                yield f"{key} has {json.dumps(value)} more than once"


def _as_compared(value: JsonValue) -> Hashable:
    """Equal for values that set the same: 1 and 1.0, but not true."""
    if isinstance(value, list):
        return tuple(map(_as_compared, value))
    if isinstance(value, dict):
        return frozenset((key, _as_compared(each)) for key, each in value.items())
    return isinstance(value, bool), value


def _has_cycle(sweep: SweepSettings) -> bool:
    left = {key: set(each.when) & sweep.space.keys() for key, each in sweep.space.items()}
    while free := [key for key, needs in left.items() if not needs & left.keys()]:
        for key in free:
            del left[key]
    return bool(left)


def _scheduler_contradictions(sweep: SweepSettings) -> Iterator[str]:
    if sweep.scheduler.method == "none":
        return
    if sweep.validate_every is None or sweep.validate_every >= sweep.iterations:
        yield (
            f"scheduler {sweep.scheduler.method} decides by validations on the way; set "
            f"validate_every below iterations ({sweep.iterations})"
        )
    if len(sweep.seeds) > 1:
        yield (
            "a scheduler ends single runs, and the mean over seeds needs all of them; search with "
            "one seed, then run the best with several"
        )
    if sweep.search == "pb2":
        yield "pb2 is a scheduler itself; set scheduler.method to none"


def _pb2_contradictions(sweep: SweepSettings) -> Iterator[str]:
    if any(each.uniform is None and each.log_uniform is None for each in sweep.dimensions.values()):
        yield "pb2 searches uniform and log_uniform keys only"
    if any(each.when for each in sweep.space.values()):
        yield "pb2 knows no conditions"
    if sweep.validate_every is None or sweep.validate_every >= sweep.iterations:
        yield f"pb2 changes settings at validations; set validate_every below {sweep.iterations}"
    if len(sweep.seeds) > 1 or sweep.tradeoffs:
        yield "pb2 takes one seed and one score"
    if sweep.trials < 4:
        yield f"pb2 needs a population: trials is {sweep.trials}, expected 4 or more"
    if sweep.concurrent_trials < sweep.trials:
        yield (
            "pb2 compares the members that run at once: concurrent_trials is "
            f"{sweep.concurrent_trials}, expected all {sweep.trials} trials"
        )
