"""Result of a sweep: points ranked, their mean over seeds, the Pareto front, the best recipe.

trials -> points (the same settings, several seeds) -> best first -> sweep.csv, best.yaml
"""

import csv
import io
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cluster.storage import write_text
from pipelines.config.captions_of_jobs import kept_captions
from pipelines.config.figures import Mode
from pipelines.config.recipe import DistillConfig
from pipelines.config.sweep import SweepSettings
from pipelines.run.places import shared_place
from pipelines.run.ranking import Contender, not_told_apart
from pipelines.study.results import SeedSpread
from pipelines.sweeping.trials import Trial, settings_in_words
from sgmd_core.metrics.jackknife import NORMAL_95

BEST_FILE, TABLE_FILE = "best.yaml", "sweep.csv"
_ORDER = {"done": 0, "stopped": 1, "running": 2, "failed": 3}


@dataclass(frozen=True, slots=True)
class TriedPoint:
    """One point of the space and its trials.

    Attributes:
        settings: Values by dotted key.
        trials: One a seed, the one that got furthest.
    """

    settings: Mapping[str, Any]
    trials: tuple[Trial, ...]

    @property
    def is_done(self) -> bool:
        """True if a trial of every seed came to its end."""
        return all(trial.state == "done" for trial in self.trials)

    def spread(self, figure: str) -> SeedSpread | None:
        """A figure over the seeds that came to their end; None where none has it."""
        values = [
            trial.figures[figure]
            for trial in self.trials
            if trial.state == "done" and math.isfinite(trial.figures.get(figure, math.nan))
        ]
        if not values:
            return None
        return SeedSpread(mean(values), stdev(values) if len(values) > 1 else None, len(values))

    def value(self, figure: str) -> float:
        """Mean over seeds; NaN where it is not known, or a seed that came to its end has none."""
        found = self.spread(figure)
        num_done = sum(trial.state == "done" for trial in self.trials)
        return math.nan if found is None or found.count < num_done else found.mean

    def contender(self, score: str) -> Contender:
        """Entry of the ranking: over seeds, or of a single one over its clips.

        Points of the same seeds are compared seed by seed, by Student's t: what a seed does to all
        of them, mostly by its captions and noise, is not a difference between them.
        """
        if len(self.trials) == 1:
            return self.trials[0].contender(score)
        found = self.spread(score)
        name = f"({settings_in_words(self.settings)})"
        if found is None or found.interval is None or found.count < len(self.trials):
            return Contender(name, self.value(score), None if found is None else found.interval)
        # `Contender` takes the quantile of the normal distribution.
        error = (found.deviation or 0.0) / math.sqrt(found.count)
        wider = (found.interval[1] - found.mean) / (NORMAL_95 * error) if error else 1.0
        by_seed = sorted((trial.seed, trial.figures[score]) for trial in self.trials)
        influence = tuple(wider * (value - found.mean) for _, value in by_seed)
        return Contender(name, found.mean, found.interval, influence)


def points_of(trials: Sequence[Trial]) -> list[TriedPoint]:
    """Groups trials of the same settings, in their order.

    A search may propose a point again. The same seed would give the same numbers, so a repetition
    says nothing about how far seeds lie apart.
    """
    groups: dict[str, dict[int, Trial]] = {}
    for trial in trials:
        group = groups.setdefault(json.dumps(trial.settings, sort_keys=True), {})
        known = group.setdefault(trial.seed, trial)
        group[trial.seed] = min(known, trial, key=_how_far)
    return [
        TriedPoint(next(iter(each.values())).settings, tuple(each.values()))
        for each in groups.values()
    ]


def _how_far(trial: Trial) -> tuple[int, int]:
    return (_ORDER[trial.state], -trial.iteration)


def pareto_front(points: Sequence[TriedPoint], objectives: Mapping[str, Mode]) -> list[TriedPoint]:
    """The points that no other one beats in every figure; of a single figure, the best."""
    valued = {
        index: [
            (1 if mode == "min" else -1) * point.value(figure)
            for figure, mode in objectives.items()
        ]
        for index, point in enumerate(points)
        if point.is_done
    }
    valued = {index: own for index, own in valued.items() if all(map(math.isfinite, own))}

    def is_beaten(own: Sequence[float]) -> bool:
        return any(
            other != own and all(its <= mine for its, mine in zip(other, own, strict=True))
            for other in valued.values()
        )

    return [points[index] for index, own in valued.items() if not is_beaten(own)]


