"""The shuffled teacher in a recipe: what it does not go with.

Besides the gap something else teaches the generator, or a part of a batch leaves a sample without a
neighbour.
"""

from pipelines.config.methods import ObjectiveSettings
from sgmd_core.objectives import GradientPath, adversary_of, looks_of
from sgmd_core.objectives.consistency import consistency_of
from sgmd_core.objectives.meanflow import flow_of
from sgmd_core.types import Looks
from workers.settings import DiversitySettings, FakeScoreSettings

_GUIDED = 2.0


def shuffling_contradictions(
    objective: ObjectiveSettings, fake_score: FakeScoreSettings, diversity: DiversitySettings
) -> list[str]:
    """Returns what a shuffled gap would leave as it is, as sentences.

    The control is about the gap at the generator's samples. A method that is also taught by
    something else would be half shuffled, and its figures would say nothing.
    """
    if fake_score.gap == "own":
        return []
    others = {
        "a gradient through the teacher": objective.path is GradientPath.BOTH_SCORES,
        "a discriminator": adversary_of(objective) is not None,
        "score queries beside those at the samples": looks_of(objective, _GUIDED) != Looks(),
        "data": consistency_of(objective) is not None or flow_of(objective) is not None,
        "generator.diversity": diversity.enabled,
    }
    return [
        f"fake_score.gap shuffled shuffles the gap at the generator's samples, and {other} would "
        f"teach it besides ({objective.method}); leave that out, or set fake_score.gap=own"
        for other, is_there in others.items()
        if is_there
    ]


def part_contradictions(
    fake_score: FakeScoreSettings, batch_size: int, micro_batches: int, rank_groups: int
) -> list[str]:
    """Returns a sentence where a sample would be without a neighbour.

    Args:
        fake_score: Its section.
        batch_size: Samples of one update.
        micro_batches: Parts of it.
        rank_groups: Groups of the fake score's ranks with samples of their own.
    """
    parts = 2 * micro_batches * rank_groups
    if fake_score.gap == "own" or batch_size % parts == 0:
        return []
    return [
        "fake_score.gap shuffled has every rank of the fake score keep pairs of samples; set "
        f"batch.size {batch_size} to a multiple of {parts} (2 x batch.micro_batches "
        f"{micro_batches} x ranks {rank_groups}), or fake_score.gap=own"
    ]
