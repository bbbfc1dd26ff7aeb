"""Extra updates of the fake score that are taken back: what a measurement of its lag asks for.

    held_loss(query), ...                         loss of the weights as they are
    begin_extra(iteration)                        a copy of the state is kept in main memory
      extra_track(query), ...  extra_step(rate)   once or several times; none of them counts
      held_loss(query), ...                       loss of the weights after them
    end_extra()                                   back to the copy, bit for bit

The network itself is trained and put back, rather than a second one: no rank needs memory on its
device for another network, and sharded ranks go through the collectives that they know.
"""

from abc import abstractmethod

import torch

from sgmd_core.errors import StaleCallError
from sgmd_core.objectives import Objective
from sgmd_core.types import NoisedBatch, Scalar, detached
from workers.placement import device_of, query_on
from workers.reports import TrackReport
from workers.saving import LearningRole
from workers.snapshots import RoleSnapshot

HELD = "held"
"""Name of the loss in the reports."""


class ExtraUpdates(LearningRole):
    """Part of a role that tracks: updates that leave no trace."""

    _objective: Objective

    def __init__(self) -> None:
        super().__init__()
        self._before: RoleSnapshot | None = None

    @property
    @abstractmethod
    def forwards_kept(self) -> int:
        """Forward passes whose graph waits for tracking."""

    def held_loss(self, query: NoisedBatch) -> TrackReport:
        """Tracking loss of the present weights; gathers nothing.

        Args:
            query: Any query.

        Returns:
            The loss, a mean over the samples of the query; perhaps not finite.
        """
        with torch.no_grad():
            return TrackReport(metrics={HELD: self._loss(query).item()})

    def begin_extra(self, iteration: int) -> None:
        """Keeps a copy of the state, which `end_extra` goes back to.

        Args:
            iteration: The iteration that comes next.

        Raises:
            StaleCallError: Another iteration is next, or one is under way.
        """
        attempted = f"beginning extra updates before iteration {iteration}"
        self._optimizer.require_current(iteration, attempted)
        if self.forwards_kept or self._before is not None:
            raise StaleCallError(
                f"{attempted} on the fake score",
                "forward passes that were not tracked"
                if self.forwards_kept
                else "other extra updates that were not taken back",
                "a fake score between two iterations",
                "Call discard to give up what is under way",
            )
        self._before = self._optimizer.snapshot()

    def extra_track(self, query: NoisedBatch, share: float) -> TrackReport:
        """Gathers the gradient of the tracking loss in the parameters, for an extra update.

        Args:
            query: Any query.
            share: Samples in this micro-batch over samples of the update.

        Raises:
            StaleCallError: No extra updates were begun.
        """
        self._require_begun("tracking a micro-batch for an extra update")
        loss = self._loss(query)
        (share * loss).backward()
        return TrackReport(metrics={HELD: loss.item()})

    def extra_step(self, rate: float) -> None:
        """Updates the weights with the gradient that `extra_track` has accumulated.

        Args:
            rate: Multiple of the present learning rate.

        Raises:
            StaleCallError: No extra updates were begun.
        """
        self._require_begun("making an extra update")
        self._optimizer.extra_step(rate)

    def end_extra(self) -> None:
        """Goes back to the state before `begin_extra`, bit for bit; does nothing without one."""
        if self._before is not None:
            self._optimizer.restore(self._before)
            self._before = None

    def _loss(self, query: NoisedBatch) -> Scalar:
        constant = detached(query_on(query, device_of(self._network)))
        velocity_fake = self._network(constant.x_t, constant.sigma, constant.text)
        return self._objective.tracking_loss(constant, velocity_fake).value

    def _require_begun(self, attempted: str) -> None:
        if self._before is None:
            raise StaleCallError(
                f"{attempted} on the fake score",
                "nothing that it could be taken back to",
                "extra updates between begin_extra and end_extra",
            )
