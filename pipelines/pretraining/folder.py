"""Write a whole diffusers folder from freshly trained parts."""

from typing import Any

from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from cluster.folders import whole_folder_at
from pipelines.media.inference import InferenceSettings, write_inference_settings
from workers.models.configs import INDEX_FILE
from workers.models.scheduler import build_scheduler


def write_pipeline_folder(
    dst: str,
    *,
    transformer: WanTransformer3DModel,
    vae: AutoencoderKLWan,
    text_encoder: UMT5EncoderModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: InferenceSettings,
) -> None:
    """Write a folder that `diffusers.WanPipeline.from_pretrained` loads; replaces an old one.

    Args:
        dst: The folder: a path or an address.
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
    with whole_folder_at(dst, last=(INDEX_FILE,)) as draft:
        pipeline.save_pretrained(draft)
        write_inference_settings(draft, settings)
