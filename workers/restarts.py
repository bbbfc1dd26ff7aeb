"""Restarts of the fake score: before some phases of a method it begins again."""

from sgmd_core.objectives import Objective, restarts_of
from workers.optimizer import RoleOptimizer


class Restarts:
    """Brings the weights that the role was built with back, before each phase that begins again.

    Args:
        optimizer: Whose weights they are; nothing has been loaded into it yet.
        objective: Says before which iterations.
    """

    def __init__(self, optimizer: RoleOptimizer, objective: Objective) -> None:
        self._optimizer = optimizer
        self._iterations = restarts_of(objective)
        self._start = optimizer.snapshot() if self._iterations else None
        self._last: int | None = None

    def before(self, iteration: int) -> None:
        """Goes back to the first weights, without moments, where an iteration begins again."""
        if self._start is None or iteration not in self._iterations:
            return
        if self._last != iteration:
            self._optimizer.restart(self._start)
            self._last = iteration

    def forget(self) -> None:
        """Begins again once more in the present iteration: another state has been loaded."""
        self._last = None
