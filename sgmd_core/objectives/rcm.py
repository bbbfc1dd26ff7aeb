"""Score-regularised consistency: a consistency model of data, matched on its own samples.

    generator   L_G = consistency.weight * L_C  +  matching_weight * sum (x0 - sg[x0 - q])^2
                L_C on noised data, see `consistency`; q as in DMD, on the generator's samples

    fake score  L_F = sum (F_fake - F*)^2 = sum (x0 - x0_fake)^2 / sin(t)^2

Sums run over the elements of a sample, means over samples. Consistency covers what the data hold
and blurs; matching sharpens and forgets. Matching begins when the tangent warm-up has ended.
`matching_weight: 0` is sCM alone. `consistency.weight: 0` is distribution matching alone, from the
first iteration on, and needs no data: DMD's gradient, summed.

It belongs to `schedule.renoise`: a consistency function leads to x0 from any state, and the states
below the first one are noised again, in training and in sampling.

Source: rCM (arXiv:2510.08431) and its code.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from sgmd_core.errors import ConfigError
from sgmd_core.objectives.consistency import ConsistencyTerm
from sgmd_core.objectives.dmd import DmdObjective, matching_direction
from sgmd_core.objectives.settings import require_number
from sgmd_core.types import Latents, Loss, NoisedBatch, float32, sample_mean


@dataclass(frozen=True, slots=True)
class RcmObjective(DmdObjective):
    """rCM (`rcm`): consistency on latents of data, and distribution matching on own samples.

    With `matching_weight` 0 it is sCM. The fields are the recipe keys below `objective:`.
    Source: rCM (arXiv:2510.08431).

    Attributes:
        consistency: The term on latents of the data.
        matching_weight: Weight of the term on the generator's own samples; 0 leaves it out.
    """

    about: ClassVar[str] = "consistency on data, and distribution matching on own samples"
    gradient: ClassVar[str] = "gap / n; and by consistency, to the weights at noised data"
    leading_losses: ClassVar[tuple[str, ...]] = ("tangent_norm", "residual_contraction")

    method: Literal["rcm"] = "rcm"  # pyright: ignore[reportIncompatibleVariableOverride]
    fake_updates: int = 4
    normalizer_min: float = 1e-5
    consistency: ConsistencyTerm = field(default_factory=ConsistencyTerm)
    matching_weight: float = 1.0

    def __post_init__(self) -> None:
        # Not `super()`: a dataclass with slots is a second class of the same name.
        DmdObjective.__post_init__(self)
        require_number("matching_weight", self.matching_weight, zero_allowed=True)
        if self.matching_weight == self.consistency.weight == 0:
            raise ConfigError(
                "reading the objective",
                "matching_weight and consistency.weight are 0",
                "a weight above 0 for at least one of the two",
            )

    @property
    def matches(self) -> bool:
        """True if the generator also learns from its own samples."""
        return self.matching_weight > 0

    def matching_weight_at(self, iteration: int) -> float:
        """Weight of the matching term in an iteration: 0 during the tangent warm-up."""
        waits = self.consistency.weight > 0 and iteration < self.consistency.warmup
        return 0.0 if waits else self.matching_weight

    def generator_loss(
        self, query: NoisedBatch, velocity_fake: Latents, velocity_teacher: Latents
    ) -> Loss:
        """Loss of the generator on its own samples: DMD's direction, summed over elements."""
        direction = matching_direction(
            query, velocity_fake, velocity_teacher, normalizer_min=self.normalizer_min
        )
        x0 = float32(query.x0)
        step = (direction + (x0 - x0.detach())).square().flatten(1).sum(dim=1).mean()
        value = self.matching_weight_at(query.key.iteration) * step
        return Loss(
            value,
            {
                "generator": value.detach(),
                "distribution_matching": step.detach(),
                "gap_norm": sample_mean(direction.square()).sqrt().mean(),
            },
        )

    def tracking_loss(self, query: NoisedBatch, velocity_fake: Latents) -> Loss:
        """Loss of the fake score: squared error of its velocity on the circle, summed.

        F_fake - F* = (velocity_fake - velocity) / (cos(t) + sin(t))
        """
        error = (float32(velocity_fake) - query.velocity.detach()).square()
        sigma = query.sigma.detach()
        weight = (1 - sigma).square() + sigma.square()
        value = (weight * error.flatten(1).sum(dim=1)).mean()
        contracted = 0.5 * error.mean()
        return Loss(
            value, {"tracking": value.detach(), "residual_contraction": contracted.detach()}
        )
