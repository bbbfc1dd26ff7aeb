"""Wan as a model family: its traits, and what its folders are loaded, sampled and exported by.

    wan_configs     checks by configurations         wan_folder     checks of weight files
    wan             networks                         wan_text       captions
    wan_experts     two denoisers (A14B)             wan_pipeline   sampling
    wan_arithmetic

No network library is imported before a method needs one, so `sgmd plan` can ask before anything is
downloaded.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sgmd_core.collector import paused_collector
from sgmd_core.errors import ModelFolderError
from workers.models.configs import (
    CONFIG_FILE,
    INDEX_FILE,
    read_model_json,
)
from workers.models.exchange import ExchangeFiles
from workers.models.exporting import Components
from workers.models.family import Denoiser, FamilyTraits
from workers.models.folder import (
    ClipGeometry,
    EncoderSizes,
    ModelFolder,
)
from workers.models.sampling import ClipSampler, SamplingRules
from workers.models.shape import DenoiserShape, ModelShape
from workers.models.vocabulary import CaptionTokenizer, LibraryTokenizer
from workers.models.wan_arithmetic import RELEASED_SHAPES, WanShape
from workers.models.wan_configs import (
    LAYOUT,
    OTHER_PIPELINES,
    REMEDY,
    SAMPLED_PX,
    TOKENIZER,
    TRANSFORMER,
    VAE,
    WAN,
    WAN_GEOMETRY,
    WIDE_STRIDE_GEOMETRY,
    read_component,
    refuse_original_release,
    require_supported_index,
    require_wan_index,
    wan_geometry,
)

if TYPE_CHECKING:
    from workers.models.wan import VideoVae
    from workers.models.wan_text import CaptionEncoder


def _exchange() -> ExchangeFiles:
    with paused_collector():
        from workers.models.wan_exchange import WanExchange

    return WanExchange()


RELEASED_ENCODERS = EncoderSizes(text=5_680_910_336, autoencoder=126_892_531)
"""UMT5-XXL's encoder, and the autoencoder of Wan 2.1."""
_WIDE_STRIDE_ENCODERS = replace(RELEASED_ENCODERS, autoencoder=704_688_668)
WAN_TRAITS = FamilyTraits(
    about="text to video with one denoiser",
    layout=LAYOUT,
    sampling=SamplingRules(
        source="WanPipeline",
        # WanPipeline refuses other sizes, whatever the networks could do.
        multiple_px=SAMPLED_PX,
        num_steps=50,
        guidance_scale=5.0,
        flow_shift=1.0,
        text_length=512,
        num_frames=81,
        height=480,
        width=832,
        fps=16,
    ),
    relatives=OTHER_PIPELINES,
    released={
        name: ModelShape(shape, geometry, encoders)
        for name, shape in RELEASED_SHAPES.items()
        for geometry, encoders in (
            (WAN_GEOMETRY, RELEASED_ENCODERS),
            (WIDE_STRIDE_GEOMETRY, _WIDE_STRIDE_ENCODERS),
        )
        if geometry.latent_channels == shape.in_channels
    },
    on_hub={
        "Wan2.1-T2V-1.3B-Diffusers": "1.3b",
        "Wan2.1-T2V-14B-Diffusers": "14b",
        "Wan2.2-TI2V-5B-Diffusers": "5b",
    },
    computes=frozenset(
        {
            "bf16",
            "checkpointing",
            "selective",
            "offload",
            "compile",
            "fp8",
            "lora",
            "attention",
            "ulysses",
            "joint",
        }
    ),
    # WanTransformer3DModel's own choice.
    exchange=_exchange,
    keep_fp32=frozenset({"rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}),
    modules=("workers.models.wan", "workers.models.wan_text"),
)


class WanFamily:
    """Wan 2.1 and 2.2 text-to-video models with one denoiser; see `ModelFamily`."""

    name = WAN
    traits = WAN_TRAITS

    def explain_files(self, folder: Path) -> ModelFolderError | None:
        """Refusal of the original release, and of one component alone."""
        return refuse_original_release(folder)

    def read_shape(self, folder: Path) -> ModelShape:
        """Read the shape from the configurations of denoiser and autoencoder."""
        if (folder / INDEX_FILE).exists():
            require_supported_index(folder)
        return self.read_single(folder)

    def read_single(self, folder: Path) -> ModelShape:
        """Read the shape of `transformer` and the autoencoder, whatever else is in the folder."""
        config = read_component(folder, TRANSFORMER)
        try:
            shape = WanShape.from_config(config)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelFolderError(
                f"reading {folder / TRANSFORMER / CONFIG_FILE}",
                f"{type(error).__name__}: {error}",
                "the configuration of a Wan denoiser",
                REMEDY,
            ) from error
        if not os.path.lexists(folder / VAE / CONFIG_FILE):
            return ModelShape(shape, wan_geometry(folder, shape.out_channels, shape.patch_size))
        vae = read_model_json(folder / VAE / CONFIG_FILE)
        geometry = ClipGeometry(
            shape.out_channels,
            vae.get("scale_factor_temporal", WAN_GEOMETRY.temporal_factor),
            vae.get("scale_factor_spatial", WAN_GEOMETRY.spatial_factor),
            shape.patch_size,
            SAMPLED_PX,
        )
        return ModelShape(shape, geometry)

    def shape_from_record(self, record: Mapping[str, Any]) -> DenoiserShape:
        """Rebuild a shape from the fields of `WanShape`."""
        return WanShape(**{**record, "patch_size": tuple(record["patch_size"])})

    def inspect(self, folder: Path) -> ModelFolder:
        """Check configurations and weight headers."""
        with paused_collector():
            from workers.models.wan_folder import inspect_wan_folder

        return inspect_wan_folder(folder)

    def load_denoiser(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        prepare: Callable[[Denoiser], object] | None = None,
    ) -> Denoiser:
        """Load the transformer."""
        with paused_collector():
            from workers.models.wan import load_transformer

        return load_transformer(folder, dtype, device, prepare)

    def load_text(self, folder: Path, dtype: torch.dtype | None = None) -> "CaptionEncoder":
        """Load tokenizer and UMT5 encoder."""
        with paused_collector():
            from workers.models.wan_text import load_text

        return load_text(folder, dtype)

    def load_autoencoder(self, folder: Path, dtype: torch.dtype = torch.float32) -> "VideoVae":
        """Load the autoencoder."""
        with paused_collector():
            from workers.models.wan import load_vae

        return load_vae(folder, dtype)

    def load_tokenizer(self, folder: Path) -> CaptionTokenizer:
        """Load the tokenizer, with WanPipeline's way of cleaning captions."""
        with paused_collector():
            from workers.models.loading import load_tokenizer
            from workers.models.wan_text import clean_caption

        require_wan_index(folder)
        return LibraryTokenizer(load_tokenizer(folder / TOKENIZER), clean_caption)

    def open_sampler(self, folder: Path, device: str) -> ClipSampler:
        """Load a WanPipeline."""
        with paused_collector():
            from workers.models.wan_pipeline import WanSampler

        return WanSampler(folder, device)

    def export(
        self,
        dst: Path,
        base_folder: Path,
        weights: Mapping[str, Tensor],
        *,
        flow_shift: float | None,
        components: Components = "copy",
    ) -> None:
        """Write a folder that WanPipeline loads."""
        with paused_collector():
            from workers.models.wan import save_generator_pipeline

        save_generator_pipeline(
            dst, base_folder, weights, flow_shift=flow_shift, components=components
        )
