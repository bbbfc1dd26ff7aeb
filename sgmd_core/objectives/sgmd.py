"""Score Gradient Matching Distillation: the two losses, put together from their terms.

    generator   L_G = L_Fisher + lambda_nr * L_NR
    fake score  L_F =            lambda_rc * L_RC

in two forms that differ in their weights (fisher.py, potentials.py):

               Fisher, on gap^2 / 2          NR gradient, on residual   RC, on velocity error^2 / 2
    released   1 / (teacher residual + eps)  1 / sigma                  1
    paper      (1 - sigma)^2 / sigma^4       1                          sigma^2

Every mean runs over all elements of all samples. So the loss of a batch is the mean of the losses
of its samples, and micro-batches weighed by their share of samples add up to the whole batch.

Source: SGMD (arXiv:2605.30116), Algorithm 1, and the authors' released trainer.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from sgmd_core.errors import ConfigError
from sgmd_core.objectives.fisher import (
    fisher_loss,
    paper_fisher_weight,
    released_fisher_weight,
    teacher_residual,
    x0_gap,
)
from sgmd_core.objectives.potentials import (
    fake_residual,
    negative_residual_loss,
    released_residual_weight,
    residual_contraction_loss,
)
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

_DEFAULT_LAMBDA_RC = {"released": 1.0, "paper": 0.1}


@dataclass(frozen=True, slots=True)
class SgmdObjective:
    """The losses of generator and fake score. Also the recipe section `objective:`.

    Attributes:
        form: `released` as in the authors' trainer, `paper` as in their paper. They are different
            objectives: expect to tune the weights anew.
        lambda_nr: Weight of the negative residual; 0 leaves TSG-Fisher. The paper tried 0.05 to
            0.5 and settled on 0.1; 0.5 collapsed.
        lambda_rc: Weight of the residual contraction; None takes the form's own, 1 released and
            0.1 paper. AdamW hardly notices it, gradient clipping does.
        normalizer_eps: Added to the teacher's residual, in latent units.
        sigma_floor: Lower limit of a noise level that something is divided by.
    """

    form: Literal["released", "paper"] = "released"
    lambda_nr: float = 0.1
    lambda_rc: float | None = None
    normalizer_eps: float = 1e-8
    sigma_floor: float = 1e-8

    def __post_init__(self) -> None:
        self._require_number("lambda_nr", self.lambda_nr, zero_allowed=True)
        self._require_number("lambda_rc", self.contraction_weight, zero_allowed=False)
        self._require_number("normalizer_eps", self.normalizer_eps, zero_allowed=False)
        self._require_number("sigma_floor", self.sigma_floor, zero_allowed=False)

    @property
    def contraction_weight(self) -> float:
        """Weight of the residual contraction, the form's own unless one was set."""
        return _DEFAULT_LAMBDA_RC[self.form] if self.lambda_rc is None else self.lambda_rc

    def generator_loss(
        self, query: NoisedBatch, velocity_fake: Latents, velocity_teacher: Latents
    ) -> Loss:
        """Loss of the generator: close the gap to the teacher, stay ahead of the fake score.

            L_G = L_Fisher + lambda_nr * L_NR

            d L_G / d x0 = (1 - sigma) * (I - sigma * d velocity_fake / d x_t)^T
                           (fisher_weight * gap + lambda_nr * residual_weight * residual)
                           / num_elements

        Args:
            query: The generator's sample and the noise it is looked at through; `x0` may require
                a gradient.
            velocity_fake: Fake score's prediction at `query.x_t`, with its graph back to `x0`.
            velocity_teacher: Guided teacher's prediction there; a constant.

        Returns:
            The loss in float32 or wider, and its detached terms: `generator`, `fisher` and
            `negative_residual` (without its lambda, never positive), and `fisher_norm` and
            `nr_norm`, the root mean square over a sample's elements of the two vectors in the
            bracket above, averaged over samples.
        """
        velocity_fake, velocity_teacher = float32(velocity_fake), float32(velocity_teacher)
        gap = x0_gap(query, velocity_fake, velocity_teacher)
        residual = fake_residual(query, velocity_fake)
        fisher_weight = self._fisher_weight(query, velocity_teacher)
        residual_weight = self._residual_weight(query.sigma)

        fisher = fisher_loss(gap, fisher_weight)
        negative_residual = negative_residual_loss(residual, residual_weight)
        # Not `+ 0 * ...`: without the term the loss is TSG-Fisher to the bit, gradient included.
        value = fisher if self.lambda_nr == 0 else fisher + self.lambda_nr * negative_residual
        return Loss(
            value,
            {
                "generator": value.detach(),
                "fisher": fisher.detach(),
                "negative_residual": negative_residual.detach(),
                "fisher_norm": _mean_rms(fisher_weight, gap),
                "nr_norm": self.lambda_nr * _mean_rms(residual_weight, residual),
            },
        )

    def tracking_loss(self, query: NoisedBatch, velocity_fake: Latents) -> Loss:
        """Loss of the fake score: denoise what the generator makes.

            L_F = lambda_rc * L_RC

        Args:
            query: The generator's sample and the noise it is looked at through; constants.
            velocity_fake: Fake score's prediction at `query.x_t`, with its graph back to the fake
                score's parameters.

        Returns:
            The loss in float32 or wider, and its detached terms: `tracking`, and
            `residual_contraction` (without its lambda).
        """
        error = float32(velocity_fake) - query.velocity.detach()
        sigma = query.sigma.detach()
        weight = torch.ones_like(sigma) if self.form == "released" else sigma.square()
        contraction = residual_contraction_loss(error, weight)
        value = self.contraction_weight * contraction
        return Loss(
            value, {"tracking": value.detach(), "residual_contraction": contraction.detach()}
        )

    def _fisher_weight(self, query: NoisedBatch, velocity_teacher: Latents) -> PerSample:
        if self.form == "released":
            residual = teacher_residual(query, velocity_teacher)
            return released_fisher_weight(residual, self.normalizer_eps)
        return paper_fisher_weight(query.sigma.detach(), self.sigma_floor)

    def _residual_weight(self, sigma: PerSample) -> PerSample:
        if self.form == "released":
            return released_residual_weight(sigma.detach(), self.sigma_floor)
        return torch.ones_like(sigma)

    def _require_number(self, name: str, value: float, *, zero_allowed: bool) -> None:
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero_allowed):
            raise ConfigError(
                "reading the objective",
                f"{name} is {value}",
                "a number of at least 0" if zero_allowed else "a number above 0",
            )


def _mean_rms(weight: PerSample, values: Latents) -> Scalar:
    """Root mean square of the weighted values of each sample, averaged over samples."""
    weighted = per_sample(weight, values) * values.detach()
    return sample_mean(weighted.square()).sqrt().mean()
