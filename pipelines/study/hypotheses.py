"""Hypotheses of a study: written down before its runs, tested over its seeds afterwards.

    gain_i   how much better the variant's figure is than the baseline's, with seed i
    claim    mean gain > by; two-sided p by sign flips of gain_i - by, corrected by Holm's method

A run that failed, or whose figure is not finite, counts as worse than any other: a method that
breaks with some seeds is no better for the seeds with which it does not. The record in the study's
folder keeps every version of the study's settings with the number of runs that had finished when it
was written. It reminds and tells readers; whoever can write to the folder can change it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from cluster.errors import StorageError
from cluster.storage import read_json, write_json
from pipelines.config.study import SHARE_SLACK, Hypothesis, StudySettings
from pipelines.study.judging import Figures
from pipelines.study.measured_runs import Point, RunResult
from sgmd_core.metrics.bootstrap import Interval
from sgmd_core.metrics.paired import bounded, holm, mean_difference, two_sided_p

RECORD_FILE = "hypotheses.json"
LEVEL = 0.05
"""Highest chance of any wrong outcome in a study in which every claim is just at its margin."""

_ROUNDING = 1e-9

Outcome = Literal["holds", "undecided", "fails"]
Version = Mapping[str, Any]
"""Of the record: `date`, `finished_runs` and `study`, the section of the recipe."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A hypothesis and what the seeds say of it.

    Attributes:
        name: Its name; of one that was changed or dropped after runs had finished, with its date.
        expected: What was expected.
        gains: By seed, how much better the variant is: infinite where the other run alone failed.
        measured_at: Share of the budget after which the variant was measured, a mean; None of no
            run.
        p: Two-sided, by sign flips; 1 without seeds.
        corrected_p: By Holm's method over all hypotheses of the record.
    """

    name: str
    expected: Hypothesis
    gains: Mapping[int, float]
    measured_at: float | None
    p: float
    corrected_p: float

    @property
    def num_failed(self) -> int:
        """Seeds with which one of the two runs failed."""
        return sum(math.isinf(gain) for gain in self.gains.values())

    @property
    def gain(self) -> Interval | None:
        """Mean with its 95 % bootstrap interval; None below two seeds, or where a run failed."""
        return None if self.num_failed else mean_difference([*self.gains.values()])

    @property
    def outcome(self) -> Outcome:
        """`holds` or `fails` where the seeds leave no doubt on which side of `by` the gain lies."""
        if self.corrected_p >= LEVEL:
            return "undecided"
        above = bounded([gain - self.expected.by for gain in self.gains.values()])
        return "holds" if sum(above) > 0 else "fails"

    def to_json(self) -> dict[str, Any]:
        """As results.json holds it; an infinite gain is null."""
        return {
            "name": self.name,
            **self.expected.model_dump(),
            "gains": {
                str(seed): gain if math.isfinite(gain) else None
                for seed, gain in self.gains.items()
            },
            "failed_seeds": self.num_failed,
            "gain": self.gain and asdict(self.gain),
            "measured_at": self.measured_at,
            "p": self.p,
            "corrected_p": self.corrected_p,
            "outcome": self.outcome,
        }


def judge_hypotheses(
    hypotheses: Mapping[str, Hypothesis], runs: Sequence[RunResult], reference: Figures
) -> tuple[Verdict, ...]:
    """Tests hypotheses on the runs of a study that have been made so far.

    Args:
        hypotheses: By name; all of them are corrected together.
        runs: Of all variants and seeds, also those that failed.
        reference: Figures of the teacher's clips that all are compared with.
    """
    gains = {name: _gains(expected, runs, reference) for name, expected in hypotheses.items()}
    chances = [
        two_sided_p([gain - hypotheses[name].by for gain in found.values()]) if found else 1.0
        for name, found in gains.items()
    ]
    return tuple(
        Verdict(name, hypotheses[name], found, _share(hypotheses[name], runs), p, corrected)
        for (name, found), p, corrected in zip(gains.items(), chances, holm(chances), strict=True)
    )


def write_down(folder: Path, study: StudySettings, finished_runs: int) -> tuple[Version, ...]:
    """Adds the settings of a study to its record, unless they stand there already.

    Args:
        folder: Of the study.
        study: The section of the recipe.
        finished_runs: Runs of the study that have finished.

    Returns:
        Every version, the newest last; none of a study that has never had a hypothesis.

    Raises:
        StorageError: The record cannot be read or written.
    """
    path = folder / RECORD_FILE
    versions = _read(path) if path.exists() else []
    now = study.model_dump(mode="json")
    if now != (versions[-1]["study"] if versions else None) and (versions or study.hypotheses):
        date = datetime.now(UTC).isoformat(timespec="seconds")
        versions.append({"date": date, "finished_runs": finished_runs, "study": now})
        write_json(str(path), {"versions": versions})
    return tuple(versions)


def all_hypotheses(versions: Sequence[Version]) -> dict[str, Hypothesis]:
    """Hypotheses of the newest version, and those changed or dropped after runs had finished.

    The latter are tested and corrected for, too: a claim is not freed by dropping its neighbours.

    Args:
        versions: Of `write_down`.
    """
    found: dict[str, Hypothesis] = {}
    newest = _hypotheses(versions[-1]) if versions else {}
    for version, following in zip(versions, [*versions[1:], None], strict=False):
        if following is None or not following["finished_runs"]:
            continue
        kept = _hypotheses(following)
        for name, expected in _hypotheses(version).items():
            known = [*newest.values(), *found.values()]
            if kept.get(name) != expected and expected not in known:
                found[f"{name} (until {following['date'][:19]})"] = expected
    return newest | found


def verdict_rows(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """Headings, then a row for each hypothesis."""
    rows = [["hypothesis", "outcome", "gain (95 %)", "p", "corrected p", "seeds", "expected"]]
    for verdict in verdicts:
        gain, failed = verdict.gain, verdict.num_failed
        seeds = str(len(verdict.gains))
        rows.append(
            [
                verdict.name,
                verdict.outcome,
                f"{gain.value:+.4g} ({gain.low:+.4g}, {gain.high:+.4g})" if gain else "",
                f"{verdict.p:.3g}",
                f"{verdict.corrected_p:.3g}",
                f"{seeds}, a run of {failed} failed" if failed else seeds,
                expectation_words(verdict.expected, verdict.measured_at),
            ]
        )
    return rows


def expectation_words(expected: Hypothesis, measured_at: float | None = None) -> str:
    """A hypothesis in a sentence.

    Args:
        expected: The hypothesis.
        measured_at: Share of the budget after which the variant was measured, where it is known.
    """
    then = ""
    if expected.of_budget < 1:
        share = expected.of_budget if measured_at is None else measured_at
        then = f" after {share:.2g} of the budget"
    better = {"nearer": "nearer to the teacher's than"}.get(
        expected.better, f"{expected.better} than"
    )
    if expected.by < 0:
        better = f"{better}, or at most {-expected.by:g} worse than,"
    by = f" by more than {expected.by:g}" if expected.by > 0 else ""
    return f"{expected.figure} of {expected.variant}{then}: {better} {expected.baseline}'s{by}"


def fewest_seeds(num_hypotheses: int) -> int:
    """Seeds with which the clearest of some hypotheses can have an outcome, if all seeds agree.

    p of n seeds that agree is 2^(1-n), and Holm's method multiplies the smallest by the number of
    hypotheses.

    Args:
        num_hypotheses: At least 1.
    """
    return math.floor(math.log2(num_hypotheses / LEVEL)) + 2


def power_words(num_hypotheses: int, num_seeds: int) -> str:
    """Says that so few seeds can decide nothing; empty where they can.

    Args:
        num_hypotheses: That are corrected together.
        num_seeds: With which every variant is trained.
    """
    if not num_hypotheses or num_seeds >= (needed := fewest_seeds(num_hypotheses)):
        return ""
    least = min(1.0, num_hypotheses * 2.0 ** (1 - num_seeds))
    hypotheses = "1 hypothesis" if num_hypotheses == 1 else f"{num_hypotheses} hypotheses"
    return (
        f"{num_seeds} seeds cannot decide {hypotheses}: even if all seeds agree, the corrected p "
        f"is {least:.2g}, and an outcome needs one below {LEVEL:g}. Take {needed} seeds or more, "
        "or fewer hypotheses."
    )


def record_words(versions: Sequence[Version]) -> str:
    """Says on which date hypotheses were written down, and by which test they are judged.

    Args:
        versions: Of `write_down`, at least one.
    """
    first, *later = versions
    said = f"Written down on {first['date']}, {_when(first['finished_runs'])}"
    for before, version in zip(versions, later, strict=False):
        changed = [
            key for key, value in version["study"].items() if before["study"].get(key) != value
        ]
        said += f"; {', '.join(changed)} changed on {version['date']}, "
        said += _when(version["finished_runs"])
    return (
        f"{said}. A gain is positive where the variant is better; p two-sided by sign flips over "
        f"the seeds, corrected by Holm's method; below {LEVEL:g} a claim holds or fails, by the "
        "side of its margin on which the gain lies. A run that failed is worse than any other."
        f"{_power_of(versions)}"
    )


def _power_of(versions: Sequence[Version]) -> str:
    """Words on what its seeds cannot decide, after a blank; empty where they can."""
    words = power_words(len(all_hypotheses(versions)), len(versions[-1]["study"]["seeds"]))
    return words and f" {words}"


def _when(finished_runs: int) -> str:
    if not finished_runs:
        return "before any run had finished"
    return f"after {finished_runs} {'run' if finished_runs == 1 else 'runs'} had finished"


def _read(path: Path) -> list[dict[str, Any]]:
    found = read_json(str(path))
    versions = found.get("versions") if isinstance(found, Mapping) else None
    fields = {"date": str, "finished_runs": int, "study": dict}
    if isinstance(versions, list) and all(
        isinstance(each, dict) and all(isinstance(each.get(k), t) for k, t in fields.items())
        for each in versions
    ):
        return versions
    raise StorageError(
        f"reading the hypotheses of the study in {path.parent}",
        f"another content of {path.name}",
        f"versions, each with {', '.join(fields)}",
        f"Restore {path.name}, or move it away: the study then writes a new one, which says how "
        "many runs had finished by then",
    )


def _hypotheses(version: Version) -> dict[str, Hypothesis]:
    stored = version["study"].get("hypotheses", {})
    return {name: Hypothesis.model_validate(each) for name, each in stored.items()}


def _gains(expected: Hypothesis, runs: Sequence[RunResult], reference: Figures) -> dict[int, float]:
    """Lead of the variant, by seed, for the seeds that both have been run with."""

    def losses(variant: str, share: float) -> dict[int, float]:
        found: dict[int, float] = {}
        for run in runs:
            point = _point_at(run, share)
            # Of a run that came to its end before it was first measured, nothing is known.
            if run.variant == variant and (point is not None or run.end is None):
                found[run.seed] = _loss(expected, point, reference)
        return found

    own = losses(expected.variant, expected.of_budget)
    others = losses(expected.baseline, 1.0)
    return {
        seed: others[seed] - own[seed] if own[seed] != others[seed] else 0.0
        for seed in sorted(own)
        if seed in others
    }


def _point_at(run: RunResult, share: float) -> Point | None:
    """The last measured point within a share of a run's iterations; None of one that failed."""
    if run.end is None:
        return None
    limit = share * run.end.iteration
    within = [point for point in run.points if point.iteration <= limit + _ROUNDING]
    # Points are whole iterations, so the first of them may lie an iteration beyond its share.
    if not within and run.points[0].iteration <= limit / SHARE_SLACK + 1:
        return run.points[0]
    return within[-1] if within else None


def _share(expected: Hypothesis, runs: Sequence[RunResult]) -> float | None:
    """Share of their forwards after which the variant's runs were measured, in the mean."""
    shares = [
        point.units / run.end.units
        for run in runs
        if run.variant == expected.variant
        and run.end is not None
        and (point := _point_at(run, expected.of_budget)) is not None
    ]
    return sum(shares) / len(shares) if shares else None


def _loss(expected: Hypothesis, point: Point | None, reference: Figures) -> float:
    """A figure, turned so that lower is better; infinite where there is none."""
    value = math.nan if point is None else point.figures.get(expected.figure, math.nan)
    match expected.better:
        case "lower":
            found = value
        case "higher":
            found = -value
        case "nearer":
            found = abs(value - reference.get(expected.figure, math.nan))
    return found if math.isfinite(found) else math.inf
