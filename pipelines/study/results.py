"""Results of a study: points of runs, their means and spreads over seeds.

    runs of a variant  ->  the same figure of each  ->  mean, standard deviation, number

A run that failed keeps what was measured before, and counts in no mean.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from pipelines.run.ranking import Contender, not_told_apart
from pipelines.study.hypotheses import Verdict
from pipelines.study.judging import Figures
from pipelines.study.measured_runs import Point, RunResult
from workers.samplings import REFERENCE

SCORE = "frechet"
"""Figure that variants are compared by."""


@dataclass(frozen=True, slots=True)
class SeedSpread:
    """A figure over seeds.

    Attributes:
        mean: Mean.
        deviation: Standard deviation over seeds, with n - 1; None of a single one.
        count: Seeds that have the figure.
    """

    mean: float
    deviation: float | None
    count: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the mean by Student's t; None of a single seed."""
        if self.deviation is None:
            return None
        reach = _student_t(self.count - 1) * self.deviation / math.sqrt(self.count)
        return self.mean - reach, self.mean + reach


@dataclass(frozen=True, slots=True)
class StudyResult:
    """A whole study.

    Attributes:
        name: Of the recipe.
        budget: Unit and amount.
        seeds: Seeds of the runs.
        num_captions: Clips behind every figure.
        teacher: Figures of the teacher's sets by name; see `pipelines.study.judging`.
        variants: Names of the variants, in the recipe's order.
        units_per_iteration: By variant and role, in the mean.
        runs: Every run, also those that failed.
        facts: Machine, versions, revision.
        verdicts: What the seeds say of the study's hypotheses.
        record: Versions of the hypotheses, as `hypotheses.write_down` keeps them.
    """

    name: str
    budget: tuple[str, float]
    seeds: tuple[int, ...]
    num_captions: int
    teacher: Mapping[str, Figures]
    variants: tuple[str, ...]
    units_per_iteration: Mapping[str, Mapping[str, float]]
    runs: tuple[RunResult, ...]
    facts: Mapping[str, Any]
    verdicts: tuple[Verdict, ...] = ()
    record: tuple[Mapping[str, Any], ...] = ()

    def of(self, variant: str) -> list[RunResult]:
        """Runs of a variant, by seed."""
        return [run for run in self.runs if run.variant == variant]

    def ends(self, variant: str) -> list[Point]:
        """Last points of a variant's runs that came to their end."""
        return [run.end for run in self.of(variant) if run.end is not None]

    def at_end(self, variant: str, figure: str, *, over_teacher: bool = False) -> SeedSpread | None:
        """A figure at the end of a variant's runs, over seeds.

        Args:
            variant: Its name.
            figure: Name of the figure.
            over_teacher: Take its ratio to the reference's.

        Returns:
            None where no run of the variant has it.
        """
        values = [point.figures[figure] for point in self.ends(variant) if figure in point.figures]
        below = self.teacher[REFERENCE].get(figure) if over_teacher else 1.0
        return spread([value / below for value in values]) if below else None

    @property
    def note(self) -> str:
        """Names the variants that may be as close to the teacher as the closest one.

        Intervals are those of means over seeds; a variant with a single seed has none.
        """
        found = {variant: self.at_end(variant, SCORE) for variant in self.variants}
        contenders = [
            Contender(variant, spread.mean, spread.interval)
            for variant, spread in found.items()
            if spread is not None
        ]
        contenders.sort(key=lambda contender: contender.value)
        single = [contender.name for contender in contenders if contender.interval is None]
        if single and len(contenders) > 1:
            return (
                f"{SCORE} is known from one seed for {', '.join(single)}, and two runs of a "
                "variant differ: take more seeds: study.seeds"
            )
        return not_told_apart(contenders, "variants", SCORE, "study.seeds", "seeds")

    def to_json(self) -> dict[str, Any]:
        """As results.json holds it, with the spreads that the tables show."""
        figures = sorted({name for run in self.runs for p in run.points for name in p.figures})
        ends = {
            variant: {
                name: asdict(found)
                for name in figures
                if (found := self.at_end(variant, name)) is not None
            }
            for variant in self.variants
        }
        verdicts = [verdict.to_json() for verdict in self.verdicts]
        return {**asdict(self), "verdicts": verdicts, "at_end": ends, "note": self.note}


def _student_t(freedom: int) -> float:
    """97.5 % quantile of Student's t."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    # Beyond the table, its expansion at the normal quantile; off by less than 0.003.
    if freedom <= len(table):
        return table[freedom - 1]
    return 1.96 + 2.37 / freedom + 2.82 / freedom**2


def spread(values: Sequence[float]) -> SeedSpread | None:
    """Mean and standard deviation of the finite values; None where there are none."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    return SeedSpread(fmean(finite), stdev(finite) if len(finite) > 1 else None, len(finite))


def mean_curve(runs: Sequence[RunResult], figure: str) -> list[tuple[Point, float]]:
    """A figure along the runs of a variant: means over those that have got so far.

    Returns:
        (mean place, mean value) by iteration; a place has no figures.
    """
    by_iteration: dict[int, list[Point]] = {}
    for run in runs:
        for point in run.points:
            if figure in point.figures:
                by_iteration.setdefault(point.iteration, []).append(point)
    return [
        (
            Point(
                iteration,
                fmean(point.units for point in points),
                fmean(point.seconds for point in points),
                {},
            ),
            fmean(point.figures[figure] for point in points),
        )
        for iteration, points in sorted(by_iteration.items())
    ]
