"""Hypotheses of a study: written down before its runs, tested over its seeds afterwards.

    gain_i = how much better the variant's figure is than the baseline's, with seed i
    claim    mean gain > by      p by sign flips of gain_i - by, corrected by Holm's method

The record in the study's folder keeps every version of the hypotheses with the number of runs that
were finished when it was written, so that nobody need believe that an expectation came first.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from cluster.storage import read_json, write_json
from pipelines.config.study import Hypothesis
from pipelines.study.judging import Figures
from pipelines.study.measured_runs import Point, RunResult
from sgmd_core.metrics.bootstrap import Interval
from sgmd_core.metrics.paired import holm, mean_difference, sign_flip_p

RECORD_FILE = "hypotheses.json"
LEVEL = 0.05
"""Chance that any claim of a study is taken to hold though none does."""

# Points are whole iterations, so the share of a budget is met up to one of them.
_SLACK = 1.02

Outcome = Literal["holds", "undecided", "fails"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A hypothesis and what the seeds say of it.

    Attributes:
        name: Its name.
        expected: What was expected.
        seeds: Seeds of which both runs have the figure.
        gain: How much better the variant is, with its 95 % bootstrap interval; None of fewer than
            two seeds.
        p: By sign flips, one-sided; 1 without seeds.
        corrected_p: By Holm's method over all hypotheses of the study.
    """

    name: str
    expected: Hypothesis
    seeds: tuple[int, ...]
    gain: Interval | None
    p: float
    corrected_p: float

    @property
    def outcome(self) -> Outcome:
        """`fails` where the whole interval lies below what was expected."""
        if self.gain is None:
            return "undecided"
        if self.corrected_p < LEVEL:
            return "holds"
        return "fails" if self.gain.high < self.expected.by else "undecided"

    def to_json(self) -> dict[str, Any]:
        """As results.json holds it."""
        return {
            "name": self.name,
            **self.expected.model_dump(),
            "seeds": list(self.seeds),
            "gain": self.gain and asdict(self.gain),
            "p": self.p,
            "corrected_p": self.corrected_p,
            "outcome": self.outcome,
        }


def judge_hypotheses(
    hypotheses: Mapping[str, Hypothesis], runs: Sequence[RunResult], reference: Figures
) -> tuple[Verdict, ...]:
    """Tests hypotheses on the runs of a study that have come to their end.

    Args:
        hypotheses: By name.
        runs: Of all variants and seeds.
        reference: Figures of the teacher's clips that all are compared with.
    """
    found = {name: _gains(expected, runs, reference) for name, expected in hypotheses.items()}
    chances = [
        sign_flip_p([gain - hypotheses[name].by for gain in gains.values()]) if gains else 1.0
        for name, gains in found.items()
    ]
    return tuple(
        Verdict(
            name, hypotheses[name], tuple(gains), mean_difference([*gains.values()]), p, corrected
        )
        for (name, gains), p, corrected in zip(found.items(), chances, holm(chances), strict=True)
    )


def write_down(
    folder: Path, hypotheses: Mapping[str, Hypothesis], finished_runs: int
) -> tuple[dict[str, Any], ...]:
    """Adds the hypotheses to the record of a study, unless they stand there already.

    Args:
        folder: Of the study.
        hypotheses: By name.
        finished_runs: Runs of the study that have come to their end.

    Returns:
        Every version: `date`, `finished_runs` and `hypotheses`, the newest last.

    Raises:
        StorageError: The record cannot be read or written.
    """
    path = folder / RECORD_FILE
    versions: list[dict[str, Any]] = read_json(str(path))["versions"] if path.exists() else []
    now = {name: each.model_dump() for name, each in hypotheses.items()}
    if now != (versions[-1]["hypotheses"] if versions else {}):
        date = datetime.now(UTC).isoformat(timespec="seconds")
        versions.append({"date": date, "finished_runs": finished_runs, "hypotheses": now})
        write_json(str(path), {"versions": versions})
    return tuple(versions)


def verdict_rows(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """Headings, then a row for each hypothesis."""
    rows = [["hypothesis", "outcome", "gain (95 %)", "p", "corrected p", "seeds", "expected"]]
    for verdict in verdicts:
        gain = verdict.gain
        rows.append(
            [
                verdict.name,
                verdict.outcome,
                f"{gain.value:+.4g} ({gain.low:+.4g}, {gain.high:+.4g})" if gain else "",
                f"{verdict.p:.3g}",
                f"{verdict.corrected_p:.3g}",
                str(len(verdict.seeds)),
                expectation_words(verdict.expected),
            ]
        )
    return rows


def expectation_words(expected: Hypothesis) -> str:
    """A hypothesis in a sentence."""
    then = "" if expected.of_budget == 1 else f" after {expected.of_budget:g} of the budget"
    side = "nearer to the teacher's" if expected.better == "nearer" else expected.better
    by = f" by more than {expected.by:g}" if expected.by > 0 else ""
    if expected.by < 0:
        by = f", or worse by less than {-expected.by:g}"
    return f"{expected.figure} of {expected.variant}{then} {side} than of {expected.baseline}{by}"


def record_words(versions: Sequence[Mapping[str, Any]]) -> str:
    """Says on which date hypotheses were written down, and by which test they are judged.

    Args:
        versions: Of `write_down`, at least one.
    """
    first, *later = versions
    said = f"Written down on {first['date']}, {_when(first['finished_runs'])}"
    for version in later:
        said += f"; changed on {version['date']}, {_when(version['finished_runs'])}"
    return (
        f"{said}. A gain is positive where the variant is better; p by sign flips over the seeds, "
        f"corrected by Holm's method; a claim holds below {LEVEL:g}, and fails where the whole "
        "interval lies below what was expected."
    )


def _when(finished_runs: int) -> str:
    if not finished_runs:
        return "before any run had come to its end"
    runs = "a run" if finished_runs == 1 else f"{finished_runs} runs"
    return f"after {runs} had come to the end"


def _gains(expected: Hypothesis, runs: Sequence[RunResult], reference: Figures) -> dict[int, float]:
    """By how much the variant is better, by seed; seeds without both figures are left out."""

    def losses(variant: str, share: float) -> dict[int, float]:
        ended = [run for run in runs if run.variant == variant and run.end is not None]
        return {run.seed: _loss(expected, _point_at(run, share), reference) for run in ended}

    own = losses(expected.variant, expected.of_budget)
    others = losses(expected.baseline, 1.0)
    gains = {seed: others[seed] - own[seed] for seed in own if seed in others}
    return {seed: gain for seed, gain in sorted(gains.items()) if math.isfinite(gain)}


def _point_at(run: RunResult, share: float) -> Point:
    """The last measured point within a share of what the run took."""
    limit = _SLACK * share * run.points[-1].units
    return max(
        (point for point in run.points if point.units <= limit),
        key=lambda point: point.units,
        default=run.points[0],
    )


def _loss(expected: Hypothesis, point: Point, reference: Figures) -> float:
    """A figure, turned so that lower is better; NaN where it was not measured."""
    value = point.figures.get(expected.figure, math.nan)
    match expected.better:
        case "lower":
            return value
        case "higher":
            return -value
        case "nearer":
            return abs(value - reference.get(expected.figure, math.nan))
