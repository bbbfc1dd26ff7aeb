"""Runs of a study: where they were measured, what that took, and what went wrong."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from pipelines.planning.passes import pass_costs, run_passes, total_units
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.study.judging import Figures
from pipelines.study.plan import PlannedRun

_TOTAL = "total"


@dataclass(frozen=True, slots=True)
class Point:
    """A run, measured on its way.

    Attributes:
        iteration: Updates of the generator.
        units: Forward passes over a batch that they took, backward passes counted by their cost.
        seconds: Training time that they took.
        figures: Measured on the generator's clips.
    """

    iteration: int
    units: float
    seconds: float
    figures: Figures


@dataclass(frozen=True, slots=True)
class RunResult:
    """One variant with one seed.

    Attributes:
        variant: Its name.
        seed: Its seed.
        run_folder: Where it was written down.
        points: Measured points, the end last.
        stage_seconds: Busy seconds of an iteration by `role.stage`, medians.
        iteration_s: Wall-clock seconds of an iteration, median; None before the first one.
        error: Why it failed, or an empty string.
    """

    variant: str
    seed: int
    run_folder: str
    points: tuple[Point, ...] = ()
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    iteration_s: float | None = None
    error: str = ""

    @property
    def end(self) -> Point | None:
        """The last point of a run that came to its end."""
        return None if self.error or not self.points else self.points[-1]


def units_of(run: PlannedRun, iteration: int) -> float:
    """Units that a run took for its first iterations, counted from its settings."""
    return total_units(run_passes(run.config, iteration), pass_costs(run.config))


def place_of(run: PlannedRun, iteration: int) -> tuple[float, float]:
    """Units and seconds that a run took for its first iterations."""
    seconds = [
        line["seconds"][_TOTAL]
        for line in read_jsonl(RunFolder(run.folder).metrics)
        if line["iteration"] < iteration
    ]
    return units_of(run, iteration), sum(seconds)


def times_of(run: PlannedRun) -> tuple[dict[str, float], float | None]:
    """Median busy seconds of an iteration by stage, and of the whole of it."""
    found: dict[str, list[float]] = {}
    lines = read_jsonl(RunFolder(run.folder).metrics)
    for line in lines:
        for stage, seconds in line["seconds"].items():
            found.setdefault(stage, []).append(seconds)
    # A stage that most iterations do not have, such as a first encoding, is not a cost of each.
    usual = {name: median(s) for name, s in found.items() if 2 * len(s) > len(lines)}
    total = usual.pop(_TOTAL, None)
    return usual, total
