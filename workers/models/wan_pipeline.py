"""Open the WanPipeline of a Wan folder."""

from pathlib import Path
from typing import Any, cast

import torch
from diffusers import WanPipeline
from safetensors import SafetensorError

from sgmd_core.errors import ModelFolderError
from workers.models.pipeline_sampler import PipelineSampler
from workers.models.wan import WanVelocity, load_experts, load_transformer, load_vae
from workers.models.wan_configs import LOW_NOISE, TRANSFORMER
from workers.models.wan_text import load_text


class WanSampler(PipelineSampler):
    """A WanPipeline, in float32 on a CPU; on a GPU in bfloat16, except for the autoencoder.

    Args:
        folder: Wan folder.
        device: Torch device.

    Raises:
        ModelFolderError: A component is missing or corrupt.
    """

    def __init__(self, folder: Path, device: str) -> None:
        super().__init__(_load(folder, device))


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
