"""The Fisher term: how far the fake score is from the teacher, seen from the generator's samples.

    gap = x0_fake - x0_teacher
    L_Fisher = mean 0.5 * weight * gap^2

The difference of two scores is (1 - sigma) * gap / sigma^2, so with weight (1 - sigma)^2 / sigma^4
this is half their squared difference. The teacher is a constant: the gradient reaches a sample only
through the fake score's prediction and on through that network's input.

Both forms of the weight are here. They are two objectives, not a rescaling: over the score levels
0.02 to 0.98 the paper's weight spans ten orders of magnitude, the released one less than two.
"""

from sgmd_core.types import (
    Latents,
    NoisedBatch,
    PerSample,
    Samples,
    Scalar,
    overflow_as_nan,
    per_sample,
    sample_mean,
)


def x0_gap(query: NoisedBatch, velocity_fake: Latents, velocity_teacher: Latents) -> Latents:
    """Fake prediction minus teacher prediction of the clean latents.

        x0_fake - sg[x0_teacher] = (x_t - sg[x_t]) - sigma * (velocity_fake - sg[velocity_teacher])

    Both predictions start from the same `x_t`, so the difference is formed between velocities; the
    first bracket is zero and carries only the gradient along which `x0_fake` moves with `x_t`.
    Subtracting the predictions themselves would lose the gap to rounding at small sigma.

    Args:
        query: Where both looked.
        velocity_fake: Fake score's prediction, with its graph.
        velocity_teacher: Guided teacher's prediction.

    Returns:
        The gap, in latent units.
    """
    x_t = query.x_t
    sigma = per_sample(query.sigma, x_t)
    return (x_t - x_t.detach()) - sigma * (velocity_fake - velocity_teacher.detach())


def teacher_residual(query: NoisedBatch, velocity_teacher: Latents) -> PerSample:
    """Returns the mean distance of the teacher's prediction from the sample over its elements.

        n = mean |x0 - x0_teacher| = sigma * mean |velocity_teacher - (noise - x0)|

    Args:
        query: Where the teacher looked.
        velocity_teacher: Guided teacher's prediction.

    Returns:
        One value a sample, in latent units, without a graph.
    """
    error = velocity_teacher.detach() - query.velocity.detach()
    return query.sigma.detach() * sample_mean(error.abs())


def released_fisher_weight(residual: PerSample, eps: float) -> PerSample:
    """One over the teacher's residual: weight = 1 / (n + eps).

    `n` is proportional to sigma, as the gap is, so one learning rate serves every noise level. It
    enters at the first power while the gap enters squared, so the loss scales with the latents,
    unlike DMD's normalised gradient.

    Args:
        residual: `teacher_residual`.
        eps: Added, not a lower limit; in latent units.

    Source: the authors' released trainer.
    """
    return 1 / (overflow_as_nan(residual) + eps)


def paper_fisher_weight(sigma: PerSample, sigma_floor: float) -> PerSample:
    """The weight under which the gap is a difference of scores: c = (1 - sigma)^2 / sigma^4.

    It runs from 6.0e6 at sigma = 0.02 to 4.3e-4 at 0.98, so a rare query with little noise
    dominates the gradient of its batch. What bounds it in practice is the score law's
    `score_sigma_min`; `sigma_floor` only keeps a hand-made query at sigma = 0 from dividing by it.

    Args:
        sigma: Noise level of each sample.
        sigma_floor: Lower limit of the denominator's sigma.

    Source: SGMD (arXiv:2605.30116), teacher stop-gradient Fisher, c(t).
    """
    return (1 - sigma).square() / sigma.clamp_min(sigma_floor) ** 4


def fisher_loss(gap: Samples, weight: PerSample) -> Scalar:
    """Weighted squared gap between the fake score and the teacher.

        L_Fisher = mean_b [ weight_b * mean_elements 0.5 * gap^2 ]

    The mean runs over all elements of all samples, so the gradient on `x0_fake` is
    `weight * gap / num_elements`. With no other term this is the objective TSG-Fisher.

    Args:
        gap: `x0_gap`.
        weight: `released_fisher_weight` or `paper_fisher_weight`; a constant.

    Returns:
        Scalar in the dtype of `gap`.

    Source: SGMD (arXiv:2605.30116), teacher stop-gradient Fisher.
    """
    return (0.5 * per_sample(weight, gap) * gap.square()).mean()
