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
from sgmd_core.objectives.forms import Form
from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.types import Latents, Loss, NoisedBatch


@dataclass(frozen=True, slots=True)
class TsgFisherObjective:
    """Teacher stop-gradient Fisher divergence (`tsg_fisher`): SGMD without its potentials.

    The fields are the recipe keys below `objective:`. Source: SGMD (arXiv:2605.30116).

    Attributes:
        method: Names this section among the methods.
        form: Weights of the noise levels, as for SGMD.
        normalizer_eps: Added to the teacher's residual, in latent units.
        sigma_floor: Lower limit of a noise level that something is divided by.
        fake_updates: Updates of the fake score per iteration.
    """

    path: ClassVar[GradientPath] = GradientPath.FAKE_SCORE
    about: ClassVar[str] = "teacher stop-gradient Fisher divergence: SGMD without its potentials"
    gradient: ClassVar[str] = "J' (w gap)"
    leading_losses: ClassVar[tuple[str, ...]] = ("fisher", "residual_contraction")

    method: Literal["tsg_fisher"] = "tsg_fisher"
    form: Form = "released"
    normalizer_eps: float = 1e-8
    sigma_floor: float = 1e-8
    fake_updates: int = 5

    def __post_init__(self) -> None:
        self.sgmd()

    def sgmd(self) -> SgmdObjective:
        """The same losses as SGMD's with a weight of 0."""
        return SgmdObjective(
            form=self.form,
            lambda_nr=0.0,
            normalizer_eps=self.normalizer_eps,
            sigma_floor=self.sigma_floor,
            fake_updates=self.fake_updates,
        )

    def generator_loss(
        self, query: NoisedBatch, velocity_fake: Latents, velocity_teacher: Latents
    ) -> Loss:
        """Loss of the generator: `SgmdObjective.generator_loss` without the negative residual."""
        return self.sgmd().generator_loss(query, velocity_fake, velocity_teacher)

    def tracking_loss(self, query: NoisedBatch, velocity_fake: Latents) -> Loss:
        """Loss of the fake score: `SgmdObjective.tracking_loss`."""
        return self.sgmd().tracking_loss(query, velocity_fake)
