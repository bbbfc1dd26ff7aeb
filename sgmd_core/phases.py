"""Training in phases: which steps of the generator an iteration trains, and where it is judged.

                 exit steps      queries from      score levels (raw, of 1000)
    high phase   0 .. p - 1      x_s at sigma_p    boundary + margin .. last_level
    low phase    p .. n - 1      x0                first_level .. last_level

    in turns     even iterations high, odd ones low; the generator's queries of the low phase take
                 turns too: its 1st, 3rd, ... iteration has the levels of the high phase, the others
                 those below the boundary; the fake score learns at all of them

p is the step that starts at the boundary. The generator learns from a random exit step, the fake
score from the end of the phase: the state that the last step of the phase leads to.

A run that trains one expert of two alone is one phase for good, `expert_phases`: exit steps and
score levels are those of its noise levels, queries are at x0, and levels follow the score law.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from sgmd_core.errors import ConfigError
from sgmd_core.schedule import NUM_SCORE_LEVELS, FlowMatchSchedule
from sgmd_core.types import Purpose

PhaseOrder = Literal["sequential", "alternate"]
Expert = Literal["high", "low"]
"""An expert of two by its noise levels: from the boundary to 1, or below it."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase, as a micro-batch sees it.

    Attributes:
        first_exit: First step that a rollout may leave at.
        end: One past the last such step; the step that the phase's last state is the start of.
        levels: Raw levels of the generator's queries: the first, and one past the last.
        tracked_levels: Those of the fake score's batches.
        anchored: The state at step `end` is what is judged, not clean latents.
        is_expert: An expert that is trained alone: the fake score learns from random exit steps,
            too, and the score law makes noise levels of the raw ones.
    """

    first_exit: int
    end: int
    levels: tuple[int, int]
    tracked_levels: tuple[int, int]
    anchored: bool
    is_expert: bool = False

    def first_exit_for(self, purpose: Purpose) -> int:
        """First exit step of a batch: those of the fake score go to the phase's end."""
        at_random = self.is_expert or purpose is Purpose.GENERATE
        return self.first_exit if at_random else self.end - 1

    def levels_for(self, purpose: Purpose) -> tuple[int, int]:
        """Raw score levels of a batch: the first, and one past the last."""
        return self.levels if purpose is Purpose.GENERATE else self.tracked_levels


@dataclass(frozen=True, slots=True)
class Phases:
    """Phases of all iterations.

    Attributes:
        high: The high-noise phase.
        low: The low-noise phase; in turns, its iterations below the boundary.
        low_above: Its iterations above the boundary, in turns.
        order: Whether one follows the other, or they take turns.
        high_iterations: Iterations before the low phase begins, where one follows the other.
    """

    high: Phase
    low: Phase
    low_above: Phase
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
        levels: tuple[int, int],
        order: PhaseOrder,
        high_iterations: int,
    ) -> "Phases":
        """Lays phases over the generator's steps.

        Args:
            schedule: Noise levels of the steps.
            num_steps: How many there are.
            boundary: Raw level at which the high phase ends.
            margin: Raw levels above it that are not looked at.
            levels: Least and largest raw score level, whatever the phase.
            order: See the class.
            high_iterations: See the class.

        Raises:
            ConfigError: The boundary is not an inner step of the grid.
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
        step, first, stop = raw.index(boundary), levels[0], levels[1] + 1
        above, every = (boundary + margin, stop), (first, stop)
        below = every if order == "sequential" else (first, boundary)
        return cls(
            high=Phase(0, step, above, above, anchored=True),
            low=Phase(step, num_steps, below, every, anchored=False),
            low_above=Phase(step, num_steps, above, every, anchored=False),
            order=order,
            high_iterations=high_iterations,
        )

    def at(self, iteration: int) -> Phase:
        """The phase of an iteration."""
        if self.order == "sequential":
            return self.high if iteration < self.high_iterations else self.low
        return (self.high, self.low_above, self.high, self.low)[iteration % 4]

    def high_share(self, iterations: int) -> float:
        """Share of a run's iterations that are of the high phase, which has the first step.

        Args:
            iterations: Length of the run.
        """
        if self.high is self.low:
            return float(not self.high.first_exit)
        return 0.5 if self.order == "alternate" else min(1.0, self.high_iterations / iterations)

    def mean_length(self, purpose: Purpose, iterations: int, first_exit: int = 0) -> float:
        """Mean passes of a rollout over a run.

        Args:
            purpose: Whose samples it makes.
            iterations: Length of the run.
            first_exit: First step that any rollout may leave at.
        """
        share = self.high_share(iterations)
        high, low = (
            (max(first_exit, phase.first_exit_for(purpose)) + 1 + phase.end) / 2
            for phase in (self.high, self.low)
        )
        return share * high + (1 - share) * low


def expert_phases(
    schedule: FlowMatchSchedule, num_steps: int, boundary: float, expert: Expert
) -> Phases:
    """The one phase of a run that trains one expert of two alone.

    Args:
        schedule: Noise levels of the steps and of the score queries.
        num_steps: Steps of the generator.
        boundary: Noise level that the experts change at; the high one has it.
        expert: Which of them is trained.

    Raises:
        ConfigError: No step of the generator, or no score level, is the expert's.
    """
    levels = [round(float(sigma), 4) for sigma in schedule.generator_grid(num_steps)[:-1]]
    first_low = int((schedule.generator_grid(num_steps)[:-1] >= boundary).sum())
    first, end = (0, first_low) if expert == "high" else (first_low, num_steps)
    attempted = f"laying the generator's steps over the {expert}-noise expert"
    of_it = f"{'from' if expert == 'high' else 'below'} model.boundary {boundary:g}"
    if first >= end:
        raise ConfigError(
            attempted,
            f"steps that start at {levels}, and none of them {of_it}",
            "a step among the expert's noise levels",
            "Set schedule.steps or generator.num_steps so that there is one, or train the other "
            "expert: model.expert",
        )
    raw = torch.arange(NUM_SCORE_LEVELS)[slice(*schedule.score_levels())]
    high = schedule.score_sigma(raw) >= boundary
    own: list[int] = raw[high if expert == "high" else ~high].tolist()  # pyright: ignore
    if not own:
        sigma = schedule.score_sigma(raw)
        raise ConfigError(
            attempted,
            f"score levels from {sigma.min():.4g} to {sigma.max():.4g}, and none of them {of_it}",
            "a score level among the expert's noise levels",
            "Widen schedule.score_level_min and score_level_max, or score_sigma_min and "
            "score_sigma_max",
        )
    span = own[0], own[-1] + 1
    phase = Phase(first, end, span, span, anchored=False, is_expert=True)
    return Phases(phase, phase, phase, order="alternate", high_iterations=1)
