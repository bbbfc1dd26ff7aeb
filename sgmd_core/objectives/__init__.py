"""Objectives of the two learners; one method, one file.

An objective is mathematics over predictions: it never holds or calls a network. Whoever calls it
decides whose parameters receive the gradient.

                gradient at x0, J = d x0_fake / d x0, J_T = d x0_teacher / d x0       path
    dmd, dmd2   q = gap / n, as it is                                                 SAMPLE
    cdm         the same at several looks: at x0, guidance at other noise, off the path   SAMPLE
    phased_dmd  the same in the interval above the phase's last state                     SAMPLE
    pdmd        the same, gap without its part along residual                         SAMPLE
    tsg_fisher  J' (w gap)                                                            FAKE_SCORE
    sgmd        J' (w gap + lambda_nr u residual)                                     FAKE_SCORE
    tsg_sim     w [gap + J' (residual - gap)]                                         FAKE_SCORE
    adm         (1 - sigma) (I - delta d velocity_fake / d x_t)' d L_D / d x_fake     FAKE_SCORE
    sid         (1 / n) [gap + J' (x0 - x0_teacher - 2 a gap)
                             - J_T' (x0 - x0_teacher + gap - 2 a gap)]                BOTH_SCORES

    gap = x0_fake - x0_teacher, residual = x0 - x0_fake, n = mean |x0 - x0_teacher|; w, u weights
"""

from collections.abc import Iterator
from dataclasses import replace
from enum import StrEnum
from typing import ClassVar, Protocol, runtime_checkable

from sgmd_core.objectives.adversarial import AdversarialTerm
from sgmd_core.phases import Phases
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.types import GuideAnswer, Latents, Looks, Loss, NoisedBatch, Purpose


class GradientPath(StrEnum):
    """Ways by which a generator's loss depends on `x0`; each one contains those before it."""

    SAMPLE = "sample"
    """Directly. Both networks' predictions are constants."""
    FAKE_SCORE = "fake_score"
    """Also through the input of the fake score."""
    BOTH_SCORES = "both_scores"
    """Also through the input of the teacher."""


@runtime_checkable
class Objective(Protocol):
    """A pair of losses over the same score query.

    Attributes:
        path: Ways by which the generator's loss depends on `x0`.
        about: One line on the method, for lists of methods.
        gradient: The generator's gradient at `x0`, as a formula in the words above.
        leading_losses: Terms of the two losses that a progress line and a report show first.
    """

    path: ClassVar[GradientPath]
    about: ClassVar[str]
    gradient: ClassVar[str]
    leading_losses: ClassVar[tuple[str, ...]]

    @property
    def method(self) -> str:
        """Name of the method in recipes: `objective: {method: ...}`."""
        ...

    @property
    def fake_updates(self) -> int:
        """Updates of the fake score per iteration, which is one update of the generator."""
        ...

    def generator_loss(
        self, query: NoisedBatch, velocity_fake: Latents, velocity_teacher: Latents
    ) -> Loss:
        """Loss of the generator, differentiable with respect to `query.x0`.

        Args:
            query: The generator's sample and the noise it is looked at through. To ask for the
                gradient, let `x0` be a leaf that requires one.
            velocity_fake: Fake score's prediction at `query.x_t`; unless the path is `SAMPLE`,
                with its graph back to `x0`.
            velocity_teacher: Guided teacher's prediction there; a constant, unless the path is
                `BOTH_SCORES`.

        Returns:
            The loss, a mean over samples, and its terms.
        """
        ...

    def tracking_loss(self, query: NoisedBatch, velocity_fake: Latents) -> Loss:
        """Loss of the fake score; the query is a constant.

        Args:
            query: The generator's sample and the noise it is looked at through.
            velocity_fake: Fake score's prediction at `query.x_t`, with its graph back to the fake
                score's parameters.

        Returns:
            The loss, a mean over samples, and its terms.
        """
        ...


@runtime_checkable
class LookingObjective(Protocol):
    """Part of an objective whose generator loss has terms at score queries of their own."""

    @property
    def looks(self) -> Looks:
        """Score queries beside the one at the generator's samples."""
        ...

    def guide_loss(self, query: NoisedBatch, answer: GuideAnswer) -> Loss:
        """Term of the generator's loss by the teacher's guidance; see `Looks.splits_guidance`."""
        ...

    def off_trajectory_loss(
        self, query: NoisedBatch, velocity_fake: Latents, velocity_teacher: Latents
    ) -> Loss:
        """Term of the generator's loss at samples off its trajectory, its weight included."""
        ...


