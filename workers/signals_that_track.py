"""Signals of the fake score that accumulate tracking's gradient too, by one backward pass.

    signal    one walk: the gradient at the samples, and the gradient in the parameters
    report    what the same micro-batch's tracking has found, asked for once

The controller calls both as with two backward passes, and knows that the first one gathers.
"""

from dataclasses import dataclass

from torch import nn

from sgmd_core.errors import ConfigError, StaleCallError
from sgmd_core.objectives import GradientPath, LookingObjective, Objective
from sgmd_core.objectives.shuffled import shuffled_teacher
from sgmd_core.types import GeneratorSignal, Latents, MicroBatchKey, NoisedBatch, detached
from workers.checked_losses import VELOCITY_FAKE, VELOCITY_TEACHER, checked_losses
from workers.finite import FiniteChecks
from workers.joint_walk import JointWalk
from workers.reports import TrackReport


@dataclass(slots=True)
class _Walked:
    """A micro-batch whose two gradients were made by one backward pass.

    Attributes:
        generator_version: Updates that the generator had seen.
        share: Share of the iteration that its gradients were weighted by.
        report: Terms of tracking's loss; None if the micro-batch was refused.
    """

    generator_version: int
    share: float
    report: TrackReport | None = None


class SignalsThatTrack:
    """Makes both gradients of each micro-batch, and remembers those that wait for tracking.

    Args:
        network: The fake score's.
        objective: Both losses.
        checks: Checks of the numbers that go in and come out.
        shuffled: Whether samples learn from their neighbours' gap.

    Raises:
        ConfigError: The gradient of the generator's loss does not go through this network alone.
    """

    def __init__(
        self, network: nn.Module, objective: Objective, checks: FiniteChecks, *, shuffled: bool
    ) -> None:
        if objective.path is not GradientPath.FAKE_SCORE or isinstance(objective, LookingObjective):
            raise ConfigError(
                "walking back through the fake score once for two gradients",
                f"the losses of {objective.method}",
                "a loss whose one gradient goes through the fake score",
                "Set fake_score.walk=apart",
            )
        self._network = network
        self._objective = objective
        self._checks = checks
        self._shuffled = shuffled
        self._walked: dict[MicroBatchKey, _Walked] = {}

    @property
    def waiting(self) -> list[MicroBatchKey]:
        """Micro-batches that wait for tracking."""
        return list(self._walked)

    def clear(self) -> None:
        """Forgets all micro-batches that wait for tracking, and their loss terms."""
        self._walked.clear()

    def signal(self, leaf: NoisedBatch, velocity_teacher: Latents, share: float) -> GeneratorSignal:
        """Both gradients by one backward pass: that at the samples, and that in the parameters.

        A gradient at the samples that is not finite, of losses that are, shows when the parameters
        have theirs: where this role raises, the micro-batch then waits for tracking that
        is refused, and the iteration can only be given up.

        Args:
            leaf: The query, its samples a leaf.
            velocity_teacher: The teacher's velocity at it.
            share: Samples in this micro-batch over samples in the iteration.

        Raises:
            StaleCallError: The micro-batch waits for tracking already.
            NonFiniteError: A number that goes in or comes out is not finite.
        """
        if leaf.key in self._walked:
            raise StaleCallError(
                f"scoring {leaf.key}",
                "the gradient of its tracking has been accumulated already",
                "one signal of a micro-batch",
                "Call track, or discard to give the iteration up",
            )
        query = detached(leaf)
        walk = JointWalk(self._network, leaf)
        velocity_fake = walk.velocity
        if self._shuffled:
            velocity_teacher = shuffled_teacher(velocity_fake, velocity_teacher)
        loss = self._objective.generator_loss(leaf, velocity_fake, velocity_teacher)
        tracking = self._objective.tracking_loss(query, velocity_fake)
        predictions = {VELOCITY_FAKE: velocity_fake, VELOCITY_TEACHER: velocity_teacher}
        checks = self._checks
        value, found = checked_losses(checks, tracking.value, tracking, (), query, predictions)
        walked = _Walked(query.generator_version, share)
        self._walked[query.key] = walked
        gradient = walk.back(share * loss.value, share * value)
        grad_x0, metrics = checked_losses(checks, gradient, loss, (gradient,), query, predictions)
        walked.report = TrackReport(metrics=found)
        return GeneratorSignal(
            key=query.key,
            grad_x0=grad_x0,
            generator_version=query.generator_version,
            metrics=metrics,
        )

    def report(self, query: NoisedBatch, share: float) -> TrackReport:
        """The loss terms of a micro-batch whose gradient `signal` has accumulated; waits no longer.

        Args:
            query: Its query.
            share: As `signal` had it.

        Raises:
            StaleCallError: No signal of it was made, with this share, or it was refused.
        """
        walked = self._walked.get(query.key)
        if (
            walked is None
            or walked.report is None
            or (walked.generator_version, walked.share) != (query.generator_version, share)
        ):
            refused = [key for key, each in self._walked.items() if each.report is None]
            raise StaleCallError(
                f"tracking {query.key} of generator version {query.generator_version}, a share of "
                f"{share:.3g}",
                f"the fake score has walked {self.waiting or 'no forward passes'}"
                + (f" and refused {refused}" if refused else ""),
                "a query whose signal was computed in this iteration with this share, and not "
                "tracked yet",
                "Call signal first; with fake_score.walk=joint it makes both gradients",
            )
        del self._walked[query.key]
        return walked.report
