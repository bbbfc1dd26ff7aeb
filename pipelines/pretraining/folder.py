"""Write a whole diffusers folder from freshly trained parts."""

import shutil
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from workers.models.scheduler import build_scheduler


def write_pipeline_folder(
    dst: Path,
    *,
    transformer: WanTransformer3DModel,
    vae: AutoencoderKLWan,
    text_encoder: UMT5EncoderModel,
    tokenizer: PreTrainedTokenizerBase,
    flow_shift: float,
) -> None:
    """Write a folder that `diffusers.WanPipeline.from_pretrained` loads; replaces an old one."""
    draft = dst.with_name(f".{dst.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    parts: dict[str, Any] = {"tokenizer": tokenizer, "scheduler": build_scheduler(flow_shift)}
    WanPipeline(
        **parts,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
    ).save_pretrained(draft)
    shutil.rmtree(dst, ignore_errors=True)
    draft.rename(dst)
