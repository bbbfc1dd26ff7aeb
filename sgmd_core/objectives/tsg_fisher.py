"""TSG-Fisher: the teacher stop-gradient Fisher divergence alone, SGMD without its potentials.

    generator   L_G = mean 0.5 * w * gap^2,   gap = x0_fake - sg[x0_teacher]

        d L_G / d x0 = J' (w * gap) / num_elements,   J = d x0_fake / d x0

    fake score  as SGMD's

The whole gradient passes through the fake score's input. Nothing rewards the generator for staying
ahead of the fake score, so the fake score needs several updates an iteration to keep up.

Source: SGMD (arXiv:2605.30116), which names it as its ablation. Which weight those runs used is not
known to us; here it is SGMD's own, by the same switch.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from sgmd_core.objectives import GradientPath
from sgmd_core.objectives.fisher import fisher_loss, x0_gap
from sgmd_core.objectives.forms import DEFAULT_LAMBDA_RC, Form, contraction, gap_weight, mean_rms
from sgmd_core.objectives.settings import require_number, require_updates
from sgmd_core.types import Latents, Loss, NoisedBatch, float32


@dataclass(frozen=True, slots=True)
class TsgFisherObjective:
    """The losses of generator and fake score. Also a recipe section `objective:`.

    Attributes:
        method: Names this section among the methods.
        form: Weights of the noise levels, as for SGMD.
        normalizer_eps: Added to the teacher's residual, in latent units.
        sigma_floor: Lower limit of a noise level that something is divided by.
        fake_updates: Updates of the fake score an iteration.
    """

    path: ClassVar[GradientPath] = GradientPath.FAKE_SCORE

    method: Literal["tsg_fisher"] = "tsg_fisher"
    form: Form = "released"
    normalizer_eps: float = 1e-8
    sigma_floor: float = 1e-8
    fake_updates: int = 5

    def __post_init__(self) -> None:
        require_number("normalizer_eps", self.normalizer_eps, zero_allowed=False)
        require_number("sigma_floor", self.sigma_floor, zero_allowed=False)
        require_updates(self.fake_updates)

    def generator_loss(
        self, query: NoisedBatch, velocity_fake: Latents, velocity_teacher: Latents
    ) -> Loss:
        """Loss of the generator: close the gap to the teacher.

        Args:
            query: The generator's sample and the noise it is looked at through; `x0` may require
                a gradient.
            velocity_fake: Fake score's prediction at `query.x_t`, with its graph back to `x0`.
            velocity_teacher: Guided teacher's prediction there; a constant.

        Returns:
            The loss in float32 or wider, and its detached terms: `generator`, `fisher` (the same),
            and `fisher_norm`, the root mean square of the weighted gap of a sample, averaged over
            samples.
        """
        velocity_fake, velocity_teacher = float32(velocity_fake), float32(velocity_teacher)
        gap = x0_gap(query, velocity_fake, velocity_teacher)
        weight = gap_weight(
            self.form, query, velocity_teacher, self.normalizer_eps, self.sigma_floor
        )
        value = fisher_loss(gap, weight)
        return Loss(
            value,
            {
                "generator": value.detach(),
                "fisher": value.detach(),
                "fisher_norm": mean_rms(weight, gap),
            },
        )

    def tracking_loss(self, query: NoisedBatch, velocity_fake: Latents) -> Loss:
        """Loss of the fake score: `forms.contraction` with the form's own weight."""
        return contraction(self.form, DEFAULT_LAMBDA_RC[self.form], query, velocity_fake)