def looks_of(objective: Objective, guidance_scale: float) -> Looks:
    """Score queries that an objective wants beside the one at the generator's samples.

    Args:
        objective: Any objective.
        guidance_scale: The teacher's; at 1 there is no guidance to look at.
    """
    if not isinstance(objective, LookingObjective):
        return Looks()
    looks = objective.looks
    return replace(looks, splits_guidance=looks.splits_guidance and guidance_scale != 1)


@runtime_checkable
class PhasingObjective(Protocol):
    """Part of an objective that trains some steps of the generator first and others later."""

    @property
    def restarts(self) -> tuple[int, ...]:
        """Iterations before which the fake score goes back to the weights that it started from."""
        ...

    def phases(self, schedule: FlowMatchSchedule, num_steps: int) -> Phases:
        """Phases of a run's iterations."""
        ...


def restarts_of(objective: Objective) -> tuple[int, ...]:
    """Iterations before which the fake score of an objective starts again."""
    return objective.restarts if isinstance(objective, PhasingObjective) else ()


def first_exit_of(objective: Objective, first_exit: int, purpose: Purpose) -> int:
    """First step that a rollout may leave at, where a loss of their own trains the steps before it.

    The generator's batches leave from there on. So do those that the fake score tracks, unless the
    method is of the family of DMD: its fake score sees what all steps make.

    Args:
        objective: Any objective.
        first_exit: First step that the generator's batches leave at.
        purpose: Use that is made of the rollout.

    Source: the released trainer, whose video DMD draws the fake score's exit steps from the first
    one on, and whose SGMD draws them as it draws the generator's.
    """
    if purpose is Purpose.GENERATE or objective.path is not GradientPath.SAMPLE:
        return first_exit
    return 0


def phases_of(objective: Objective, schedule: FlowMatchSchedule, num_steps: int) -> Phases | None:
    """Phases of an objective's iterations; None where every iteration trains all steps.

    Raises:
        ConfigError: They do not fit the generator's steps.
    """
    if not isinstance(objective, PhasingObjective):
        return None
    return objective.phases(schedule, num_steps)


@runtime_checkable
class CautiousObjective(Protocol):
    """Part of an objective that tells of settings which are allowed and seldom meant."""

    def cautions(self, schedule: FlowMatchSchedule) -> Iterator[str]:
        """Sentences on such settings.

        Args:
            schedule: Noise levels of the generator's steps and of the score queries.
        """
        ...


def cautions_of(objective: Objective, schedule: FlowMatchSchedule) -> tuple[str, ...]:
    """Sentences on settings of an objective that are allowed and seldom meant."""
    return tuple(objective.cautions(schedule)) if isinstance(objective, CautiousObjective) else ()


@runtime_checkable
class WarmingObjective(Protocol):
    """Part of an objective with parts that are not there from the first iteration on."""

    def unreached(self, iterations: int) -> Iterator[str]:
        """Sentences on parts that a run of so many iterations ends before."""
        ...


class ComparedStates(StrEnum):
    """Pairs of states that a discriminator learns to tell apart."""

    STEPS = "steps"
    """One step of the probability-flow equation from the same state, by the teacher and by the fake
    score. The generator's loss then depends on `x0` through the fake score's input as well."""
    DATA = "data"
    """Latents of the data and the generator's samples, noised alike."""


@runtime_checkable
class AdversarialObjective(Protocol):
    """Part of an objective whose generator loss has a term by a discriminator.

    Attributes:
        compared: States that the discriminator compares.
    """

    compared: ClassVar[ComparedStates]

    @property
    def adversary(self) -> AdversarialTerm | None:
        """Losses of the term; None leaves it out."""
        ...


@runtime_checkable
class SteppingObjective(Protocol):
    """Part of an adversarial objective that compares steps."""

    @property
    def delta(self) -> float:
        """Difference of noise levels of a step."""
        ...

    def states(
        self, query: NoisedBatch, velocity_fake: Latents, velocity_teacher: Latents
    ) -> tuple[Latents, Latents]:
        """The real state, a constant, and the fake one with its graph; at sigma - delta."""
        ...


def adversary_of(objective: Objective) -> AdversarialTerm | None:
    """The term by a discriminator in an objective's generator loss; None without one."""
    return objective.adversary if isinstance(objective, AdversarialObjective) else None


def compared_by(objective: Objective) -> ComparedStates | None:
    """States that an objective's discriminator compares; None without a discriminator."""
    if not isinstance(objective, AdversarialObjective) or objective.adversary is None:
        return None
    return objective.compared
