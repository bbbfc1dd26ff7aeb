"""Networks and pipeline of LTX-Video that diffusers has: the denoiser and the autoencoder.

The only file that knows LTX-Video's packing of latents, positions in seconds and normalisation.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from safetensors import SafetensorError
from torch import Tensor, nn

from cluster.files import whole_folder
from sgmd_core.errors import ModelFolderError, ShapeError
from workers.models.architecture import (
    CheckedComponent,
    NetworkKind,
    build_without_weights,
    check_network,
)
from workers.models.configs import INDEX_FILE, read_model_json
from workers.models.exporting import (
    Components,
    copy_components,
    copy_config,
    place_scheduler,
)
from workers.models.family import Denoiser
from workers.models.folder import ClipGeometry
from workers.models.loading import load_network
from workers.models.ltx_configs import (
    FRAME_RATE,
    LAYOUT,
    TEXT_ENCODER,
    TOKENIZER,
    TRANSFORMER,
    VAE,
    clip_geometry,
    ltx_geometry,
    read_ltx_component,
    require_ltx_index,
)
from workers.models.ltx_text import load_ltx_text, text_encoder_kind
from workers.models.pipeline_sampler import PipelineSampler
from workers.models.sharded_loading import load_sharded

_TIME_SCALE = 1000.0


class LtxVelocity(Denoiser):
    """An LTX-Video denoiser as a velocity model.

    Args:
        transformer: The network of diffusers.
        geometry: Pixels and frames of a latent cell, which positions are measured in.
    """

    def __init__(self, transformer: LTXVideoTransformer3DModel, geometry: ClipGeometry) -> None:
        super().__init__()
        self.transformer = transformer
        self._scale = (
            geometry.temporal_factor / FRAME_RATE,
            geometry.spatial_factor,
            geometry.spatial_factor,
        )

    def forward(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Predict the velocity `noise - x0`; see `Denoiser.forward`.

        Positions of `text` that are zero take no part in attention.
        """
        channels = self.transformer.config["in_channels"]
        if x_t.ndim != 5 or x_t.shape[1] != channels:
            found = f"latents of shape {tuple(x_t.shape)}"
            raise ShapeError("denoising", found, f"(batch, {channels}, T, H, W)")
        frames, height, width = x_t.shape[2:]
        dtype = self.transformer.proj_in.weight.dtype
        with torch.autocast(
            x_t.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None
        ):
            prediction = self.transformer(
                hidden_states=x_t.to(dtype).flatten(2).transpose(1, 2),
                encoder_hidden_states=text.to(dtype),
                timestep=_TIME_SCALE * sigma,
                encoder_attention_mask=text.ne(0).any(dim=2),
                num_frames=frames,
                height=height,
                width=width,
                rope_interpolation_scale=self._scale,
                return_dict=False,
            )[0]
        cells = prediction.transpose(1, 2).unflatten(2, (frames, height, width))
        # A copy also where it is float32 already: FSDP hooks the output, and must not hook a view.
        return cells.to(torch.float32, copy=True)

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers, in order."""
        return list(self.transformer.transformer_blocks)

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of the layers in the backward pass, or keep them."""
        if enabled:
            self.transformer.enable_gradient_checkpointing(self.layer_function)
        else:
            self.transformer.disable_gradient_checkpointing()


