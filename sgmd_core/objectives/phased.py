"""Phased DMD: one expert of the generator after the other, each matched above its own last state.

    high phase  the generator goes from pure noise to x_s at the boundary sigma_s
    low phase   from there to clean latents: x_s = x0, sigma_s = 0

    x_t = alpha x_s + beta noise,   sigma_t in (sigma_s, 1)        interval.py
    generator   released   q = (x0_fake - x0_teacher) / max(mean |x0 - x0_teacher|, normalizer_min)
                           L_G = 0.5 * mean (x0 - sg[x0 - q])^2,  x0 where the exit step leads to
                paper      q = w (velocity_teacher - velocity_fake)
                           w = (1 - sigma_t) alpha / sigma_t
                           L_G = 0.5 * mean (x_s - sg[x_s - q])^2
    fake score  released   mean (velocity_fake - u)^2
                paper      mean min(1, 10 beta^2) (velocity_fake - u)^2
                u the velocity of the path through x_s, which is not noise - x_s

x0 and x_s both lie on the line of the velocity v at the exit step, so their gradients at v differ
by the positive factor sigma / (sigma - sigma_s) of each sample.

    sequential  all high iterations, then all low ones with the high expert as it is; the fake score
                goes back to the teacher's weights between, and noise ranges end at 1 in both
    alternate   even iterations high, odd ones low; the low phase is matched above the boundary in
                its 1st, 3rd, ... iteration and below it in the others

Source: Phased DMD (arXiv:2510.27684), sequential and `paper`; alternation, ranges, normaliser and
plain mean square of the released trainer. That trainer has a fake score for each phase; here one
learns from both, so above the boundary it follows the mean of their laws.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from sgmd_core.errors import ConfigError
from sgmd_core.interval import interval_scales, reverse_divergence_weight
from sgmd_core.objectives.dmd import DmdObjective, denoising_loss, distribution_matching_loss
from sgmd_core.objectives.potentials import residual_contraction_loss
from sgmd_core.phases import PhaseOrder, Phases
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.types import Latents, Loss, NoisedBatch, float32, per_sample

_MOST_WEIGHT = 10.0
"""Upper limit of 1 / beta^2 in the paper's tracking loss."""


def interval_direction(
    query: NoisedBatch, velocity_fake: Latents, velocity_teacher: Latents
) -> Latents:
    """Returns the paper's step, carried from the anchor to `x0`.

        at x_s  w (velocity_teacher - velocity_fake)
        at x0   the same times (sigma_e - sigma_s) / sigma_e, which is d x_s / d x0

    sigma_e is the noise level that the generator left for x0 from.

    Args:
        query: A query with an anchor; without one, sigma_s is 0.
        velocity_fake: Fake score's prediction.
        velocity_teacher: Guided teacher's prediction.

    Returns:
        The step in latent units, without a graph.
    """
    difference = float32(velocity_teacher).detach() - float32(velocity_fake).detach()
    sigma = query.sigma.detach().to(difference)
    anchor_sigma = torch.zeros_like(sigma)
    moved = torch.ones_like(sigma)
    if query.anchor_sigma is not None and query.exit_sigma is not None:
        anchor_sigma = query.anchor_sigma.detach().to(difference)
        exit_sigma = query.exit_sigma.detach().to(difference)
        moved = (exit_sigma - anchor_sigma) / exit_sigma
    weight = moved * reverse_divergence_weight(sigma, anchor_sigma)
    return per_sample(weight, difference) * difference


