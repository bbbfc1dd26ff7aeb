"""Configuration of diffusers' sampler for a few-step generator."""

from functools import wraps
from itertools import count
from typing import Any

from diffusers import UniPCMultistepScheduler
from torch import Tensor

from sgmd_core.rollout import renoised
from sgmd_core.seeds import derived_noise

_NUM_TRAIN_TIMESTEPS = 1000
_LARGEST_LEVEL = 1 - 1e-6


def build_scheduler(flow_shift: float) -> UniPCMultistepScheduler:
    """A sampler of diffusers that takes plain Euler steps along the shifted flow grid.

    First order without corrector is Euler in the flow's own time, so that the pipeline samples
    nearly as few-step distillation does. Its noise levels are shift(1 - 0.999 i / n) where the
    trained ones are shift(1 - i / n): at most 0.001 apart for 4 steps, 0.004 for 30 steps at shift
    5. The first is 1 - 1e-6, time steps are cut to integers, and 0 comes at the end. No setting of
    this scheduler is exact for every number of steps. The flow-match Euler scheduler takes another
    grid (for 4 steps at shift 3: 1, 0.858, 0.602, 0.009 instead of 1, 0.9, 0.75, 0.5), and Wan's
    own second-order solver takes other steps.

    Args:
        flow_shift: Shift of the noise levels.
    """
    return UniPCMultistepScheduler(
        num_train_timesteps=_NUM_TRAIN_TIMESTEPS,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=flow_shift,
        solver_order=1,
        disable_corrector=list(range(_NUM_TRAIN_TIMESTEPS)),
        final_sigmas_type="zero",
    )


def renoising(scheduler: Any, grid: Tensor) -> Any:  # noqa: ANN401  (a class for each model)
    """A copy of a scheduler that steps over the levels of a grid and renoises at each of them.

    The latents of the first step are the initial noise, from which that of the others is drawn, in
    the order in which the pipeline holds them: only one that holds them as we do makes our clips.

    Args:
        scheduler: Of diffusers, for flow models.
        grid: Falling noise levels that end at 0.
    """
    own = at_levels(scheduler, grid)
    levels = grid.tolist()
    initial: list[Tensor] = []
    steps = count()

    def step_anew(
        velocity: Tensor, timestep: object, sample: Tensor, **options: object
    ) -> tuple[Tensor]:
        step = next(steps)
        initial[:] = initial or [sample]
        noise = derived_noise(initial[0], step)
        return (renoised(sample, velocity, levels[step], levels[step + 1], noise),)

    own.step = step_anew
    return own


def at_levels(scheduler: Any, grid: Tensor) -> Any:  # noqa: ANN401  (a class for each model)
    """A copy of a scheduler that steps over the levels of a grid, whatever its own would be.

    Args:
        scheduler: Of diffusers, for flow models.
        grid: Falling noise levels that end at 0; a step from 0 to 0 goes nowhere and is left out.
    """
    levels = grid[: int((grid > 0).sum()) + 1]
    own = type(scheduler).from_config(scheduler.config)
    set_timesteps = own.set_timesteps

    # Pipelines look at the signature.
    @wraps(set_timesteps)
    def set_listed(*args: Any, **options: Any) -> None:  # noqa: ANN401
        set_timesteps(*args, **options)
        # Its solvers take logarithms of 1 - sigma.
        own.sigmas = levels.to(own.sigmas).clamp_max(_LARGEST_LEVEL)
        times = _NUM_TRAIN_TIMESTEPS * own.sigmas[:-1]
        own.timesteps = times.to(own.timesteps)

    own.set_timesteps = set_listed
    return own
