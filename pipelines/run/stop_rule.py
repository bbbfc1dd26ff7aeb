"""The end of a training, by iterations or by time."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopRule:
    """Ends a training after so many iterations, or earlier when its time is over.

    Training time is the sum of the recorded seconds of the iterations, those before a resumption
    included: a resumed run ends where one that was never interrupted ends.

    Attributes:
        num_iterations: Iterations after which the training ends at the latest.
        max_seconds: Training time after which it ends; None sets no limit.
        num_saves: States that are saved at equal distances of `max_seconds`, the last one at the
            end.
    """

    num_iterations: int
    max_seconds: float | None = None
    num_saves: int = 1

    def is_reached(self, num_iterations: int, spent_s: float) -> bool:
        """Returns whether the training ends after so many iterations and seconds."""
        return num_iterations >= self.num_iterations or spent_s >= self._limit_s

    def saves_between(self, before_s: float, after_s: float) -> bool:
        """Returns whether a state is due between two moments of the training time."""
        return self._saves_until(after_s) > self._saves_until(before_s)

    @property
    def _limit_s(self) -> float:
        return math.inf if self.max_seconds is None else self.max_seconds

    def _saves_until(self, spent_s: float) -> int:
        return int(self.num_saves * spent_s / self._limit_s)
