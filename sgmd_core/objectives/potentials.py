"""The two potentials on the fake score's residual, one for each learner.

    residual = x0 - x0_fake = sigma * (velocity_fake - velocity)

    NR  negative residual     L_NR = -0.5 * mean (weight * residual)^2       to the generator
    RC  residual contraction  L_RC = +0.5 * mean weight * (velocity_fake - velocity)^2
                                                                            to the fake score

The fake score is rewarded for a small residual and the generator, on the same residual, for a large
one: it is drawn to samples that the fake score has not caught up with. NR has no lower limit; what
holds it is a small weight and a fake score that follows. Watch the ratio of the two upstream norms
that the objective reports.

Where the fake score is exact, NR does not vanish: its residual is the spread of x0 given x_t, which
no score removes, and the term draws samples together. A Gaussian teacher of spread s shows by how
much. At one noise level the paper's form leaves the generator at the spread a,

    a^2 = s^2 - lambda * sigma^4 * (alpha^2 s^2 + sigma^2) / alpha^4,    alpha = 1 - sigma

and the released form with lambda 0.1 and the score law of shift 5 leaves it at 0.457 for s = 0.5.
With lambda 0 both recover s. (Our derivation; the tests follow it.)
"""

from sgmd_core.types import Latents, NoisedBatch, PerSample, Samples, Scalar, per_sample


def fake_residual(query: NoisedBatch, velocity_fake: Latents) -> Latents:
    """Returns the residual of the fake score's prediction; the sample is held constant.

        sg[x0] - x0_fake = sigma * (velocity_fake - sg[noise - x0]) - (x_t - sg[x_t])

    Formed between velocities; the last bracket is zero and carries only the gradient along which
    `x0_fake` moves with `x_t`.

    Args:
        query: The sample and the noise it was looked at through.
        velocity_fake: Fake score's prediction, with its graph.

    Returns:
        The residual, in latent units.
    """
    x_t = query.x_t
    sigma = per_sample(query.sigma, x_t)
    return sigma * (velocity_fake - query.velocity.detach()) - (x_t - x_t.detach())


def released_residual_weight(sigma: PerSample, sigma_floor: float) -> PerSample:
    """One over the noise level: weight = 1 / max(sigma, sigma_floor).

    It makes the weighted residual an error of velocities, and the ratio of the Fisher and NR
    gradients independent of sigma. The paper's form weighs every level by 1.

    Source: the authors' released trainer.
    """
    return 1 / sigma.clamp_min(sigma_floor)


def negative_residual_loss(residual: Samples, weight: PerSample) -> Scalar:
    """The generator's potential: the larger the fake score's residual, the lower.

        value     -0.5 * mean (weight * residual)^2
        gradient  +weight * residual / num_elements  on x0_fake

    For weight 1 the gradient is the value's derivative. For another weight it is not: the release
    regresses `x0_fake` on a detached target at a distance of `weight * residual`, which weighs the
    gradient once where the value is weighed twice. We keep that, value and gradient.

    Args:
        residual: `fake_residual`.
        weight: 1 for each sample (paper) or `released_residual_weight`; a constant.

    Returns:
        Scalar in the dtype of `residual`, never positive.

    Source: SGMD (arXiv:2605.30116), negative residual; weight of the authors' released trainer.
    """
    constant = residual.detach()
    distance = per_sample(weight, residual) * constant + (residual - constant)
    return -0.5 * distance.square().mean()


def residual_contraction_loss(velocity_error: Samples, weight: PerSample) -> Scalar:
    """The fake score's potential: plain denoising of the generator's samples.

        L_RC = mean_b [ weight_b * mean_elements 0.5 * (velocity_fake - sg[noise - x0])^2 ]

    Args:
        velocity_error: Fake score's velocity minus that of the sample.
        weight: 1 for each sample (released), or sigma^2, which makes it half the squared residual
            (paper) and lowers the weight of little noise by up to 2,400.

    Returns:
        Scalar in the dtype of `velocity_error`.

    Source: SGMD (arXiv:2605.30116), residual contraction; weight of the authors' released trainer.
    """
    return (0.5 * per_sample(weight, velocity_error) * velocity_error.square()).mean()
