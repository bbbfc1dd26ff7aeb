"""Write a whole diffusers folder from freshly trained parts."""

from typing import Any

from diffusers import WanPipeline

from cluster.folders import whole_folder_at
from pipelines.media.inference import InferenceSettings, write_inference_settings
from pipelines.pretraining.denoiser_stage import TeacherNetworks
from workers.models.configs import INDEX_FILE
from workers.models.scheduler import build_scheduler
from workers.models.wan import VideoVae


def write_pipeline_folder(
    dst: str, teacher: TeacherNetworks, vae: VideoVae, settings: InferenceSettings
) -> None:
    """Write a folder that `diffusers.WanPipeline.from_pretrained` loads; replaces an old one.

    Args:
        dst: The folder: a path or an address.
        teacher: The denoiser, the text encoder and its tokenizer.
        vae: The autoencoder.
        settings: How the folder is sampled, for its `sgmd.json`.
    """
    parts: dict[str, Any] = {
        "tokenizer": teacher.tokenizer,
        "scheduler": build_scheduler(settings.flow_shift),
    }
    pipeline = WanPipeline(
        **parts,
        text_encoder=teacher.text_encoder,
        vae=vae.vae,
        transformer=teacher.transformer.transformer,
    )
    with whole_folder_at(dst, last=(INDEX_FILE,)) as draft:
        pipeline.save_pretrained(draft)
        write_inference_settings(draft, settings)