class LtxCodec:
    """An LTX-Video autoencoder between videos in [0, 1] and normalised latents.

        latents = scaling_factor * (posterior mode - latents_mean) / latents_std

    Args:
        vae: The network of diffusers.
    """

    def __init__(self, vae: AutoencoderKLLTXVideo) -> None:
        self.vae = vae

    @property
    def network(self) -> nn.Module:
        """The network of diffusers."""
        return self.vae

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Encode videos (B, 3, T, H, W) in [0, 1] to normalised latents (B, C, T', H', W')."""
        frames, height, width = video.shape[2:]
        clip_geometry(self.vae.config).latent_shape(frames, height, width)
        pixels = (2 * video - 1).to(self.vae.dtype)
        latents = self.vae.encode(pixels, return_dict=False)[0].mode().float()
        mean, std = self._statistics(latents)
        return (latents - mean) * self.vae.config["scaling_factor"] / std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents to videos (B, 3, T, H, W), clamped to [0, 1]."""
        mean, std = self._statistics(latents)
        raw = (latents * std / self.vae.config["scaling_factor"] + mean).to(self.vae.dtype)
        # Decoders that remove the last noise themselves are asked, as by the pipeline, for none.
        is_timed = self.vae.config["timestep_conditioning"]
        timestep = torch.zeros(len(raw)).to(raw) if is_timed else None
        pixels = cast(Tensor, self.vae.decode(raw, timestep, return_dict=False)[0])
        return ((pixels.float() + 1) / 2).clamp(0, 1)

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (
            cast(Tensor, value).to(latents)[None, :, None, None, None]
            for value in (self.vae.latents_mean, self.vae.latents_std)
        )
        return mean, std


class LtxSampler(PipelineSampler):
    """An LTXPipeline, in float32 on a CPU; on a GPU in bfloat16.

    Args:
        folder: LTX-Video folder.
        device: Torch device.

    Raises:
        ModelFolderError: A component is missing or corrupt.
    """

    def __init__(self, folder: Path, device: str) -> None:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        parts: dict[str, Any] = {
            TRANSFORMER: load_ltx_transformer(folder, dtype).transformer,
            TEXT_ENCODER: load_ltx_text(folder, dtype).text_encoder,
            VAE: load_ltx_vae(folder, dtype).vae,
        }
        try:
            pipeline = LTXPipeline.from_pretrained(
                folder, **parts, dtype=dtype, use_safetensors=True, local_files_only=True
            )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise ModelFolderError(
                f"loading an LTXPipeline from {folder}",
                f"{type(error).__name__}: {str(error).splitlines()[0]}",
                "a complete diffusers folder of an LTX-Video text-to-video model",
                "Download or export it again",
            ) from error
        pipeline.set_progress_bar_config(disable=True)
        super().__init__(pipeline.to(device))


def load_ltx_transformer(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    prepare: Callable[[Denoiser], object] | None = None,
) -> LtxVelocity:
    """Load the denoiser of an LTX-Video folder in evaluation mode; see `load_sharded`."""
    require_ltx_index(folder)
    part = check_ltx_component(folder, TRANSFORMER)
    geometry = ltx_geometry(folder, part.config)

    def wrap(transformer: LTXVideoTransformer3DModel) -> LtxVelocity:
        return LtxVelocity(transformer, geometry)

    return load_sharded(LTXVideoTransformer3DModel, part, wrap, dtype, device, prepare)


def load_ltx_vae(folder: Path, dtype: torch.dtype = torch.float32) -> LtxCodec:
    """Load the autoencoder of an LTX-Video folder, frozen."""
    require_ltx_index(folder)
    vae = load_network(AutoencoderKLLTXVideo, check_ltx_component(folder, VAE), dtype=dtype)
    return LtxCodec(vae.requires_grad_(False))


def save_ltx_generator(
    dst: Path,
    base: Path,
    weights: Mapping[str, Tensor],
    flow_shift: float | None,
    components: Components = "copy",
) -> None:
    """Write a folder with a new denoiser; see `ModelFamily.export`."""
    require_ltx_index(base)
    config = read_ltx_component(base, TRANSFORMER)
    geometry = ltx_geometry(base, config)
    network: Any = build_without_weights(base / TRANSFORMER, config, _kind(TRANSFORMER))
    denoiser = LtxVelocity(network, geometry)
    denoiser.load_state_dict(dict(weights), assign=True)
    # LTXPipeline hands this scheduler equal steps, which it shifts: the grid of the training.
    own = None if flow_shift is None else FlowMatchEulerDiscreteScheduler(shift=flow_shift)
    index = read_model_json(base / INDEX_FILE)
    with whole_folder(dst) as draft:
        copy_components(base, draft, LAYOUT, (TOKENIZER, VAE, TEXT_ENCODER), components)
        # Positions are computed by it, whatever else is left out.
        copy_config(base / VAE, draft / VAE)
        index |= place_scheduler(base, draft, LAYOUT, own)
        (draft / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
        network.save_pretrained(draft / TRANSFORMER)


def check_ltx_component(folder: Path, component: str) -> CheckedComponent:
    """Check one component, reading its configuration and its weight headers.

    Raises:
        ModelFolderError: A file is missing, torn or of another network.
    """
    return check_network(
        folder / component, read_ltx_component(folder, component), _kind(component)
    )


def _kind(component: str) -> NetworkKind:
    if component == TEXT_ENCODER:
        return text_encoder_kind()
    if component == TRANSFORMER:
        return NetworkKind(LTXVideoTransformer3DModel.from_config, LAYOUT.weights[TRANSFORMER])
    return NetworkKind(AutoencoderKLLTXVideo.from_config, LAYOUT.weights[VAE], counts=())
