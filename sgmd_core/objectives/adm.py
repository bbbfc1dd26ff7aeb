"""Adversarial distribution matching: a learned divergence in the place of reverse KL.

    x_real, x_fake   one step of the probability-flow equation from the same x_t, by the teacher and
                     by the fake score, to the noise level sigma - delta
    D                heads on the frozen teacher's features at x, sigma - delta and the caption
    discriminator    mean max(0, 1 - D(x_real)) + mean max(0, 1 + D(x_fake))     + approximate R1
    generator        -mean D(x_fake)

    fake score       as DMD's, one update an iteration

The generator's gradient passes through the heads, the teacher's features and x_fake, and from there
both to x_t and through the fake score's input. `adversarial.py` has the terms. The discriminator
never sees data. At first the fake score is the teacher, so the two states differ by guidance alone;
without guidance there is nothing to tell apart until the fake score has moved.

Source: ADM (arXiv:2507.18569); no code is public, and rates, guidance and layers of the heads are
not known. The stage of pairs before it, for one step, is left out.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from sgmd_core.objectives import ComparedStates, GradientPath
from sgmd_core.objectives.adversarial import AdversarialTerm, discriminated_states
from sgmd_core.objectives.dmd import denoising_loss
from sgmd_core.objectives.settings import require_number, require_updates
from sgmd_core.types import Latents, Loss, NoisedBatch, float32


@dataclass(frozen=True, slots=True)
class AdmObjective:
    """Adversarial distribution matching (`adm`): losses of generator, fake score, discriminator.

    A discriminator on the teacher's features tells one ODE step of the teacher from one of the
    fake score, at x_t; the generator's gradient passes through the fake score's input. The fields
    are the recipe keys below `objective:`. Source: ADM (arXiv:2507.18569).

    Attributes:
        method: Names this section among the methods.
        fake_updates: Updates of the fake score per iteration.
        delta: Difference of noise levels of the step that is compared.
        adversary: Losses of generator and discriminator.
    """

    path: ClassVar[GradientPath] = GradientPath.FAKE_SCORE
    compared: ClassVar[ComparedStates] = ComparedStates.STEPS
    about: ClassVar[str] = "a discriminator on the teacher's features tells two ODE steps apart"
    gradient: ClassVar[str] = "(1 - sigma) (I - delta d v / d x_t)' d L / d x_fake, by the heads"
    leading_losses: ClassVar[tuple[str, ...]] = (
        "adversarial",
        "discriminator",
        "logit_gap",
        "residual_contraction",
    )

    method: Literal["adm"] = "adm"
    fake_updates: int = 1
    delta: float = 1 / 64
    adversary: AdversarialTerm = field(default_factory=AdversarialTerm)

    def __post_init__(self) -> None:
        require_updates(self.fake_updates)
        require_number("delta", self.delta, zero_allowed=False)

    def generator_loss(
        self, query: NoisedBatch, velocity_fake: Latents, velocity_teacher: Latents
    ) -> Loss:
        """Part of the generator's loss that needs no discriminator: none, so it is 0."""
        value = (0 * float32(velocity_fake)).sum()
        return Loss(value, {"generator": value.detach()})

    def tracking_loss(self, query: NoisedBatch, velocity_fake: Latents) -> Loss:
        """Loss of the fake score: `denoising_loss`."""
        return denoising_loss(query, velocity_fake)

    def states(
        self, query: NoisedBatch, velocity_fake: Latents, velocity_teacher: Latents
    ) -> tuple[Latents, Latents]:
        """States that the discriminator compares: `discriminated_states`, at sigma - delta."""
        return discriminated_states(query, velocity_fake, velocity_teacher, self.delta)
