"""Score Gradient Matching Distillation: the two losses, put together from their terms.

    generator   L_G = L_Fisher + lambda_nr * L_NR
    fake score  L_F =            lambda_rc * L_RC

in two forms that differ in their weights (forms.py). With the clean samples that both networks
predict from one noised sample,

    L_Fisher  closes the gap       x0_fake - x0_teacher, the teacher a constant  (fisher.py)
    L_NR      rewards the residual x0 - x0_fake, which the fake score has        (potentials.py)
    L_RC      is half the square of the fake score's error, in its velocity      (potentials.py)

Every mean runs over all elements of all samples. So the loss of a batch is the mean of the losses
of its samples, and micro-batches weighed by their share of samples add up to the whole batch.

Source: SGMD (arXiv:2605.30116), Algorithm 1, and the authors' released trainer.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from sgmd_core.objectives import GradientPath
from sgmd_core.objectives.fisher import fisher_loss, x0_gap
from sgmd_core.objectives.forms import (
    DEFAULT_LAMBDA_RC,
    Form,
    contraction,
    gap_weight,
    mean_rms,
    residual_weight,
)
from sgmd_core.objectives.potentials import fake_residual, negative_residual_loss
from sgmd_core.objectives.settings import require_number, require_updates
from sgmd_core.types import Latents, Loss, NoisedBatch, float32


@dataclass(frozen=True, slots=True)
class SgmdObjective:
    """Score gradient matching distillation (`sgmd`): losses of generator and fake score.

        L_G = L_Fisher + lambda_nr * L_NR       generator, through the fake score's input
        L_F =            lambda_rc * L_RC       fake score

    `generator_loss` and `tracking_loss` take velocities (b, c, t, h, w) that networks predicted at
    `query.x_t`; no network is called. The fields are the recipe keys below `objective:`.
    Source: SGMD (arXiv:2605.30116), Algorithm 1, and the authors' released trainer.

    Attributes:
        method: Names this section among the methods.
        form: `released` as in the authors' trainer, `paper` as in their paper. They are different
            objectives: expect to tune the weights separately.
        lambda_nr: Weight of the negative residual; 0 gives the loss of TSG-Fisher, whose own method
            makes five updates of the fake score, too. The paper tried 0.05 to 0.5 and settled on
            0.1; 0.5 collapsed.
        lambda_rc: Weight of the residual contraction; None takes the form's own, 1 released and
            0.1 paper. AdamW is nearly invariant to it, so it acts mainly through
            gradient clipping.
        normalizer_eps: Added to the teacher's residual, in latent units, before the released form
            divides the Fisher term by it.
        sigma_floor: Lower limit of a noise level that something is divided by.
        fake_updates: Updates of the fake score per iteration; paper and release make 1.
    """

    path: ClassVar[GradientPath] = GradientPath.FAKE_SCORE
    about: ClassVar[str] = "score gradient matching: Fisher term and two opposite potentials"
    gradient: ClassVar[str] = "J' (w gap + lambda_nr u residual)"
    leading_losses: ClassVar[tuple[str, ...]] = (
        "fisher",
        "negative_residual",
        "residual_contraction",
    )

    method: Literal["sgmd"] = "sgmd"
    form: Form = "released"
    lambda_nr: float = 0.1
    lambda_rc: float | None = None
    normalizer_eps: float = 1e-8
    sigma_floor: float = 1e-8
    fake_updates: int = 1

    def __post_init__(self) -> None:
        require_number("lambda_nr", self.lambda_nr, zero_allowed=True)
        require_number("lambda_rc", self.contraction_weight, zero_allowed=False)
        require_number("normalizer_eps", self.normalizer_eps, zero_allowed=False)
        require_number("sigma_floor", self.sigma_floor, zero_allowed=False)
        require_updates(self.fake_updates)

    @property
    def contraction_weight(self) -> float:
        """Weight of the residual contraction, the form's own unless one was set."""
        return DEFAULT_LAMBDA_RC[self.form] if self.lambda_rc is None else self.lambda_rc

    def generator_loss(
        self, query: NoisedBatch, velocity_fake: Latents, velocity_teacher: Latents
    ) -> Loss:
        """Loss of the generator: close the gap to the teacher, stay ahead of the fake score.

            L_G = L_Fisher + lambda_nr * L_NR

            d L_G / d x0 = (1 - sigma) * (I - sigma * d velocity_fake / d x_t)^T
                           (fisher_weight * gap + lambda_nr * residual_weight * residual)
                           / num_elements

        Args:
            query: The generator's sample and the noise that was added to it; `x0` may require a
                gradient.
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
        on_gap = gap_weight(
            self.form, query, velocity_teacher, self.normalizer_eps, self.sigma_floor
        )
        on_residual = residual_weight(self.form, query.sigma, self.sigma_floor)

        fisher = fisher_loss(gap, on_gap)
        negative_residual = negative_residual_loss(residual, on_residual)
        # Not `+ 0 * ...`: without the term the loss is TSG-Fisher to the bit, gradient included.
        value = fisher if self.lambda_nr == 0 else fisher + self.lambda_nr * negative_residual
        return Loss(
            value,
            {
                "generator": value.detach(),
                "fisher": fisher.detach(),
                "negative_residual": negative_residual.detach(),
                "fisher_norm": mean_rms(on_gap, gap),
                "nr_norm": self.lambda_nr * mean_rms(on_residual, residual),
            },
        )

    def tracking_loss(self, query: NoisedBatch, velocity_fake: Latents) -> Loss:
        """Loss of the fake score: `forms.contraction` with this objective's weight."""
        return contraction(self.form, self.contraction_weight, query, velocity_fake)
