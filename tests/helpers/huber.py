"""An objective of another package: Fisher distance with a pseudo-Huber penalty."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from sgmd import (
    GradientPath,
    Latents,
    Loss,
    NoisedBatch,
    denoising_loss,
    float32,
    require_number,
    require_updates,
    x0_gap,
)


@dataclass(frozen=True, slots=True)
class PseudoHuberObjective:
    """Quadratic for small gaps, linear for large ones.

    Attributes:
        method: Names this section among the methods.
        delta: Gap at which the penalty turns linear, in latent units.
        fake_updates: Updates of the fake score per iteration.
    """

    path: ClassVar[GradientPath] = GradientPath.FAKE_SCORE
    about: ClassVar[str] = "Fisher distance with a pseudo-Huber penalty"
    gradient: ClassVar[str] = "J' gap / sqrt(1 + (gap / delta)^2)"
    leading_losses: ClassVar[tuple[str, ...]] = ("fisher", "residual_contraction")

    method: Literal["pseudo_huber"] = "pseudo_huber"
    delta: float = 1.0
    fake_updates: int = 1

    def __post_init__(self) -> None:
        require_number("delta", self.delta, zero_allowed=False)
        require_updates(self.fake_updates)

    def generator_loss(
        self, query: NoisedBatch, velocity_fake: Latents, velocity_teacher: Latents
    ) -> Loss:
        """Mean of delta^2 (sqrt(1 + (gap / delta)^2) - 1)."""
        gap = x0_gap(query, float32(velocity_fake), float32(velocity_teacher))
        value = (self.delta**2 * ((1 + (gap / self.delta).square()).sqrt() - 1)).mean()
        return Loss(value, {"generator": value.detach(), "fisher": value.detach()})

    def tracking_loss(self, query: NoisedBatch, velocity_fake: Latents) -> Loss:
        """Loss of the fake score: mean squared velocity error."""
        return denoising_loss(query, velocity_fake)
