"""A method with a discriminator in a recipe: what does not go with what it compares."""

import torch

from sgmd_core.objectives import Objective, SteppingObjective
from sgmd_core.schedule import FlowMatchSchedule


def adversary_contradictions(objective: Objective, schedule: FlowMatchSchedule) -> list[str]:
    """Returns what does not go with the states that a discriminator compares, as sentences.

    Args:
        objective: The method.
        schedule: Noise levels at which samples are looked at.
    """
    if not isinstance(objective, SteppingObjective):
        return []
    first, past = schedule.score_levels(None, 0)
    least = schedule.score_sigma(torch.tensor([first, past - 1])).min().item()
    if objective.delta < least:
        return []
    return [
        f"objective.delta {objective.delta:g} leads from the least noise level at which samples "
        f"are looked at, {least:g}, past the data; lower it, or raise schedule.score_sigma_min"
    ]
