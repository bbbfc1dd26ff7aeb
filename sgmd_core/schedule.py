"""The straight path from data to noise, and where along it we look.

    x_t      = (1 - sigma) * x0 + sigma * noise
    velocity = noise - x0 = d x_t / d sigma
    x0       = x_t - sigma * velocity

Two laws choose noise levels: the few-step grid that the generator samples on, and the score law
that says how noisy the queries are through which teacher and fake score compare its samples. Both
spread equal steps `u` with the same map, `shift_sigma`.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgmd_core.errors import ConfigError
from sgmd_core.types import Latents, PerSample, per_sample

NUM_SCORE_LEVELS = 1000
"""The score law starts from an integer drawn uniformly below this."""

MAX_STEPS = 1000
WHY_MAX_STEPS = "networks tell 1000 noise levels apart, and more steps repeat them"
"""Bound of a sampler's steps, and its reason for errors."""


def shift_sigma(u: Float[Tensor, "*shape"], shift: float) -> Float[Tensor, "*shape"]:
    """Moves noise levels toward pure noise; keeps 0 and 1 where they are.

        sigma = shift * u / (1 + (shift - 1) * u)

    The more pixels a video has, the more noise it takes to hide it, so large videos need a large
    shift. A shift of 1 changes nothing.

    Args:
        u: Noise levels in [0, 1], of any shape.
        shift: Positive; 5 and 8 are usual for Wan at 480p.

    Returns:
        Noise levels in [0, 1], same shape and dtype.
    """
    return shift * u / (1 + (shift - 1) * u)


@dataclass(frozen=True, slots=True)
class RandomSteps:
    """Rollouts of random length, over noise levels that are drawn: a sampler of any steps learns.

    The number of steps is drawn for a whole micro-batch, the levels between for each sample.

    Attributes:
        min_steps: Least number of steps.
        max_steps: Largest number of steps; all between are equally likely.
        sigma_min: Least level that is drawn, before the shift.
        sigma_max: Largest one.
        stratified: Draw one level in each of as many equal parts; false: all independently.
        shifted: Move the drawn levels by the shift of the few-step grid.
        order: `sorted` takes the drawn levels from the largest down; `running_minimum` takes each
            as it comes, or the one before where that is lower.
    """

    min_steps: int = 1
    max_steps: int = 8
    sigma_min: float = 0.02
    sigma_max: float = 0.98
    stratified: bool = False
    shifted: bool = True
    order: Literal["sorted", "running_minimum"] = "sorted"

    def __post_init__(self) -> None:
        if not 1 <= self.min_steps <= self.max_steps <= MAX_STEPS:
            raise ConfigError(
                "reading the lengths of rollouts",
                f"min_steps is {self.min_steps} and max_steps is {self.max_steps}",
                f"1 <= min_steps <= max_steps <= {MAX_STEPS}",
            )
        if not 0 < self.sigma_min < self.sigma_max < 1:
            raise ConfigError(
                "reading the lengths of rollouts",
                f"sigma_min is {self.sigma_min} and sigma_max is {self.sigma_max}",
                "0 < sigma_min < sigma_max < 1",
            )
        if self.order not in ("sorted", "running_minimum"):
            raise ConfigError(
                "reading the lengths of rollouts",
                f"order is {self.order!r}",
                "'sorted' or 'running_minimum'",
            )
        if self.stratified and self.order == "running_minimum":
            raise ConfigError(
                "reading the lengths of rollouts",
                "stratified levels, which rise, and their running minimum: one level repeated",
                "order 'sorted', or stratified false",
            )

    @property
    def mean_steps(self) -> float:
        """Mean number of steps."""
        return (self.min_steps + self.max_steps) / 2

    def grid(self, u: Float[Tensor, "b inner"], shift: float) -> Float[Tensor, "b levels"]:
        """Noise levels of rollouts whose inner levels are drawn.

        Args:
            u: Uniform in [0, 1): one number for each step but the first.
            shift: Shift of the few-step grid.

        Returns:
            Falling levels in float32, computed in float64: 1, the inner ones, 0.

        Source: CDM (arXiv:2605.06376) and its release in the authors' trainer, which stratifies and
        shifts; the running minimum is rCM's (arXiv:2510.08431).
        """
        u = u.double()
        if self.stratified:
            u = (torch.arange(u.shape[1], dtype=u.dtype) + u) / max(1, u.shape[1])
        sigma = self.sigma_min + (self.sigma_max - self.sigma_min) * u
        sigma = shift_sigma(sigma, shift) if self.shifted else sigma
        ends = torch.ones(len(u), 1, dtype=u.dtype)
        if self.order == "sorted" or not sigma.shape[1]:
            inner = sigma.sort(dim=1, descending=True).values
        else:
            inner = sigma.cummin(dim=1).values
        return torch.cat([ends, inner, 0 * ends], dim=1).float()


