"""TSG-SIM: score implicit matching with a teacher that gets no gradient.

    generator   L_G = mean w * gap * (x0 - x0_fake),   gap = x0_fake - sg[x0_teacher]

        d L_G / d x0 = w * [gap + J' (residual - gap)] / num_elements

        residual = x0 - x0_fake,   J = d x0_fake / d x0

    fake score  as SGMD's

The loss is a product and not a distance: it may be negative, and its value says nothing about how
far the generator has come. Unlike TSG-Fisher it has a part that reaches the sample directly.

Source: score implicit matching (arXiv:2410.16794); the teacher's stop-gradient is SGMD's ablation
(arXiv:2605.30116). Which weight those runs used is not known to us; here it is SGMD's own, by the
same switch.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from sgmd_core.objectives import GradientPath
from sgmd_core.objectives.fisher import x0_gap
from sgmd_core.objectives.forms import DEFAULT_LAMBDA_RC, Form, contraction, gap_weight, mean_rms
from sgmd_core.objectives.settings import require_number, require_updates
from sgmd_core.types import Latents, Loss, NoisedBatch, float32, per_sample


@dataclass(frozen=True, slots=True)
class TsgSimObjective:
    """Score implicit matching with a constant teacher (`tsg_sim`).

    The fields are the recipe keys below `objective:`.
    Source: score implicit matching (arXiv:2410.16794).

    Attributes:
        method: Names this section among the methods.
        form: Weights of the noise levels, as for SGMD.
        normalizer_eps: Added to the teacher's residual, in latent units.
        sigma_floor: Lower limit of a noise level that something is divided by.
        fake_updates: Updates of the fake score per iteration.
    """

    path: ClassVar[GradientPath] = GradientPath.FAKE_SCORE
    about: ClassVar[str] = "score implicit matching with a constant teacher"
    gradient: ClassVar[str] = "w [gap + J' (residual - gap)]"
    leading_losses: ClassVar[tuple[str, ...]] = ("score_implicit", "residual_contraction")

    method: Literal["tsg_sim"] = "tsg_sim"
    form: Form = "released"
    normalizer_eps: float = 1e-8
    sigma_floor: float = 1e-8
    fake_updates: int = 1

    def __post_init__(self) -> None:
        require_number("normalizer_eps", self.normalizer_eps, zero_allowed=False)
        require_number("sigma_floor", self.sigma_floor, zero_allowed=False)
        require_updates(self.fake_updates)

    def generator_loss(
        self, query: NoisedBatch, velocity_fake: Latents, velocity_teacher: Latents
    ) -> Loss:
        """Loss of the generator: the gap to the teacher, along the fake score's residual.

        Args:
            query: The generator's sample and the noise it is looked at through; `x0` may require
                a gradient.
            velocity_fake: Fake score's prediction at `query.x_t`, with its graph back to `x0`.
            velocity_teacher: Guided teacher's prediction there; a constant.

        Returns:
            The loss in float32 or wider, and its detached terms: `generator`,
            `score_implicit` (the same), and `gap_norm`, the root mean square of the weighted gap
            of a sample, averaged over samples.
        """
        velocity_fake, velocity_teacher = float32(velocity_fake), float32(velocity_teacher)
        gap = x0_gap(query, velocity_fake, velocity_teacher)
        weight = gap_weight(
            self.form, query, velocity_teacher, self.normalizer_eps, self.sigma_floor
        )
        # x0 - x0_fake, with the gradient along which both move with x0.
        residual = per_sample(query.sigma, gap) * (velocity_fake - query.velocity)
        value = (per_sample(weight, gap) * gap * residual).mean()
        return Loss(
            value,
            {
                "generator": value.detach(),
                "score_implicit": value.detach(),
                "gap_norm": mean_rms(weight, gap),
            },
        )

    def tracking_loss(self, query: NoisedBatch, velocity_fake: Latents) -> Loss:
        """Loss of the fake score: `forms.contraction` with the form's own weight."""
        return contraction(self.form, DEFAULT_LAMBDA_RC[self.form], query, velocity_fake)
