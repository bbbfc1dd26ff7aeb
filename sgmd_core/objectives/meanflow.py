"""MeanFlow on the inner flow of a transition: the head learns strides, on latents of the data.

    y = noise - x0,  y_s = (1 - s) y + s y_1,  v = y_1 - y
    u = k(s) (y_s - h(y_s, s, r)), see `inner_flow`
    target = sg[v - (s - r) du/ds],  du/ds along (v, 1) in (y_s, s) with r and the backbone fixed
    L = mean |u - target|^2 / sg(mean |u - target|^2 + offset)       each sample, then mean of these

With a guidance of w above 1, v is the guided velocity of the inner path, along which the derivative
goes as well:

    v = w (y_1 - y) + (1 - w) u(y_s, s, s | negative prompt)

At r = s this is flow matching of the inner path. The derivative is a difference over 2 x 0.005 in
the head's own level alone, central, or one-sided where an end would leave the stride. The head's
embedding of s has low frequencies, so the difference has its digits; one of a noise level, which a
network sees as 1000 radians, would have none.

Source: TMD (arXiv:2601.09881), stage 1, whose offset is 1 for Wan 1.3B and 1e-5 for 14B in means
over elements, and whose guidance is 3; form of the guided velocity: MeanFlow (arXiv:2505.13447).
It is off by default: data of a guided teacher have it already.
"""

import math
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch

from sgmd_core.errors import ConfigError
from sgmd_core.inner_flow import InnerGrid, average_velocity, inner_state
from sgmd_core.objectives.settings import require_number
from sgmd_core.schedule import shift_sigma
from sgmd_core.types import Latents, Loss, PerSample, per_sample

DELTA = 5e-3
"""Half of the distance that the derivative in s is taken over."""


@dataclass(frozen=True, slots=True)
class Strides:
    """Points of inner paths that a batch looks at, and what they reach for.

    Attributes:
        y: Sample of the outer velocity: the end of the path.
        inner_noise: y_1, the start of the path.
        s: Level that each stride starts at.
        r: Level that it leads to.
        guided: Velocity in the place of the path's own; None: without guidance.
    """

    y: Latents
    inner_noise: Latents
    s: PerSample
    r: PerSample
    guided: Latents | None = None

    @property
    def velocity(self) -> Latents:
        """Velocity v of the path."""
        return self.inner_noise - self.y if self.guided is None else self.guided

    @property
    def ends(self) -> tuple[PerSample, PerSample]:
        """Levels that the derivative is taken between: below and above s, or s itself."""
        below = torch.maximum(self.s - DELTA, torch.where(self.r < self.s, self.r, 0.0))
        return below.clamp_min(0.0), (self.s + DELTA).clamp_max(1.0)

    def at(self, level: PerSample) -> Latents:
        """States of the paths at a level; with guidance, along v from the state at s."""
        if self.guided is None:
            return inner_state(self.y, self.inner_noise, level)
        start = inner_state(self.y, self.inner_noise, self.s)
        return start + per_sample(level - self.s, start) * self.guided

    @property
    def states(self) -> tuple[Latents, Latents, Latents]:
        """States that a head is asked at: at s, below and above."""
        below, above = self.ends
        return self.at(self.s), self.at(below), self.at(above)

    def guided_by(self, scale: float, head: Latents) -> "Strides":
        """The same strides with a guided velocity.

        Args:
            scale: Guidance scale w.
            head: The head's answer at s for strides of no length under the negative prompt.
        """
        own, unguided = self.velocity, average_velocity(self.at(self.s), head.detach(), self.s)
        return replace(self, guided=scale * own + (1 - scale) * unguided)


@dataclass(frozen=True, slots=True)
class MeanFlowTerm:
    """The term in a generator's loss.

    Attributes:
        weight: Weight of the term.
        instant_share: Share of samples with r = s; those of the others reach down to the next
            level of the inner grid.
        shift: Moves s, uniform otherwise, toward 1.
        offset: Added to a sample's mean squared error where the loss is divided by it.
        guidance: Scale of the guided velocity; 1 leaves it out. The paper has 3, with a tenth of
            the captions dropped (`data.prompt_dropout`).
    """

    weight: float = 1.0
    instant_share: float = 0.75
    shift: float = 3.0
    offset: float = 1.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        for name in ("weight", "shift", "offset"):
            require_number(f"meanflow.{name}", getattr(self, name), zero_allowed=False)
        if not (math.isfinite(self.guidance) and self.guidance >= 1):
            raise ConfigError(
                "reading the objective",
                f"meanflow.guidance is {self.guidance}",
                "a scale of at least 1",
            )
        if not 0 <= self.instant_share <= 1:
            raise ConfigError(
                "reading the objective",
                f"meanflow.instant_share is {self.instant_share}",
                "a share from 0 to 1",
            )

    def levels(
        self, uniform: PerSample, choice: PerSample, grid: InnerGrid
    ) -> tuple[PerSample, PerSample]:
        """Levels s and r of strides.

        Args:
            uniform: Uniform numbers in [0, 1], which s is made of.
            choice: Uniform numbers that say which strides have a length.
            grid: Levels of the inner flow.

        Returns:
            s, and r at most s.
        """
        s = shift_sigma(uniform, self.shift)
        levels = grid.to(s)
        # The largest level that is not above s; the grid falls, and ends at 0.
        next_level = torch.where(levels <= s[:, None], levels, 0.0).amax(dim=1)
        return s, torch.where(choice < self.instant_share, s, next_level)

    def loss(self, strides: Strides, head: Latents, below: Latents, above: Latents) -> Loss:
        """The term, its weight included.

        Args:
            strides: Where the batch looks.
            head: The head's answer at s, with its graph.
            below: Its answer at the lower end of the derivative; a constant.
            above: Its answer at the upper end; a constant.

        Returns:
            The loss, and its detached terms: `meanflow`, the mean squared error before it is
            normalised, and `stride_norm`, the root mean square of (s - r) du/ds.
        """
        low, high = strides.ends
        slower, faster = (
            average_velocity(strides.at(level), answer.detach(), level)
            for level, answer in ((low, below), (high, above))
        )
        derivative = (faster - slower) / per_sample(high - low, faster)
        moved = per_sample(strides.s - strides.r, derivative) * derivative
        velocity = average_velocity(strides.at(strides.s), head, strides.s)
        error = (velocity - (strides.velocity - moved)).square().flatten(1).mean(dim=1)
        value = (error / (error.detach() + self.offset)).mean()
        terms = {"meanflow": error.mean().detach(), "stride_norm": moved.square().mean().sqrt()}
        return Loss(self.weight * value, terms)


@runtime_checkable
class FlowObjective(Protocol):
    """Part of an objective whose generator learns the strides of its flow head on data."""

    @property
    def flow(self) -> MeanFlowTerm | None:
        """The term; None leaves it out."""
        ...


def flow_of(objective: object) -> MeanFlowTerm | None:
    """The MeanFlow term of an objective; None without one."""
    return objective.flow if isinstance(objective, FlowObjective) else None


def flow_is_guided(objective: object) -> bool:
    """True if strides are learned along guided velocities, which takes one more pass."""
    term = flow_of(objective)
    return term is not None and term.guidance != 1
