"""Noise levels of score queries under which a published method was seen to fail."""

from collections.abc import Iterator

from sgmd_core.objectives.tmd import TmdObjective
from sgmd_core.schedule import FlowMatchSchedule


def collapsing_levels(objective: object, schedule: FlowMatchSchedule) -> Iterator[str]:
    """Returns a sentence where the score levels are those of samples that collapsed.

    Args:
        objective: Section `objective`.
        schedule: Section `schedule`.
    """
    if not isinstance(objective, TmdObjective) or not objective.matches:
        return
    shift = schedule.shift if schedule.score_shift is None else schedule.score_shift
    if shift <= 1:
        yield (
            f"schedule.score_shift {shift:g} looks at all noise levels alike: in the paper of tmd "
            "samples then collapse to one composition, which its quality score does not show; the "
            "paper has 5. Watch diversity_ratio"
        )
