"""The two forms of the SGMD family, and the weights that each of them gives to its terms.

               Fisher, on gap^2 / 2          NR gradient, on residual   RC, on velocity error^2 / 2
    released   1 / (teacher residual + eps)  1 / sigma                  1
    paper      (1 - sigma)^2 / sigma^4       1                          sigma^2

SGMD, TSG-Fisher and TSG-SIM share these weights, so that a comparison between them compares what
they put in their losses and not how they weigh noise levels.
"""

from typing import Literal

import torch

from sgmd_core.objectives.fisher import (
    paper_fisher_weight,
    released_fisher_weight,
    teacher_residual,
)
from sgmd_core.objectives.potentials import released_residual_weight, residual_contraction_loss
from sgmd_core.types import (
    Latents,
    Loss,
    NoisedBatch,
    PerSample,
    Scalar,
    float32,
    per_sample,
    sample_mean,
)

Form = Literal["released", "paper"]

DEFAULT_LAMBDA_RC = {"released": 1.0, "paper": 0.1}
"""Weight of the residual contraction, by form."""


def gap_weight(
    form: Form, query: NoisedBatch, velocity_teacher: Latents, eps: float, sigma_floor: float
) -> PerSample:
    """Weight of what is built on the gap between the scores, a constant; see `fisher.py`.

    Args:
        form: Which form.
        query: Where both scores looked.
        velocity_teacher: Guided teacher's prediction.
        eps: Added to the teacher's residual (released), in latent units.
        sigma_floor: Lower limit of the noise level that is divided by (paper).
    """
    if form == "released":
        return released_fisher_weight(teacher_residual(query, velocity_teacher), eps)
    return paper_fisher_weight(query.sigma.detach(), sigma_floor)


def residual_weight(form: Form, sigma: PerSample, sigma_floor: float) -> PerSample:
    """Weight of the fake score's residual in the generator's loss; see `potentials.py`."""
    if form == "released":
        return released_residual_weight(sigma.detach(), sigma_floor)
    return torch.ones_like(sigma)


def contraction(form: Form, lambda_rc: float, query: NoisedBatch, velocity_fake: Latents) -> Loss:
    """Loss of the fake score: denoise what the generator makes.

        L_F = lambda_rc * L_RC

    Args:
        form: Decides the weight of a noise level.
        lambda_rc: Weight of the residual contraction.
        query: The generator's sample and the noise it is looked at through; constants.
        velocity_fake: Fake score's prediction at `query.x_t`, with its graph back to the fake
            score's parameters.

    Returns:
        The loss in float32 or wider, and its detached terms: `tracking`, and
        `residual_contraction` (without its lambda).
    """
    error = float32(velocity_fake) - query.velocity.detach()
    sigma = query.sigma.detach()
    weight = torch.ones_like(sigma) if form == "released" else sigma.square()
    contracted = residual_contraction_loss(error, weight)
    value = lambda_rc * contracted
    return Loss(value, {"tracking": value.detach(), "residual_contraction": contracted.detach()})


def mean_rms(weight: PerSample, values: Latents) -> Scalar:
    """Root mean square of the weighted values of each sample, averaged over samples."""
    weighted = per_sample(weight, values) * values.detach()
    return sample_mean(weighted.square()).sqrt().mean()
