"""A generator's few Euler steps: for training, with a graph at one of them; and for use.

    x_t  ->  x_t + (sigma_next - sigma) * velocity       one step
    x_t  ->  x_t - sigma * velocity                      leaving for x0 from here
    x_t  ->  (1 - sigma_next) * x0 + sigma_next * noise  one step that renoises

A training rollout takes `exit_step` steps and then leaves for x0 in one stride. Only that last
pass is recorded, so a rollout costs the memory of one pass and the generator learns every step of
its grid when the exit step is drawn uniformly.

A consistency function maps any state to x0, and its x0 goes with the state that it came from. So an
Euler step, which keeps the noise of that state, would lead to states that no data are noised to:
its steps renoise, with noise that is drawn from the initial one and the number of the step.

A transition (`inner_flow`) samples the velocity of each step; its inner noise is drawn likewise.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from sgmd_core.errors import ConfigError
from sgmd_core.inner_flow import TransitionModel, model_at_step
from sgmd_core.seeds import derived_noise
from sgmd_core.types import Latents, NoisedBatch, PerSample, Samples, Text, per_sample
from sgmd_core.velocity import Guidance, VelocityModel, guided_velocity

Grid = Float[Tensor, "*samples steps"]
"""Falling noise levels: one list, or one of the same length for each sample."""


@dataclass(frozen=True, slots=True)
class RolloutExit:
    """The step at which a rollout leaves for x0.

    Attributes:
        x0: Clean latents, with the graph of this step where one was kept.
        x_t: State that the step starts from; a constant.
        velocity: The generator's velocity there.
        sigma: Noise level there, of each sample.
    """

    x0: Latents
    x_t: Latents
    velocity: Latents
    sigma: PerSample


def rollout(
    model: VelocityModel | TransitionModel,
    grid: Grid,
    initial_noise: Latents,
    text: Text,
    exit_step: int,
    *,
    keep_graph: bool,
    renoise: bool = False,
) -> Latents:
    """Generates clean latents by a few Euler steps that end at `exit_step`.

        x_{i+1} = x_i + (sigma_{i+1} - sigma_i) * v_i          i < exit_step, not recorded
        x0      = x_e - sigma_e * v_e                          e = exit_step, recorded

    The gradient reaches the generator through one pass only, with d x0 / d v_e = -sigma_e; the
    state x_e that this pass starts from is a constant. There is no guidance.

    Args:
        model: The generator.
        grid: Noise levels as `FlowMatchSchedule.few_step_grid` gives them.
        initial_noise: Standard normal (b, c, t, h, w); the state at the grid's first level.
        text: Caption embeddings (b, l, d).
        exit_step: Step to leave at, counted from 0; the same for all samples.
        keep_graph: Record the last pass for autograd, whatever the caller's gradient mode is.
        renoise: Add new noise to x0 at each earlier step, instead of moving along the velocity.

    Returns:
        Clean latents in the dtype of `initial_noise`.

    Raises:
        ConfigError: the grid has no step `exit_step`.
    """
    return rollout_exit(
        model, grid, initial_noise, text, exit_step, keep_graph=keep_graph, renoise=renoise
    ).x0


def rollout_exit(
    model: VelocityModel | TransitionModel,
    grid: Grid,
    initial_noise: Latents,
    text: Text,
    exit_step: int,
    *,
    keep_graph: bool,
    renoise: bool = False,
) -> RolloutExit:
    """Generates as `rollout` does; returns the state and velocity of the last step as well.

    Args:
        model: The generator.
        grid: See `rollout`.
        initial_noise: See `rollout`.
        text: Caption of each sample.
        exit_step: See `rollout`.
        keep_graph: See `rollout`.
        renoise: See `rollout`.

    Returns:
        Clean latents, and the state, velocity and noise level of the step that led to them.

    Raises:
        ConfigError: the grid has no step `exit_step`.
    """
    num_steps = grid.shape[-1] - 1
    if not 0 <= exit_step < num_steps:
        raise ConfigError(
            "rolling out the generator",
            f"exit step {exit_step} of a grid of {num_steps} steps",
            f"an exit step from 0 to {num_steps - 1}",
            "Draw it for the number of steps that the generator has",
        )
    x_t = initial_noise
    with torch.no_grad():
        for step in range(exit_step):
            here = model_at_step(model, initial_noise, step)
            velocity = here(x_t, _level(grid, step, x_t), text)
            x_t = _stepped(grid, step, x_t, velocity, initial_noise if renoise else None)
    sigma = _level(grid, exit_step, x_t)
    with torch.set_grad_enabled(keep_graph):
        velocity = model_at_step(model, initial_noise, exit_step)(x_t, sigma, text)
        x0 = x_t - _factor(grid[..., exit_step], x_t) * velocity
    return RolloutExit(x0, x_t, velocity, sigma)


def anchored(query: NoisedBatch, left: RolloutExit, level: float | Tensor) -> NoisedBatch:
    """Replaces the clean sample of a query by the rollout's state at a lower noise level.

    Phased distillation judges a sample on the noise levels above such an anchor.

    Args:
        query: Score query at the rollout's samples.
        left: Exit of that rollout.
        level: Noise level of the anchor, the end of a phase, below that of the exit step.

    Returns:
        The query with `anchor`, `anchor_sigma` and `exit_sigma`.
    """
    sigma = torch.as_tensor(level, dtype=left.sigma.dtype, device=left.sigma.device)
    sigma = sigma.expand_as(left.sigma)
    anchor = extrapolated(left.x_t, left.velocity, left.sigma, sigma)
    return replace(query, anchor=anchor, anchor_sigma=sigma, exit_sigma=left.sigma)


def extrapolated(x_t: Latents, velocity: Latents, sigma: PerSample, target: PerSample) -> Latents:
    """State at another noise level on the straight line of a stored velocity.

        x' = x_t + (target - sigma) * velocity

    At the next level of a rollout's grid this is its next state, at 0 the clean latents that it
    would leave for; in between and above it is not a state of that rollout.

    Args:
        x_t: State of a rollout (b, c, t, h, w).
        velocity: The generator's velocity there, of the same shape.
        sigma: Noise level there (b,).
        target: Noise level to go to (b,), below or above it.

    Returns:
        The state, without a graph.
    """
    return x_t.detach() + per_sample((target - sigma).to(x_t), x_t) * velocity.detach()


@torch.no_grad()
def euler_sample(
    model: VelocityModel | TransitionModel,
    grid: Grid,
    initial_noise: Latents,
    text: Text,
    guidance: Guidance | None = None,
    on_step: Callable[[int], None] | None = None,
    *,
    renoise: bool = False,
) -> Latents:
    """Samples latents over the whole grid, without a graph.

    On a grid that ends at 0 the latents are clean, and this equals a rollout that exits at the last
    step.

    Args:
        model: Generator or teacher.
        grid: Falling noise levels; the latents are those of the last one.
        initial_noise: Standard normal; the state at the grid's first level.
        text: Caption of each sample.
        guidance: Scale and negative caption; None: the caption alone.
        on_step: Called with the number of steps done, after each of them.
        renoise: Add new noise to x0 at each step, instead of moving along the velocity.

    Returns:
        Latents in the dtype of `initial_noise`.
    """
    x_t = initial_noise
    for step in range(grid.shape[-1] - 1):
        sigma = _level(grid, step, x_t)
        here = model_at_step(model, initial_noise, step)
        if guidance is None:
            velocity = here(x_t, sigma, text)
        else:
            velocity = guided_velocity(here, x_t, sigma, text, guidance)
        x_t = _stepped(grid, step, x_t, velocity, initial_noise if renoise else None)
        if on_step is not None:
            on_step(step + 1)
    return x_t


def renoised(
    x_t: Samples, velocity: Samples, sigma: float | Tensor, target: float | Tensor, noise: Samples
) -> Samples:
    """State at another noise level: the clean latents that a velocity leads to, noised again.

        (1 - target) * (x_t - sigma * velocity) + target * noise

    Args:
        x_t: State.
        velocity: Velocity there.
        sigma: Noise level there, one number or ready to multiply latents.
        target: Noise level to go to.
        noise: Standard normal.
    """
    return (1 - target) * (x_t - sigma * velocity) + target * noise


def _stepped(
    grid: Grid, step: int, x_t: Latents, velocity: Latents, initial_noise: Latents | None
) -> Latents:
    """State after a step of a grid: of Euler's, or renoised by what an initial noise gives."""
    if initial_noise is None:
        return x_t + _factor(grid[..., step + 1] - grid[..., step], x_t) * velocity
    sigma, target = (_factor(grid[..., at], x_t) for at in (step, step + 1))
    return renoised(x_t, velocity, sigma, target, derived_noise(initial_noise, step))


def _level(grid: Grid, step: int, x_t: Latents) -> Float[Tensor, " b"]:
    """The grid's noise level at a step, one per sample."""
    return grid[..., step].to(x_t).expand(len(x_t))


def _factor(values: Tensor, x_t: Latents) -> Tensor:
    """One number, or one per sample, ready to multiply latents."""
    values = values.to(x_t)
    return per_sample(values, x_t) if values.dim() else values