@dataclass(frozen=True, slots=True)
class PhasedObjective(DmdObjective):
    """Phased distribution matching (`phased_dmd`): high noise levels first, then low ones.

    Each phase trains the generator's steps above or below `boundary`, and judges samples on the
    interval above the phase's last state. The fields are the recipe keys below `objective:`.
    Source: Phased DMD (arXiv:2510.27684).

    Attributes:
        boundary: Raw level, in thousandths, at which the high phase ends; a step of the generator
            starts there. The shift moves it as it moves the steps.
        margin: Raw levels above a phase's last state that are not looked at, where the target of
            the fake score diverges; 0 is for form `paper` alone, whose weight is bounded there.
        order: `sequential`, or `alternate`, which has the released trainer's order and not its
            fake score for each phase.
        high_iterations: Iterations of the high phase, where phases are sequential.
        form: `released` or `paper`: the two losses.
        first_level: Least raw level at which samples are judged, whatever the phase.
        last_level: Largest one.
    """

    about: ClassVar[str] = "distribution matching in two phases, each with an expert of its own"
    gradient: ClassVar[str] = "gap / n on the interval above the phase's last state"

    method: Literal["phased_dmd"] = "phased_dmd"  # pyright: ignore[reportIncompatibleVariableOverride]
    fake_updates: int = 5
    normalizer_min: float = 1e-4
    boundary: int = 500
    margin: int = 20
    order: PhaseOrder = "sequential"
    high_iterations: int = 1000
    form: Literal["released", "paper"] = "released"
    first_level: int = 20
    last_level: int = 980

    def __post_init__(self) -> None:
        # Not `super()`: a dataclass with slots is a second class of the same name.
        DmdObjective.__post_init__(self)
        above, least = 1000 - self.boundary, self.boundary + self.margin
        rules = {
            "boundary": (0 < above < 1000, "a raw level between 0 and 1000"),
            "margin": (
                (self.form == "released") <= self.margin < above,
                f"a count of at least 0 and below {above}; with form released at least 1, because "
                "its loss grows without limit at the boundary",
            ),
            "order": (self.order in ("sequential", "alternate"), "sequential or alternate"),
            "high_iterations": (self.high_iterations >= 1, "a count of at least 1"),
            "form": (self.form in ("released", "paper"), "released or paper"),
            "first_level": (
                1 <= self.first_level < self.boundary,
                f"a raw level of at least 1 and below the boundary, {self.boundary}",
            ),
            "last_level": (
                least <= self.last_level < 1000,
                f"a raw level of at least boundary + margin, {least}, and below 1000",
            ),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                found = f"{name} is {getattr(self, name)!r}"
                raise ConfigError("reading the objective", found, expected)

    def phases(self, schedule: FlowMatchSchedule, num_steps: int) -> Phases:
        """Phases of a run's iterations.

        Args:
            schedule: Noise levels of the generator's steps and of the score queries.
            num_steps: Steps of the generator.

        Raises:
            ConfigError: No step of the generator starts at the boundary.
        """
        return Phases.of(
            schedule,
            num_steps,
            boundary=self.boundary,
            margin=self.margin,
            levels=(self.first_level, self.last_level),
            order=self.order,
            high_iterations=self.high_iterations,
        )

    @property
    def restarts(self) -> tuple[int, ...]:
        """Iterations before which the fake score goes back to the teacher's weights."""
        return (self.high_iterations,) if self.order == "sequential" else ()

    def cautions(self, schedule: FlowMatchSchedule) -> Iterator[str]:
        """A sentence where settings are named after a trainer whose numbers they do not make."""
        del schedule
        if self.order == "alternate":
            yield (
                "objective.order alternate has the order and the levels of the released trainer, "
                "which has a fake score for each phase; here one learns from both, and follows the "
                "mean of two laws above the boundary until the low phase keeps the law of the high "
                "one. The paper's order, sequential, has no such mean"
            )

    def generator_loss(
        self, query: NoisedBatch, velocity_fake: Latents, velocity_teacher: Latents
    ) -> Loss:
        """Loss of the generator at `x0`, in the chosen form."""
        if self.form == "released":
            return DmdObjective.generator_loss(self, query, velocity_fake, velocity_teacher)
        direction = interval_direction(query, velocity_fake, velocity_teacher)
        return distribution_matching_loss(query, direction)

    def tracking_loss(self, query: NoisedBatch, velocity_fake: Latents) -> Loss:
        """Loss of the fake score against the velocity of the path through the anchor."""
        if self.form == "released":
            return denoising_loss(query, velocity_fake)
        sigma = query.sigma.detach()
        anchor_sigma = torch.zeros_like(sigma)
        if query.anchor_sigma is not None:
            anchor_sigma = query.anchor_sigma.detach()
        _, beta = interval_scales(sigma, anchor_sigma)
        weight = (1 / beta.square()).clamp_max(_MOST_WEIGHT) * beta.square()
        error = float32(velocity_fake) - query.velocity.detach()
        contracted = residual_contraction_loss(error, weight)
        value = 2 * contracted
        return Loss(
            value, {"tracking": value.detach(), "residual_contraction": contracted.detach()}
        )
