"""Ranks the checkpoints of a run by a figure of its validations.

    validation.jsonl -> scores by iteration -> best first -> ranking.json, and what is not deleted

A validation looks at the generator as a checkpoint of the same iteration holds it. The ranking is
made from what the run has written down and from nothing else, so a resumed run has the same one.

The best one of a ranking may be the best by chance. `not_told_apart` names those whose figures do
not separate from its own, for checkpoints, trials, variants and runs alike.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.config.figures import Mode
from sgmd_core.metrics.jackknife import NORMAL_95, standard_error

_MAX_NAMED = 4


@dataclass(frozen=True, slots=True)
class Ranked:
    """One validated state of a run.

    Attributes:
        iteration: Updates of the generator.
        score: The figure that ranks it.
    """

    iteration: int
    score: float


def scores_of(validations: Iterable[Mapping[str, Any]], score: str) -> dict[int, float]:
    """The score of each validated iteration, from lines of validation.jsonl.

    A ratio may be missing from a line, where what it divides by was 0; that state is not ranked.
    """
    return {
        line["iteration"]: line["figures"][score]
        for line in validations
        if score in line["figures"]
    }


def ranked(
    scores: Mapping[int, float], mode: Mode, among: Collection[int] | None = None
) -> list[Ranked]:
    """States, the best first; of equal ones the earlier first, and those without a number last.

    Args:
        scores: By iteration.
        mode: Whether a small or a large score is good.
        among: Iterations to rank; None ranks all.
    """
    sign = 1 if mode == "min" else -1
    entries = [
        Ranked(iteration, score)
        for iteration, score in scores.items()
        if among is None or iteration in among
    ]
    return sorted(
        entries,
        key=lambda entry: (math.isnan(entry.score), sign * entry.score, entry.iteration),
    )


@dataclass(frozen=True, slots=True)
class Contender:
    """One entry of a ranking with what is known of its error.

    Attributes:
        name: Name for a reader.
        value: The figure that ranks it.
        interval: Its 95 % interval; None where it has none.
        influence: Influence of each clip on the figure (`sgmd_core.metrics.jackknife`); empty
            where unknown. Those of two contenders belong to the same captions and noise.
    """

    name: str
    value: float
    interval: tuple[float, float] | None = None
    influence: tuple[float, ...] = ()

    @classmethod
    def of_validation(cls, name: str, line: Mapping[str, Any], score: str) -> "Contender":
        """From a line of validation.jsonl that has the score."""
        ends = line.get("intervals", {}).get(score)
        influence = line.get("influences", {}).get(score, ())
        return cls(name, line["figures"][score], tuple(ends) if ends else None, tuple(influence))

    def is_told_from(self, other: "Contender") -> bool:
        """Returns True if the difference of the two is more than chance, at 95 %.

        By the differences clip by clip where both were measured on the same clips; otherwise if
        the intervals do not overlap. Without intervals nothing is known against it: True.
        """
        if self.influence and len(self.influence) == len(other.influence):
            pairs = zip(self.influence, other.influence, strict=True)
            error = standard_error([own - its for own, its in pairs])
            return abs(self.value - other.value) > NORMAL_95 * error
        if self.interval is None or other.interval is None:
            return True
        return self.interval[1] < other.interval[0] or other.interval[1] < self.interval[0]

    def in_words(self) -> str:
        """The figure with its interval."""
        if self.interval is None:
            return f"{self.value:.3g}"
        return f"{self.value:.3g} [{self.interval[0]:.3g}, {self.interval[1]:.3g}]"


def not_told_apart(
    contenders: Sequence[Contender],
    kind: str,
    figure: str,
    setting: str = "validation.num_captions",
    by: str = "clips",
) -> str:
    """Names those that may be as good as the best one.

    Args:
        contenders: The best first.
        kind: Their plural, such as `checkpoints`.
        figure: Name of the figure that ranks them.
        setting: Setting that decides how many were measured.
        by: What more of would separate them: clips or seeds.

    Returns:
        One sentence, or nothing where the best one differs from all others.
    """
    finite = [contender for contender in contenders if math.isfinite(contender.value)]
    alike = [other for other in finite[1:] if not finite[0].is_told_from(other)]
    if not alike:
        return ""
    named = [finite[0], *alike]
    shown = named[:_MAX_NAMED]
    more = len(named) - len(shown)
    names, values = (
        _listed(words, more)
        for words in ([each.name for each in shown], [each.in_words() for each in shown])
    )
    return (
        f"{kind} {names} are not told apart by these {by}: {figure} {values}, 95 %; "
        f"take more {by}: {setting}"
    )


def _listed(words: Sequence[str], more: int) -> str:
    if more:
        return f"{', '.join(words)} and {more} more"
    return f"{', '.join(words[:-1])} and {words[-1]}"
