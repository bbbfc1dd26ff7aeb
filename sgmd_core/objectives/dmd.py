"""Distribution matching distillation: samples move along the difference of two scores.

    generator   q    = sg[ (x0_fake - x0_teacher) / mean |x0 - x0_teacher| ]
                L_G  = 0.5 * mean (x0 - sg[x0 - q])^2

        value 0.5 * mean q^2,   d L_G / d x0 = q / num_elements

    fake score  L_F  = mean (velocity_fake - sg[noise - x0])^2

The direction is that of the reverse Kullback-Leibler divergence between generator and teacher. It
reaches the sample directly and no network's Jacobian enters: both scores may run without a graph.
The value of the loss says how long the step is, not how good the samples are.

Here without the paper's regression on pairs of noise and teacher sample, which is impractical for
video, and with one fake-score update an iteration, which that regression would have to make up for:
expect it to be less stable than `dmd2`.

Source: DMD (arXiv:2311.18828); normaliser, factor 1/2 and tracking loss of the released SGMD
trainer's video DMD.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from sgmd_core.objectives import GradientPath
from sgmd_core.objectives.potentials import residual_contraction_loss
from sgmd_core.objectives.settings import require_number, require_updates
from sgmd_core.types import (
    Latents,
    Loss,
    NoisedBatch,
    PerSample,
    float32,
    overflow_as_nan,
    per_sample,
    sample_mean,
)


def matching_direction(
    query: NoisedBatch,
    velocity_fake: Latents,
    velocity_teacher: Latents,
    *,
    normalizer_min: float = 0.0,
    removed: Latents | None = None,
    by_own_length: bool = False,
) -> Latents:
    """Returns the gap between the scores, per unit of teacher residual.

        q = (x0_fake - x0_teacher) / mean |x0 - x0_teacher|
          = (velocity_teacher - velocity_fake) / mean |velocity_teacher - (noise - x0)|

    The noise level cancels, so the difference is formed between velocities and keeps its digits.
    Where the query has an anchor, (x_t - x0) / sigma stands for noise - x0. A sample that both
    scores reproduce exactly has no direction: 0 / 0 is 0. All else that is not finite stays so, for
    the caller to refuse.

    Args:
        query: Where both looked.
        velocity_fake: Fake score's prediction.
        velocity_teacher: Guided teacher's prediction.
        normalizer_min: Least value of the denominator `mean |x0 - x0_teacher|`, in latent units.
        removed: Direction whose part of the gap is taken out before it is divided; see
            `without_component`.
        by_own_length: Divide by `mean |x0_fake - x0_teacher|` in place of the residual, so that a
            step is as long where the two scores nearly agree as where they are far apart.

    Returns:
        The direction, dimensionless, without a graph.
    """
    teacher = float32(velocity_teacher).detach()
    difference = teacher - float32(velocity_fake).detach()
    measured = difference if by_own_length else teacher - query.chord.detach()
    residual = overflow_as_nan(sample_mean(measured.abs()))
    if normalizer_min > 0:
        # The floor is one of x0; the residual here is one of velocities. At sigma = 0 it is not
        # finite, and the quotient is rightly 0.
        residual = residual.maximum(normalizer_min / query.sigma.detach().to(residual))
    if removed is not None:
        difference = without_component(difference, removed.detach().to(difference))
    residual = per_sample(residual, difference)
    nowhere = (difference == 0) & (residual == 0)
    return torch.where(nowhere, torch.zeros_like(difference), difference / residual)


def without_component(values: Latents, removed: Latents) -> Latents:
    """Returns values without their part along a direction, sample by sample.

        values - <values, removed> / <removed, removed> * removed

    The products run over all elements of a sample. Along a direction of length 0 nothing is taken.

    Args:
        values: In float32 or wider.
        removed: Direction of each sample, of any length.
    """
    length = _dot(removed, removed)
    share = _dot(values, removed) / torch.where(length == 0, torch.ones_like(length), length)
    return values - per_sample(share, values) * removed


def _dot(one: Latents, other: Latents) -> PerSample:
    return (one * other).flatten(1).sum(dim=1)


def distribution_matching_loss(query: NoisedBatch, direction: Latents) -> Loss:
    """Loss of the generator: a step of a direction, written as a regression.

        0.5 * mean (x0 - sg[x0 - direction])^2

    Args:
        query: The generator's sample; `x0` may require a gradient.
        direction: `matching_direction`, or another one; a constant.

    Returns:
        The loss in float32 or wider, and its detached terms: `generator`,
        `distribution_matching` (the same), and `gap_norm`, the root mean square of the direction
        of a sample, averaged over samples.
    """
    x0 = float32(query.x0)
    # x0 - (x0 - q) with the digits of q kept: the bracket is zero and carries the gradient.
    value = 0.5 * (direction + (x0 - x0.detach())).square().mean()
    return Loss(
        value,
        {
            "generator": value.detach(),
            "distribution_matching": value.detach(),
            "gap_norm": sample_mean(direction.square()).sqrt().mean(),
        },
    )


def denoising_loss(query: NoisedBatch, velocity_fake: Latents) -> Loss:
    """Loss of the fake score: mean squared velocity error, without SGMD's factor 1/2.

    AdamW does not notice the factor; gradient clipping does.

    Args:
        query: The generator's sample and the noise it is looked at through; constants.
        velocity_fake: Fake score's prediction at `query.x_t`, with its graph back to the fake
            score's parameters.

    Returns:
        The loss in float32 or wider, and its detached terms: `tracking`, and
        `residual_contraction`, half of it, which is comparable between methods.
    """
    error = float32(velocity_fake) - query.velocity.detach()
    contracted = residual_contraction_loss(error, torch.ones_like(query.sigma))
    value = 2 * contracted
    return Loss(value, {"tracking": value.detach(), "residual_contraction": contracted.detach()})


@dataclass(frozen=True, slots=True)
class DmdObjective:
    """Distribution matching (`dmd`): reverse KL with one update of the fake score per iteration.

    The generator's gradient at a sample is `matching_direction`, the gap of the two scores over the
    teacher's residual; both predictions are constants. The fields are the recipe keys below
    `objective:`. Source: DMD (arXiv:2311.18828).

    Attributes:
        method: Names this section among the methods.
        fake_updates: Updates of the fake score per iteration.
        normalizer_min: Least value of the denominator of the direction, `mean |x0 - x0_teacher|`,
            in latent units. The released trainers have 0 for video, 1e-4 where they train in
            phases and 0.1 for continuous-time matching.
    """

    path: ClassVar[GradientPath] = GradientPath.SAMPLE
    about: ClassVar[str] = "distribution matching: reverse KL, one fake-score update"
    gradient: ClassVar[str] = "gap / n"
    leading_losses: ClassVar[tuple[str, ...]] = ("distribution_matching", "residual_contraction")

    method: Literal["dmd"] = "dmd"
    fake_updates: int = 1
    normalizer_min: float = 0.0

    def __post_init__(self) -> None:
        require_updates(self.fake_updates)
        require_number("normalizer_min", self.normalizer_min, zero_allowed=True)

    def generator_loss(
        self, query: NoisedBatch, velocity_fake: Latents, velocity_teacher: Latents
    ) -> Loss:
        """Loss of the generator: `distribution_matching_loss` along `matching_direction`."""
        direction = matching_direction(
            query, velocity_fake, velocity_teacher, normalizer_min=self.normalizer_min
        )
        return distribution_matching_loss(query, direction)

    def tracking_loss(self, query: NoisedBatch, velocity_fake: Latents) -> Loss:
        """Loss of the fake score: `denoising_loss`."""
        return denoising_loss(query, velocity_fake)
