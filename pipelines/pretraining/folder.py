"""Write a whole diffusers folder from freshly trained parts."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from cluster.files import whole_folder
from pipelines.media.inference import InferenceSettings, write_inference_settings
from sgmd_core.errors import ConfigError
from workers.models.configs import INDEX_FILE
from workers.models.scheduler import build_scheduler

_MAX_NAMED = 4


def write_pipeline_folder(
    dst: Path,
    *,
    transformer: WanTransformer3DModel,
    vae: AutoencoderKLWan,
    text_encoder: UMT5EncoderModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: InferenceSettings,
) -> None:
    """Write a folder that `diffusers.WanPipeline.from_pretrained` loads; replaces an old one.

    Args:
        dst: The folder.
        transformer: The denoiser.
        vae: The autoencoder.
        text_encoder: The text encoder.
        tokenizer: Its tokenizer.
        settings: How the folder is sampled, for its `sgmd.json`.
    """
    parts: dict[str, Any] = {
        "tokenizer": tokenizer,
        "scheduler": build_scheduler(settings.flow_shift),
    }
    pipeline = WanPipeline(
        **parts,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
    )
    with whole_folder(dst) as draft:
        pipeline.save_pretrained(draft)
        write_inference_settings(draft, settings)


def require_replaceable(dst: str, setting: str, kept: Mapping[str, str]) -> None:
    """Checks that a model folder may be replaced whole: nothing but a model is in it.

    Args:
        dst: The folder.
        setting: Setting that gave it.
        kept: Addresses that must not lie in it, by setting.

    Raises:
        ConfigError: One of them does, or it holds other files.
    """
    attempted = f"writing a model to {dst} ({setting}), which is replaced whole"
    remedy = f"Set {setting}=... to a folder of its own"
    path = Path(os.path.realpath(dst))
    for name, address in kept.items():
        if "://" not in address and Path(os.path.realpath(address)).is_relative_to(path):
            found = f"{name} ({address}) is in it"
            raise ConfigError(attempted, found, "a folder for the model alone", remedy)
    if path.is_dir() and not (path / INDEX_FILE).exists():
        names = sorted(each.name for each in path.iterdir())
        if names:
            found = f"a folder with {', '.join(names[:_MAX_NAMED])}, and no {INDEX_FILE}"
            expected = "a free name, an empty folder, or an earlier model"
            raise ConfigError(attempted, found, expected, remedy)
