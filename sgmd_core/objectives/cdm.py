"""Continuous-time distribution matching: DMD at any noise level, on and off the trajectory.

    generator   L_G = L_DM + L_CA + weight(iteration) * L_off
                each 0.5 * mean (x0 - sg[x0 - q])^2, with

    L_DM    at the rollout's x0            q = (x0_fake - x0_cond) / n
    L_CA    the same x0, other noise       q = (x0_cond - x0_guided) / n
    L_off   at x0' = x' - sigma' v(x')     q = (x0_fake - x0_cond) / n
            x' = x_t + (sigma' - sigma) v  off the rollout, along its stored velocity

    n = max(mean |x0 - x0_cond|, floor) of each query, x0_cond the teacher with the caption alone,
    x0_guided = x0_uncond + s (x0_cond - x0_uncond); the floor is normalizer_min in L_DM and L_CA,
    off_trajectory_normalizer_min in L_off

    fake score  as DMD's

DMD with a guided teacher is L_DM + L_CA at one and the same noise (except for n): matching and
guidance added up. Here guidance is looked at between no noise and the level that the generator
stood at, matching everywhere. `guidance: joint` keeps them together, as DMD does; then x0_cond in
L_DM is x0_guided, and L_CA is left out.

It belongs to `generator.random_steps`: a rollout takes a random number of steps over random levels,
so the generator learns every stride, and L_off teaches states that no rollout visits.

Source: CDM (arXiv:2605.06376) and its code, whose losses have no factor 1/2; `joint` with a warm-up
is the form in the trainer that SGMD was released in. Both are for images: no run on video is known.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from sgmd_core.errors import ConfigError
from sgmd_core.objectives.dmd import DmdObjective, distribution_matching_loss, matching_direction
from sgmd_core.objectives.settings import require_number
from sgmd_core.types import (
    GuideAnswer,
    Latents,
    Looks,
    Loss,
    NoisedBatch,
    float32,
    overflow_as_nan,
    per_sample,
    sample_mean,
)


def augmentation_direction(
    query: NoisedBatch, conditional: Latents, guided: Latents, *, normalizer_min: float = 0.0
) -> Latents:
    """Returns the step against guidance, per unit of the caption's residual.

        q = (x0_cond - x0_guided) / max(mean |x0 - x0_cond|, normalizer_min)
          = -(s - 1) (x0_cond - x0_uncond) / ...

    With a floor it is 0 where there is no noise: both predictions are the sample there.

    Args:
        query: Where the teacher looked; the noise level may be 0.
        conditional: Its velocity with the caption alone.
        guided: Its velocity under guidance of scale s.
        normalizer_min: Least value of the denominator, in latent units.

    Returns:
        The direction, dimensionless, without a graph.
    """
    conditional, guided = float32(conditional).detach(), float32(guided).detach()
    residual = overflow_as_nan(sample_mean((conditional - query.velocity.detach()).abs()))
    if normalizer_min > 0:
        # Not finite at sigma = 0, whose quotient is rightly 0.
        residual = residual.maximum(normalizer_min / query.sigma.detach().to(residual))
    return (guided - conditional) / per_sample(residual, guided)


@dataclass(frozen=True, slots=True)
class CdmObjective(DmdObjective):
    """Continuous-time distribution matching (`cdm`): losses of generator and fake score.

    Matches samples of rollouts with random steps, the teacher's guidance at noise of its own, and
    samples off the trajectory. The fields are the recipe keys below `objective:`.
    Source: CDM (arXiv:2605.06376).

    Attributes:
        guidance: `split` looks at the teacher's guidance at a noise level of its own, `joint` at
            that of the matching, as DMD does. Its scale is `teacher.guidance_scale` in both.
        off_trajectory: Weight of the loss off the trajectory; 0 leaves it out.
        off_trajectory_warmup: Iterations over which that weight rises from 0; 0 starts at once.
        off_trajectory_normalizer_min: As `normalizer_min`, of the loss off the trajectory. The
            paper's code bounds all losses by 0.1, the trainer that SGMD was released in this one.
    """

    about: ClassVar[str] = "distribution matching on random steps, on and off the trajectory"
    gradient: ClassVar[str] = "gap / n, and guidance / n at other noise"
    method: Literal["cdm"] = "cdm"  # pyright: ignore[reportIncompatibleVariableOverride]
    fake_updates: int = 2
    normalizer_min: float = 0.1
    guidance: Literal["split", "joint"] = "split"
    off_trajectory: float = 1.0
    off_trajectory_warmup: int = 0
    off_trajectory_normalizer_min: float = 0.1

    def __post_init__(self) -> None:
        # Not `super()`: a dataclass with slots is a second class of the same name.
        DmdObjective.__post_init__(self)
        for name in ("off_trajectory", "off_trajectory_normalizer_min"):
            require_number(name, getattr(self, name), zero_allowed=True)
        if self.guidance not in ("split", "joint"):
            raise ConfigError(
                "reading the objective", f"guidance is {self.guidance!r}", "'split' or 'joint'"
            )
        if self.off_trajectory_warmup < 0:
            raise ConfigError(
                "reading the objective",
                f"off_trajectory_warmup is {self.off_trajectory_warmup}",
                "a count of at least 0",
            )

    @property
    def looks(self) -> Looks:
        """Score queries beside the one at the generator's samples."""
        return Looks(
            splits_guidance=self.guidance == "split", off_trajectory=self.off_trajectory > 0
        )

    def off_trajectory_weight(self, iteration: int) -> float:
        """Weight of the loss off the trajectory in an iteration: a linear rise, then constant."""
        if self.off_trajectory_warmup == 0:
            return self.off_trajectory
        return self.off_trajectory * min(1.0, iteration / self.off_trajectory_warmup)

    def unreached(self, iterations: int) -> Iterator[str]:
        """A sentence where a run ends within the warm-up of the loss off the trajectory."""
        warmup, reached = self.off_trajectory_warmup, iterations - 1
        if self.off_trajectory and reached < warmup:
            yield (
                f"iterations {iterations} end within objective.off_trajectory_warmup {warmup}, so "
                "the loss off the trajectory never has more than "
                f"{reached / warmup:.2g} of its weight; set a shorter warm-up, or more iterations"
            )

    def guide_loss(self, query: NoisedBatch, answer: GuideAnswer) -> Loss:
        """Loss of the generator by the teacher's guidance, at a look of its own.

        Args:
            query: The generator's samples, through the noise of that look.
            answer: The teacher's velocities there.
        """
        direction = augmentation_direction(
            query, answer.conditional, answer.guided, normalizer_min=self.normalizer_min
        )
        value = distribution_matching_loss(query, direction).value
        return Loss(value, {"guidance_augmentation": value.detach()})

    def off_trajectory_loss(
        self, query: NoisedBatch, velocity_fake: Latents, velocity_teacher: Latents
    ) -> Loss:
        """Loss of the generator at samples off the trajectory, its weight included.

        Args:
            query: Those samples, and the noise that they are looked at through.
            velocity_fake: Fake score's prediction there; a constant.
            velocity_teacher: The teacher's there, with the caption alone; a constant.
        """
        direction = matching_direction(
            query,
            velocity_fake,
            velocity_teacher,
            normalizer_min=self.off_trajectory_normalizer_min,
        )
        value = distribution_matching_loss(query, direction).value
        weight = self.off_trajectory_weight(query.key.iteration)
        return Loss(weight * value, {"off_trajectory": value.detach()})
