"""DMD2 without its GAN term: the losses of DMD, and a fake score that moves faster.

    one update of the generator, then `fake_updates` updates of the fake score, each on new samples

The fake score sees the generator's present samples often enough to follow it, which replaces DMD's
regression on pairs. Both losses are those of `dmd.py`. The GAN term needs real videos and is left
out, as video recipes do.

Source: DMD2 (arXiv:2405.14867), two time scales; ratio 5 of the released SGMD trainer's video DMD.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from sgmd_core.objectives import GradientPath
from sgmd_core.objectives.dmd import denoising_loss, distribution_matching_loss
from sgmd_core.objectives.settings import require_updates
from sgmd_core.types import Latents, Loss, NoisedBatch


@dataclass(frozen=True, slots=True)
class Dmd2Objective:
    """The losses of generator and fake score. Also a recipe section `objective:`.

    Attributes:
        method: Names this section among the methods.
        fake_updates: Updates of the fake score an iteration.
    """

    path: ClassVar[GradientPath] = GradientPath.SAMPLE

    method: Literal["dmd2"] = "dmd2"
    fake_updates: int = 5

    def __post_init__(self) -> None:
        require_updates(self.fake_updates)

    def generator_loss(
        self, query: NoisedBatch, velocity_fake: Latents, velocity_teacher: Latents
    ) -> Loss:
        """Loss of the generator: `dmd.distribution_matching_loss`."""
        return distribution_matching_loss(query, velocity_fake, velocity_teacher)

    def tracking_loss(self, query: NoisedBatch, velocity_fake: Latents) -> Loss:
        """Loss of the fake score: `dmd.denoising_loss`."""
        return denoising_loss(query, velocity_fake)
