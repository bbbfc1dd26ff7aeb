"""Sample a folder with its own pipeline of diffusers: what we show is what its users get."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from workers.models.sampling import SampleRequest
from workers.models.scheduler import at_levels, renoising


class PipelineSampler:
    """A text-to-video pipeline of diffusers as a `ClipSampler`.

    Args:
        pipeline: On its device, with its weights.
    """

    def __init__(self, pipeline: Any) -> None:  # noqa: ANN401  (a class for each model)
        self._pipeline = pipeline

    def sample(
        self, request: SampleRequest, on_step: Callable[[int], None] = lambda step: None
    ) -> NDArray[np.uint8]:
        """Sample one clip, (frames, height, width, 3)."""

        def after_step(
            _: Any,  # noqa: ANN401
            step: int,
            __: Any,  # noqa: ANN401  (diffusers passes a number or a tensor)
            tensors: dict[str, Any],
        ) -> dict[str, Any]:
            on_step(step + 1)
            return tensors

        self._set_flow_shift(request.schedule.shift)
        plain, schedule, scale = self._pipeline.scheduler, request.schedule, request.guidance_scale
        renoises = schedule.renoises(scale)
        if request.listed or renoises:
            grid = schedule.sampling_grid(request.num_steps, scale)
            adapt = renoising if renoises else at_levels
            self._pipeline.scheduler = adapt(self._pipeline.scheduler, grid)
        try:
            (video,) = self._pipeline(
                prompt=request.prompt,
                negative_prompt=request.negative_prompt,
                height=request.height,
                width=request.width,
                num_frames=request.num_frames,
                num_inference_steps=request.num_steps,
                guidance_scale=request.guidance_scale,
                max_sequence_length=request.text_length,
                # On the CPU, so that a seed means the same clip on every machine.
                generator=torch.Generator("cpu").manual_seed(request.seed),
                # Declared with two arguments, called with four.
                callback_on_step_end=cast(Any, after_step),
                output_type="np",
                return_dict=False,
            )
        finally:
            self._pipeline.scheduler = plain
        return (np.asarray(video[0]) * 255).round().clip(0, 255).astype(np.uint8)

    def _set_flow_shift(self, flow_shift: float) -> None:
        scheduler = self._pipeline.scheduler
        # diffusers' flow-match Euler scheduler calls it `shift`, its multistep solvers
        # `flow_shift`.
        name = "flow_shift" if "flow_shift" in scheduler.config else "shift"
        if scheduler.config.get(name, 1.0) == flow_shift:
            return
        changes: dict[str, Any] = {name: flow_shift}
        if scheduler.config.get("use_dynamic_shifting"):
            # Such a scheduler chooses the shift by the size of the clip, until it is given one.
            changes |= {"use_dynamic_shifting": False, "shift_terminal": None}
        self._pipeline.scheduler = type(scheduler).from_config(scheduler.config, **changes)
