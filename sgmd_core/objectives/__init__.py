"""What the two learners minimise; one paper, one file.

An objective is mathematics over predictions: it never holds or calls a network. Whoever calls it
decides whose parameters receive the gradient.
"""

from typing import Protocol

from sgmd_core.types import Latents, Loss, NoisedBatch


class Objective(Protocol):
    """A pair of losses over the same score query."""

    def generator_loss(
        self, query: NoisedBatch, velocity_fake: Latents, velocity_teacher: Latents
    ) -> Loss:
        """Loss of the generator, differentiable with respect to `query.x0` alone.

        Args:
            query: The generator's sample and the noise it is looked at through. To ask for the
                gradient, let `x0` be a leaf that requires one.
            velocity_fake: Fake score's prediction at `query.x_t`, with its graph back to `x0`.
            velocity_teacher: Guided teacher's prediction there; a constant.

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
