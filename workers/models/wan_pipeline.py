"""Sample a Wan folder with diffusers' own WanPipeline: what we show is what its users get."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import WanPipeline
from numpy.typing import NDArray
from safetensors import SafetensorError

from sgmd_core.errors import ModelFolderError
from workers.models.sampling import SampleRequest
from workers.models.wan import WanVelocity, load_experts, load_transformer, load_vae
from workers.models.wan_family import LOW_NOISE, TRANSFORMER
from workers.models.wan_text import load_text


class WanSampler:
    """A WanPipeline, in float32 on a CPU; on a GPU in bfloat16, but for the autoencoder.

    Args:
        folder: Wan folder.
        device: Torch device.

    Raises:
        ModelFolderError: A component is missing or corrupt.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self._pipeline = _load(folder, device)

    def sample(
        self, request: SampleRequest, on_step: Callable[[int], None] = lambda step: None
    ) -> NDArray[np.uint8]:
        """Sample one clip, (frames, height, width, 3)."""

        def after_step(
            _: WanPipeline,
            step: int,
            __: Any,  # noqa: ANN401  (diffusers passes a number or a tensor)
            tensors: dict[str, Any],
        ) -> dict[str, Any]:
            on_step(step + 1)
            return tensors

        self._set_flow_shift(request.flow_shift)
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
        return (np.asarray(video[0]) * 255).round().clip(0, 255).astype(np.uint8)

    def _set_flow_shift(self, flow_shift: float) -> None:
        scheduler = self._pipeline.scheduler
        # diffusers' flow-match Euler scheduler calls it `shift`, its multistep solvers
        # `flow_shift`.
        name = "flow_shift" if "flow_shift" in scheduler.config else "shift"
        if scheduler.config.get(name, 1.0) != flow_shift:
            remade = type(scheduler).from_config(scheduler.config, **{name: flow_shift})
            self._pipeline.scheduler = remade


def _denoisers(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The networks that predict velocities, by component."""
    if not (folder / LOW_NOISE).exists():
        return {TRANSFORMER: load_transformer(folder, dtype).transformer}
    experts = load_experts(folder, dtype)
    both = {TRANSFORMER: experts.high, LOW_NOISE: experts.low}
    return {name: cast(WanVelocity, expert).transformer for name, expert in both.items()}


def _load(folder: Path, device: str) -> WanPipeline:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    try:
        pipeline = WanPipeline.from_pretrained(
            folder,
            **_denoisers(folder, dtype),
            text_encoder=load_text(folder, dtype).text_encoder,
            vae=load_vae(folder).vae,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelFolderError(
            f"loading a WanPipeline from {folder}",
            f"{type(error).__name__}: {str(error).splitlines()[0]}",
            "a complete diffusers folder of a Wan text-to-video model",
            "Download or export it again",
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)
