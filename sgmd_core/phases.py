"""Training in phases: which steps of the generator an iteration trains, and where it is judged.

                 exit steps      queries from      score levels (raw, of 1000)
    high phase   0 .. p - 1      x_s at sigma_p    boundary + margin .. 980
    low phase    p .. n - 1      x0                margin .. 980, or below the boundary

p is the step that starts at the boundary. The generator learns from a random exit step, the fake
score from the end of the phase: the state that the last step of the phase leads to.
"""

from dataclasses import dataclass
from typing import Literal

from sgmd_core.errors import ConfigError
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.types import Purpose

PhaseOrder = Literal["sequential", "alternate"]

_FIRST_LEVEL, _LAST_LEVEL = 20, 980
"""Least and largest raw score level, whatever the phase."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase, as a micro-batch sees it.

    Attributes:
        first_exit: First step that a rollout may leave at.
        end: One past the last such step; the step that the phase's last state is the start of.
        levels: Raw score levels: the first, and one past the last.
        anchored: The state at step `end` is what is judged, not clean latents.
    """

    first_exit: int
    end: int
    levels: tuple[int, int]
    anchored: bool

    def first_exit_for(self, purpose: Purpose) -> int:
        """First exit step of a batch: those of the fake score go to the phase's end."""
        return self.first_exit if purpose is Purpose.GENERATE else self.end - 1


@dataclass(frozen=True, slots=True)
class Phases:
    """Phases of all iterations.

    Attributes:
        high: The high-noise phase.
        low: The low-noise phase.
        order: Whether one follows the other, or they take turns.
        high_iterations: Iterations before the low phase begins, where one follows the other.
    """

    high: Phase
    low: Phase
    order: PhaseOrder
    high_iterations: int

    @classmethod
    def of(
        cls,
        schedule: FlowMatchSchedule,
        num_steps: int,
        *,
        boundary: int,
        margin: int,
        order: PhaseOrder,
        high_iterations: int,
    ) -> "Phases":
        """Lays phases over the generator's steps.

        Args:
            schedule: Noise levels of the steps.
            num_steps: How many there are.
            boundary: Raw level at which the high phase ends.
            margin: Raw levels above it that are not looked at.
            order: See the class.
            high_iterations: See the class.

        Raises:
            ConfigError: The boundary is no inner step of the grid.
        """
        raw = schedule.raw_steps(num_steps)
        if boundary not in raw[1:-1]:
            raise ConfigError(
                "laying phases over the generator's steps",
                f"objective.boundary {boundary}, which no step starts at: they start at "
                f"{raw[:-1]} of 1000",
                f"one of {raw[1:-1]}",
                "Set objective.boundary, or generator.num_steps and schedule.steps, so that it is",
            )
        step, stop = raw.index(boundary), _LAST_LEVEL + 1
        low_stop = stop if order == "sequential" else boundary
        return cls(
            high=Phase(0, step, (max(boundary + margin, _FIRST_LEVEL), stop), anchored=True),
            low=Phase(step, num_steps, (_FIRST_LEVEL, low_stop), anchored=False),
            order=order,
            high_iterations=high_iterations,
        )

    def at(self, iteration: int) -> Phase:
        """The phase of an iteration."""
        is_high = (
            iteration % 2 == 0 if self.order == "alternate" else (iteration < self.high_iterations)
        )
        return self.high if is_high else self.low

    def mean_length(self, purpose: Purpose, iterations: int) -> float:
        """Mean passes of a rollout over a run.

        Args:
            purpose: Whose samples it makes.
            iterations: Length of the run.
        """
        share = 0.5
        if self.order == "sequential":
            share = min(1.0, self.high_iterations / iterations)
        lengths = [
            (phase.first_exit_for(purpose) + 1 + phase.end) / 2 for phase in (self.high, self.low)
        ]
        return share * lengths[0] + (1 - share) * lengths[1]