@dataclass(frozen=True, slots=True)
class FlowMatchSchedule:
    """The path between data and noise, and the noise levels at which we stand on it.

    Stateless: it counts no steps. The fields are the recipe keys below `schedule:`.

    Attributes:
        shift: Shift of the few-step grid.
        score_shift: Shift of the score law; None takes `shift`.
        score_sigma_min: Score noise levels below this are raised to it.
        score_sigma_max: Score noise levels above this are lowered to it. 1 is allowed with the law
            `renoise`.
        score_level_min: Least integer that a score noise level is drawn from, of 1000.
        score_level_max: Integers are drawn below this.
        score_window: Bounds the integers by the exit step of the rollout, instead of by the two
            above: `below` from the level that the step leads to, `above` up to the level that it
            starts from, or `both`.
        steps: Raw levels of the generator's steps in thousandths, falling from 1000 or less; null
            spaces them equally. The generator has to have as many steps; the end at 0 is added, and
            a 0 in the list is a step of its own. The authors' trainer rounds equal
            levels to whole thousandths, which differs where 1000 does not divide: its three steps
            are [1000, 667, 333].
        warp_steps: Moves these levels by the shift, as equally spaced ones are moved.
        score_law: `clamped` takes an integer of 1000 as its thousandth; `renoise` the thousandth
            above it, up to pure noise, as samples are noised off the trajectory.
        renoise: Each step of the generator goes to x0 and adds new noise to it, as consistency
            models are sampled; false: along its velocity. Samplers with guidance ignore it.
    """

    shift: float = 5.0
    score_shift: float | None = None
    score_sigma_min: float = 0.02
    score_sigma_max: float = 0.98
    score_level_min: int = 0
    score_level_max: int = NUM_SCORE_LEVELS
    score_window: Literal["none", "below", "above", "both"] = "none"
    steps: tuple[int, ...] | None = None
    warp_steps: bool = True
    score_law: Literal["clamped", "renoise"] = "clamped"
    renoise: bool = False

    def __post_init__(self) -> None:
        self._require_levels()
        for name, shift in (("shift", self.shift), ("score_shift", self.score_shift)):
            if shift is not None and not (math.isfinite(shift) and shift > 0):
                raise ConfigError(
                    "reading the noise schedule",
                    f"{name} is {shift}",
                    "a positive number",
                    "1 leaves the noise levels equally spaced, 5 is usual for Wan at 480p",
                )
        self._require_score_law()

    def _require_score_law(self) -> None:
        attempted = "reading the noise schedule"
        if self.score_law not in ("clamped", "renoise"):
            found = f"score_law is {self.score_law!r}"
            raise ConfigError(attempted, found, "'clamped' or 'renoise'")
        low, high, renoised = (
            self.score_sigma_min,
            self.score_sigma_max,
            self.score_law == "renoise",
        )
        if not (0 < low <= high <= 1 and (high < 1 or renoised)):
            raise ConfigError(
                attempted,
                f"score_sigma_min is {low} and score_sigma_max is {high}",
                f"0 < score_sigma_min <= score_sigma_max {'<=' if renoised else '<'} 1",
                "At 0 a score has no noise to remove, at 1 it sees nothing of the sample; only "
                "score_law renoise goes up to 1",
            )

    def _require_levels(self) -> None:
        attempted = "reading the noise schedule"
        if not 0 <= self.score_level_min < self.score_level_max <= NUM_SCORE_LEVELS:
            raise ConfigError(
                attempted,
                f"score_level_min is {self.score_level_min} and score_level_max is "
                f"{self.score_level_max}",
                f"0 <= score_level_min < score_level_max <= {NUM_SCORE_LEVELS}",
            )
        windows = ("none", "below", "above", "both")
        if self.score_window not in windows:
            raise ConfigError(
                attempted, f"score_window is {self.score_window!r}", f"one of {windows}"
            )
        steps = self.steps
        if steps is None:
            return
        falls = all(0 <= after < before for before, after in pairwise(steps))
        if not steps or not 0 < steps[0] <= NUM_SCORE_LEVELS or not falls:
            raise ConfigError(
                attempted,
                f"steps is {list(steps)}",
                "whole numbers that fall from at most 1000 to at least 0, the first above 0",
                "For example [1000, 750, 500, 250]; the end at 0 is added",
            )

    def interpolate(self, x0: Latents, noise: Latents, sigma: PerSample) -> Latents:
        """Noises latents: x_t = (1 - sigma) * x0 + sigma * noise."""
        level = per_sample(sigma, x0)
        return (1 - level) * x0 + level * noise

    def x0_from_velocity(self, x_t: Latents, velocity: Latents, sigma: PerSample) -> Latents:
        """Clean latents at the data end of a straight line: x0 = x_t - sigma * velocity."""
        return x_t - per_sample(sigma, x_t) * velocity

    def velocity_from_x0(self, x_t: Latents, x0: Latents, sigma: PerSample) -> Latents:
        """Velocity of the line from `x0` through `x_t`: (x_t - x0) / sigma.

        Loses digits as sigma falls, because it subtracts two nearly equal tensors; losses
        therefore never leave velocity space to come back through here. `sigma` must not be 0.
        """
        return (x_t - x0) / per_sample(sigma, x_t)

    def few_step_grid(self, num_steps: int) -> Float[Tensor, " {num_steps}+1"]:
        """Noise levels of an Euler sampler, from pure noise to data.

            sigma_i = shift_sigma(1 - i / num_steps),  i = 0 .. num_steps

        Four steps with shift 5 give 1, 0.9375, 0.8333, 0.625 and 0; with shift 8 they give 1,
        0.96, 0.8889, 0.7273 and 0.

        Args:
            num_steps: Network passes of the sampler, from 1 to `MAX_STEPS`.

        Returns:
            Falling noise levels (num_steps + 1,) in float32, computed in float64; first 1, last 0.

        Raises:
            ConfigError: `num_steps` is out of range.
        """
        if not 1 <= num_steps <= MAX_STEPS:
            raise ConfigError(
                "laying out the sampler's noise levels",
                f"{num_steps} steps",
                "at least 1 step" if num_steps < 1 else f"at most {MAX_STEPS}: {WHY_MAX_STEPS}",
            )
        u = 1 - torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        return shift_sigma(u, self.shift).float()

    def renoise_sigma(self, u: Int[Tensor, " b"]) -> PerSample:
        """Noise level off the trajectory, from an integer drawn uniformly in 0 .. 999.

            sigma = max(shift_sigma((u + 1) / 1000, score_shift), score_sigma_min)

        Unlike `score_sigma` it reaches pure noise.

        Args:
            u: Integers in [0, NUM_SCORE_LEVELS).

        Returns:
            Noise levels (b,) in float32, computed in float64.

        Source: the law by which the released trainer noises samples again, where a uniform number
        is rounded up to a thousandth.
        """
        shift = self.shift if self.score_shift is None else self.score_shift
        sigma = shift_sigma((u.double() + 1) / NUM_SCORE_LEVELS, shift)
        return sigma.clamp_min(self.score_sigma_min).float()

    def generator_grid(self, num_steps: int) -> Float[Tensor, " {num_steps}+1"]:
        """Noise levels of the generator's own steps: those of `steps`, or equally spaced ones.

            sigma_i = shift_sigma(steps_i / 1000), or steps_i / 1000 where they are not warped

        Args:
            num_steps: Network passes of the generator.

        Returns:
            As `few_step_grid`, whose levels [1000, 750, 500, 250] give back.

        Raises:
            ConfigError: `steps` are of another number.

        Source: `denoising_step_list` and `warp_denoising_step` of the released trainer.
        """
        if self.steps is None:
            return self.few_step_grid(num_steps)
        if len(self.steps) != num_steps:
            raise ConfigError(
                "laying out the generator's noise levels",
                f"schedule.steps with {len(self.steps)} levels for {num_steps} steps",
                "a level for each step",
                "Set generator.num_steps to their number, or schedule.steps to null",
            )
        u = torch.tensor([*self.steps, 0], dtype=torch.float64) / NUM_SCORE_LEVELS
        return (shift_sigma(u, self.shift) if self.warp_steps else u).float()

    def sampling_grid(
        self, num_steps: int, guidance_scale: float
    ) -> Float[Tensor, " {num_steps}+1"]:
        """Noise levels of a sampler: those of `steps` for as many unguided steps, or equal ones.

        Args:
            num_steps: Network passes of the sampler.
            guidance_scale: Of the sampler; a few-step generator has 1.
        """
        listed = self.steps is not None and len(self.steps) == num_steps and guidance_scale == 1
        return self.generator_grid(num_steps) if listed else self.few_step_grid(num_steps)

    def renoises(self, guidance_scale: float) -> bool:
        """Returns True if a sampler of this guidance scale renoises."""
        return self.renoise and guidance_scale == 1

    def raw_steps(self, num_steps: int) -> list[int]:
        """Raw levels of the generator's steps in thousandths, with the end at 0."""
        steps = self.steps or [round(1000 * (1 - step / num_steps)) for step in range(num_steps)]
        return [*steps, 0]

    def table_sigma(self, u: Int[Tensor, " b"]) -> PerSample:
        """Noise level of a raw level: moved by the shift of the steps, and not clamped.

        Args:
            u: Raw levels in thousandths.
        """
        return shift_sigma(u.double() / NUM_SCORE_LEVELS, self.shift).float()

    def raw_level(self, sigma: float) -> int:
        """The integer of 1000 whose shifted level is nearest to a noise level."""
        levels = torch.arange(NUM_SCORE_LEVELS + 1, dtype=torch.float64) / NUM_SCORE_LEVELS
        return int((shift_sigma(levels, self.shift) - sigma).abs().argmin())

    def score_levels(
        self, grid: Float[Tensor, " levels"] | None = None, exit_step: int = 0
    ) -> tuple[int, int]:
        """Range of the integers that score levels are drawn from: first, and one past the last.

        Args:
            grid: Noise levels of the rollout; None where its exit step does not matter.
            exit_step: Step at which the rollout leaves.

        Source: `ts_schedule` (below), `ts_schedule_max` (above) and `min_score_timestep` of the
        released trainer, whose window of an exit step is between its two raw levels.
        """
        low, high = self.score_level_min, self.score_level_max
        if grid is not None and self.score_window in ("below", "both"):
            low = self.raw_level(float(grid[exit_step + 1]))
        if grid is not None and self.score_window in ("above", "both"):
            high = self.raw_level(float(grid[exit_step]))
        return low, high if high > low else min(NUM_SCORE_LEVELS, low + 1)

    def score_sigma(self, u: Int[Tensor, " b"]) -> PerSample:
        """Noise level of a score query, from an integer drawn uniformly in 0 .. 999.

            sigma = clamp(shift_sigma(u / 1000, score_shift), score_sigma_min, score_sigma_max)

        The clamp gathers draws at its ends: with shift 5 and the default limits 9.2 % of all
        queries sit at exactly 0.98 and 0.5 % at 0.02, and the mean is 0.746. With `score_law`
        renoise, (u + 1) / 1000 stands for u / 1000.

        Args:
            u: Integers in [0, NUM_SCORE_LEVELS).

        Returns:
            Noise levels (b,) in float32, computed in float64.

        Source: the authors' released trainer, whose video training has the law `clamped` and whose
        image training has `renoise` up to 1; the paper's law is not known to us.
        """
        if self.score_law == "renoise":
            return self.renoise_sigma(u).clamp_max(self.score_sigma_max)
        shift = self.shift if self.score_shift is None else self.score_shift
        sigma = shift_sigma(u.double() / NUM_SCORE_LEVELS, shift)
        return sigma.clamp(self.score_sigma_min, self.score_sigma_max).float()
