"""Score queries of an objective beside the one at the generator's samples: their losses."""

from collections.abc import Callable
from dataclasses import replace

import torch

from sgmd_core.objectives import LookingObjective, Objective
from sgmd_core.types import GuideAnswer, Latents, Loss, NoisedBatch, TeacherPrediction


def with_looks(
    objective: Objective,
    predict: Callable[[NoisedBatch], Latents],
    loss: Loss,
    leaf: NoisedBatch,
    query: NoisedBatch,
    teacher: TeacherPrediction,
) -> tuple[Loss, Latents | None]:
    """Adds the terms of an objective's other looks.

    Args:
        objective: Whose looks they are.
        predict: The fake score's velocity at a query whose `x0` is a leaf.
        loss: That of the query itself.
        leaf: The query, its samples a leaf.
        query: The query with its looks.
        teacher: The teacher's answer to all of them.

    Returns:
        The whole loss, and the leaf of the samples off the trajectory where there are any.
    """
    device, found, off = leaf.x0.device, [loss], None
    if not isinstance(objective, LookingObjective):
        return loss, None
    if query.guide is not None and teacher.guide is not None:
        answer = GuideAnswer(teacher.guide.conditional.to(device), teacher.guide.guided.to(device))
        found.append(objective.guide_loss(leaf.at(query.guide), answer))
    if query.off is not None and query.off.x0 is not None and teacher.off is not None:
        off = query.off.x0.detach().requires_grad_()
        beside = leaf.at(replace(query.off, x0=off))
        velocities = predict(beside), teacher.off.to(device)
        found.append(objective.off_trajectory_loss(beside, *velocities))
    value = torch.stack([each.value for each in found]).sum()
    terms = {name: term for each in found for name, term in each.terms.items()}
    return Loss(value, {**terms, "generator": value.detach()}), off
