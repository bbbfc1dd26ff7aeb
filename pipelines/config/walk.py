"""One backward pass for both gradients of the fake score: methods and settings that allow it."""

from pipelines.config.methods import ObjectiveSettings
from sgmd_core.objectives import ComparedStates, GradientPath, compared_by, looks_of
from sgmd_core.types import Looks
from workers.settings import FakeScoreSettings

_GUIDED = 2.0


def walk_contradictions(objective: ObjectiveSettings, fake_score: FakeScoreSettings) -> list[str]:
    """Returns what does not go with one backward pass for signal and tracking, as sentences."""
    if fake_score.walk == "apart":
        return []
    return [
        f"fake_score.walk joint makes signal and tracking by one backward pass, and {what}; set "
        "fake_score.walk=apart"
        for what in _hindrances(objective)
    ]


def may_walk_once(objective: ObjectiveSettings, fake_score: FakeScoreSettings) -> bool:
    """Returns True where one backward pass lacks at most `compute.checkpointing`."""
    shared = fake_score.tracking == "shared"
    return shared and not fake_score.compute.compile and not _hindrances(objective)


def _hindrances(objective: ObjectiveSettings) -> list[str]:
    path, method = objective.path, objective.method
    found = {
        f"{method} sends no gradient through the fake score": path is GradientPath.SAMPLE,
        f"{method} sends one through the teacher, too": path is GradientPath.BOTH_SCORES,
        f"{method} has its loss computed by a discriminator": compared_by(objective)
        is ComparedStates.STEPS,
        f"{method} has score queries beside those at the samples": looks_of(objective, _GUIDED)
        != Looks(),
    }
    return [what for what, is_there in found.items() if is_there]
