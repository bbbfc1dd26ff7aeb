"""Score identity distillation: implicit matching whose gradient passes through both scores.

    generator   L_G = mean [ gap * (x0 - x0_teacher) - a * gap^2 ] / n
                gap = x0_fake - x0_teacher,   n = sg[ mean |x0 - x0_teacher| ]

        d L_G / d x0 = [ gap + J' (error - 2 a gap) - J_T' (error + gap - 2 a gap) ]
                       / (n * num_elements)

        error = x0 - x0_teacher,   J = d x0_fake / d x0,   J_T = d x0_teacher / d x0

    fake score  L_F = mean (velocity_fake - sg[noise - x0])^2

With a = 1 the bracket in L_G is gap * (x0 - x0_fake), that of TSG-SIM; the term in J_T is what the
two differ by. It makes the teacher's input part of the graph, conditional and unconditional pass
alike, and the iteration the dearest of all methods here.

The loss may be negative, and its value says nothing about how far the generator has come: where the
fake score is exact, it is 0 in expectation for a = 1. Its gradient there is, except for a factor of
the noise level, that of half the Fisher divergence over noised samples that stay where they are.

Source: SiD (arXiv:2404.04057), in the form that Self-Forcing gives it for video.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from sgmd_core.objectives import GradientPath
from sgmd_core.objectives.dmd import denoising_loss
from sgmd_core.objectives.fisher import released_fisher_weight, teacher_residual
from sgmd_core.objectives.forms import mean_rms
from sgmd_core.objectives.settings import require_number, require_updates
from sgmd_core.types import Latents, Loss, NoisedBatch, float32, per_sample


@dataclass(frozen=True, slots=True)
class SidObjective:
    """Score identity distillation (`sid`): a gradient through fake score and teacher.

    The fields are the recipe keys below `objective:`. Source: SiD (arXiv:2404.04057).

    Attributes:
        method: Names this section among the methods.
        square_weight: `a`, the weight of the squared gap; 1 in the video recipe.
        normalizer_eps: Added to the teacher's residual, in latent units.
        fake_updates: Updates of the fake score per iteration.
    """

    path: ClassVar[GradientPath] = GradientPath.BOTH_SCORES
    about: ClassVar[str] = "score identity distillation, with a gradient through the teacher"
    gradient: ClassVar[str] = "that of tsg_sim, and the part through the teacher"
    leading_losses: ClassVar[tuple[str, ...]] = ("score_implicit", "residual_contraction")

    method: Literal["sid"] = "sid"
    square_weight: float = 1.0
    normalizer_eps: float = 1e-8
    fake_updates: int = 5

    def __post_init__(self) -> None:
        require_number("square_weight", self.square_weight, zero_allowed=True)
        require_number("normalizer_eps", self.normalizer_eps, zero_allowed=False)
        require_updates(self.fake_updates)

    def generator_loss(
        self, query: NoisedBatch, velocity_fake: Latents, velocity_teacher: Latents
    ) -> Loss:
        """Loss of the generator, with a gradient for both predictions.

        Formed between velocities: both predictions start from the same `x_t`, so
        gap = sigma * (velocity_teacher - velocity_fake), and
        x0 - x0_teacher = sigma * (velocity_teacher - (noise - x0)).

        Args:
            query: The generator's sample and the noise it is looked at through; `x0` may require
                a gradient.
            velocity_fake: Fake score's prediction at `query.x_t`, with its graph back to `x0`.
            velocity_teacher: Guided teacher's prediction there, with its graph back to `x0`, or a
                leaf whose gradient is carried on elsewhere.

        Returns:
            The loss in float32 or wider, and its detached terms: `generator`,
            `score_implicit` (the same), and `gap_norm`, the root mean square of the normalised gap
            of a sample, averaged over samples.
        """
        velocity_fake, velocity_teacher = float32(velocity_fake), float32(velocity_teacher)
        sigma = per_sample(query.sigma, velocity_fake)
        gap = sigma * (velocity_teacher - velocity_fake)
        error = sigma * (velocity_teacher - query.velocity)
        residual = teacher_residual(query, velocity_teacher)
        weight = released_fisher_weight(residual, self.normalizer_eps)
        value = (per_sample(weight, gap) * gap * (error - self.square_weight * gap)).mean()
        return Loss(
            value,
            {
                "generator": value.detach(),
                "score_implicit": value.detach(),
                "gap_norm": mean_rms(weight, gap),
            },
        )

    def tracking_loss(self, query: NoisedBatch, velocity_fake: Latents) -> Loss:
        """Loss of the fake score: `dmd.denoising_loss`."""
        return denoising_loss(query, velocity_fake)
