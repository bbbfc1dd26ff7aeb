"""The inner flow of a transition: a few steps from noise to one sample of the outer velocity.

    outer   x_t = (1 - sigma) x0 + sigma noise         y = noise - x0, many of them for one x_t
    inner   y_s = (1 - s) y + s y_1                    y_1 standard normal, s from 1 to 0
            u(y_s, s, r) = k(s) (y_s - h(y_s, s, r))   average velocity from s down to r
            y_r = y_s - (s - r) u                      one stride
            k(s) = 1 / s from s = 1/2 on, so that y_r = (r / s) y_s + (1 - r / s) h;
                   4 (1 - s) below, its tangent there

A velocity model answers with the mean of y. A transition answers with a sample of y: a backbone
looks at x_t once, and a head h goes the inner steps. From s = 1/2 on, the head at r = s is the mean
of y given y_s and x_t, and over a stride to 0 it is the sample itself. A head that ignores y_s
leads to its own answer if all steps start there, which is how a transition starts as the velocity
model that it is made of. Below, k stays finite: with 1 / s down to 0 nothing would hold the strides
to 0, because h + constant solves their equation as well as h does.

TMD is printed with u = y_1 - h, where y_1 is the noise that the path started from, and with
y_r = y_s + (s - r) u. The sign clashes with its identity u + (s - r) du/ds = y_1 - y. And y_1 is
not known from y_s: a head that fits that form is the mean of y along the path and not where the
path ends, so a sample of one stride keeps 0.62 of the spread (y ~ N(0, 1)). Here it keeps all.

Source: TMD (arXiv:2601.09881), with these two changes; MeanFlow (arXiv:2505.13447).
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sgmd_core.errors import ConfigError
from sgmd_core.schedule import shift_sigma
from sgmd_core.seeds import derived_noise
from sgmd_core.types import Latents, PerSample, Text, per_sample
from sgmd_core.velocity import VelocityModel

InnerGrid = Float[Tensor, " levels"]
"""Falling inner levels, from 1 to 0."""
InnerHead = Callable[[Latents, PerSample, PerSample], Latents]
"""(y_s, s, r) -> h, for one state of the backbone."""

_STRAIGHT_FROM = 0.5
"""Inner level from which on k is 1 / s."""
_INNER = 1
"""Counter of inner noise among the draws that are made from a clip's initial noise."""


# Checkable because the shape hook of the tests checks every argument against its annotation.
@runtime_checkable
class TransitionModel(Protocol):
    """A velocity model whose answer is a sample, made from noise that it is given.

    Attributes:
        inner_steps: Steps of its inner flow.
    """

    inner_steps: int

    def __call__(
        self, x_t: Latents, sigma: PerSample, text: Text, inner_noise: Latents, /
    ) -> Latents:
        """Sample of the velocity at `x_t`."""
        ...


def model_at_step(
    model: VelocityModel | TransitionModel, initial_noise: Latents, step: int
) -> VelocityModel:
    """A model as a velocity model at one outer step of a rollout.

    The inner noise of a transition is drawn from the rollout's initial noise and the number of the
    step, so that it depends on nothing that ranks or placements compute differently.

    Args:
        model: A velocity model, which is returned as it is, or a transition.
        initial_noise: Noise that the rollout started from.
        step: Number of the outer step.
    """
    if not isinstance(model, TransitionModel):
        return model
    noise = derived_noise(initial_noise, step, _INNER)

    def transition(x_t: Latents, sigma: PerSample, text: Text, /) -> Latents:
        # Guidance asks for two predictions in one batch, which share their noise.
        repeated = noise.repeat(len(x_t) // len(noise), *(1,) * (noise.dim() - 1))
        return model(x_t, sigma, text, repeated)

    return transition


def inner_grid(num_steps: int, shift: float) -> InnerGrid:
    """Inner levels: equal steps from 1 to 0, moved by a shift of their own.

    Args:
        num_steps: Steps of the inner flow.
        shift: Positive; 10 in the paper.

    Raises:
        ConfigError: There is no step, or the shift is not positive.
    """
    if num_steps < 1 or not shift > 0:
        raise ConfigError(
            "laying out an inner flow",
            f"{num_steps} steps with shift {shift}",
            "at least 1 step and a shift above 0",
        )
    return shift_sigma(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift).float()


def starts_as_its_head(grid: InnerGrid) -> bool:
    """Returns True if a head that ignores its state leads to its own answer, to the bit."""
    return bool(grid[-2] >= _STRAIGHT_FROM)


def inner_state(y: Latents, inner_noise: Latents, s: PerSample) -> Latents:
    """State of the inner path: (1 - s) y + s y_1."""
    share = per_sample(s, y)
    return (1 - share) * y + share * inner_noise


def average_velocity(y_s: Latents, head: Latents, s: PerSample) -> Latents:
    """Average inner velocity that a head's answer stands for: k(s) (y_s - h).

    Args:
        y_s: Inner state.
        head: The head's answer there.
        s: Inner level.
    """
    return per_sample(_gain(s), y_s) * (y_s - head)


def inner_update(y_s: Latents, head: Latents, s: PerSample, r: PerSample) -> Latents:
    """State at r after one stride: y_s - (s - r) u.

    At r = 0 this is the head's answer to the bit, where s is at least 1/2.

    Args:
        y_s: Inner state.
        head: The head's answer for this stride.
        s: Level of the state, above 0.
        r: Level to go to, at most s.
    """
    kept = per_sample(torch.where(s < _STRAIGHT_FROM, 1 - (s - r) * _gain(s), r / s), y_s)
    return kept * y_s + (1 - kept) * head


def _gain(s: PerSample) -> PerSample:
    """The factor k."""
    line = (2 - s / _STRAIGHT_FROM) / _STRAIGHT_FROM
    # No clamp: its derivative at the bound is 1 or 0, depending on torch's version.
    return torch.where(s < _STRAIGHT_FROM, line, 1 / torch.where(s < _STRAIGHT_FROM, 1.0, s))


def inner_sample(head: InnerHead, inner_noise: Latents, grid: InnerGrid) -> Latents:
    """Sample of the outer velocity: the inner flow from noise to its end, with every step's graph.

    Args:
        head: The head, for one state of the backbone.
        inner_noise: y_1.
        grid: Inner levels.
    """
    y = inner_noise
    levels = grid.to(inner_noise)
    for step in range(len(levels) - 1):
        s, r = (levels[at].expand(len(y)) for at in (step, step + 1))
        y = inner_update(y, head(y, s, r), s, r)
    return y