@dataclass(frozen=True, slots=True)
class SweepResult:
    """All trials, those of the best point first.

    Attributes:
        score: The figure that ranks them.
        trials: Failed ones last.
        folder: Where table and best recipe are; `places.shared_place` names an address.
        best_recipe: A recipe with the best settings and the full number of iterations.
        objectives: Every figure that was searched, with what is good.
    """

    score: str
    trials: tuple[Trial, ...]
    folder: Path
    best_recipe: Path
    objectives: Mapping[str, Mode]

    @property
    def points(self) -> list[TriedPoint]:
        """Trials by their settings, the best first."""
        return points_of(self.trials)

    @property
    def front(self) -> list[TriedPoint]:
        """Points that no other one beats in every figure."""
        return pareto_front(self.points, self.objectives)

    @property
    def note(self) -> str:
        """Names the points that may be as good as the best one; empty where it is the best."""
        done = [
            point
            for point in self.points
            if point.is_done and math.isfinite(point.value(self.score))
        ]
        over_seeds = any(len(point.trials) > 1 for point in done)
        return not_told_apart(
            [point.contender(self.score) for point in done],
            "points" if over_seeds else "trials",
            self.score,
            *(("sweep.seeds", "seeds") if over_seeds else ()),
        )

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "score": self.score,
            "folder": shared_place(self.folder),
            "best_recipe": shared_place(self.best_recipe),
            "note": self.note,
            "front": [dict(point.settings) for point in self.front],
            "trials": [
                {name: value for name, value in trial.to_json().items() if name != "influences"}
                for trial in self.trials
            ],
        }


def ranked_trials(settings: SweepSettings, trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Trials, those of the best point first; then those ended early, then failed ones.

    A point with a score that is not finite stands among those that failed. Repetitions of a point
    with the same seed come last.
    """
    sign = 1 if settings.mode == "min" else -1

    def place(point: TriedPoint) -> tuple[float, ...]:
        state = max(_ORDER[trial.state] for trial in point.trials)
        value = point.value(settings.score)
        if math.isnan(value):
            value = mean(trial.figures.get(settings.score, math.nan) for trial in point.trials)
        is_broken = any(
            not math.isfinite(trial.figures.get(settings.score, 0.0)) for trial in point.trials
        )
        reached = -min(trial.iteration for trial in point.trials)
        return (
            _ORDER["failed"] if is_broken else state,
            reached if state else 0,
            sign * value if math.isfinite(value) else math.inf,
        )

    points = sorted(points_of(trials), key=place)
    order = [trial for point in points for trial in point.trials]
    kept = {id(trial) for trial in order}
    return (*order, *sorted((each for each in trials if id(each) not in kept), key=_how_far))


def write_table(config: DistillConfig, folder: Path, trials: Sequence[Trial]) -> SweepResult:
    """Writes sweep.csv, also of a sweep of which no trial came to its end.

    Args:
        config: The recipe.
        folder: The sweep's.
        trials: In any order.
    """
    order = ranked_trials(config.sweep, trials)
    objectives, place = config.sweep.objectives, Path(shared_place(folder))
    result = SweepResult(config.sweep.score, order, place, place / BEST_FILE, objectives)
    write_text(str(folder / TABLE_FILE), _csv(config.sweep, result))
    return result


def write_results(config: DistillConfig, folder: Path, trials: Sequence[Trial]) -> SweepResult:
    """Writes sweep.csv and best.yaml.

    Args:
        config: The recipe.
        folder: The sweep's.
        trials: In any order; at least one came to its end.
    """
    result = write_table(config, folder, trials)
    # Files of captions of a job are gone with it, except for the sweep's copies.
    kept = kept_captions(config.data, folder, shared_place(folder))
    best = config.with_settings(kept | dict(result.trials[0].settings))
    note = "".join(f"# {line}\n" for line in textwrap.wrap(result.note, 97))
    write_text(str(folder / BEST_FILE), note + best.to_yaml())
    return result


def _csv(settings: SweepSettings, result: SweepResult) -> str:
    keys = list(settings.dimensions)
    names = [each for trial in result.trials for each in trial.figures]
    figures = list(dict.fromkeys([*settings.objectives, *names]))
    on_front = [dict(point.settings) for point in result.front]
    before, after = ["seed", "state", "iteration"], ["seconds", "name", "run_folder", "error"]
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow([*keys, *before, *figures, "front", *after])
    for trial in result.trials:
        values = [trial.settings.get(key, "") for key in keys]
        values += [getattr(trial, name) for name in before]
        values += [trial.figures.get(name, "") for name in figures]
        ends = [getattr(trial, name) for name in after]
        writer.writerow([*values, dict(trial.settings) in on_front, *ends])
    return table.getvalue()
