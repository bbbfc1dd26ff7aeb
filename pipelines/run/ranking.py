"""Ranks the checkpoints of a run by a figure of its validations.

    validation.jsonl -> scores by iteration -> best first -> ranking.json, and what is not deleted

A validation looks at the generator as a checkpoint of the same iteration holds it. The ranking is
made from what the run has written down and from nothing else, so a resumed run has the same one.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Mode = Literal["min", "max"]


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
