"""Losses of the fake score as numbers, checked before anybody learns from them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sgmd_core.errors import non_finite_remedy
from sgmd_core.types import Loss, NoisedBatch
from workers.finite import FiniteChecks

VELOCITY_FAKE, VELOCITY_TEACHER = "the fake score's velocity", "the teacher's velocity"


def checked_losses(
    checks: FiniteChecks,
    value: Tensor,
    loss: Loss,
    gradients: Sequence[Tensor],
    query: NoisedBatch,
    predictions: Mapping[str, Tensor],
) -> tuple[Tensor, dict[str, float]]:
    """The value that others learn from, checked, and the loss terms as numbers.

    Args:
        checks: Of the role.
        value: Value to check, as in `FiniteChecks.checked`.
        loss: Result of the objective.
        gradients: That at the samples, and that at the teacher's velocity, where they exist.
        query: Query that the predictions are of.
        predictions: Velocities that the loss was computed from, by name.

    Raises:
        NonFiniteError: Something is not finite, and this role raises.
    """
    figures = dict(loss.terms)
    names = ("grad_x0_norm", "teacher_cotangent_norm")
    for name, gradient in zip(names, gradients, strict=False):
        figures[name] = torch.linalg.vector_norm(gradient)
    # One transfer from the device for all of them.
    values = torch.stack([figure.double() for figure in figures.values()]).tolist()
    numbers = dict(zip(figures, values, strict=True))
    remedy = "the learning rates or the objective's weights"
    checked = checks.checked(
        value,
        query.key,
        "computing losses on the fake score",
        {**query.numbers, **predictions},
        non_finite_remedy(query.generator_version, remedy),
        numbers,
        stages_before=2,
    )
    return checked, {name: numbers[name] for name in loss.terms}
