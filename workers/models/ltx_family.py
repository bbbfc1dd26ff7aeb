"""LTX-Video as a model family, and the checks that tell its folders by their configurations alone.

    transformer/     LTXVideoTransformer3DModel      model_index.json says LTXPipeline
    text_encoder/    T5EncoderModel
    vae/             AutoencoderKLLTXVideo

    ltx          networks and pipeline        ltx_text      captions

No network library is imported before a method needs one.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    require_plain_weights,
)
from workers.models.exporting import Components
from workers.models.family import Denoiser, FamilyTraits
from workers.models.folder import (
    ClipGeometry,
    EncoderSizes,
    ModelFolder,
    geometry_as_released,
    one_denoiser_layout,
    require_class,
)
from workers.models.sampling import SamplingRules
from workers.models.shape import ModelShape
from workers.models.vocabulary import CaptionTokenizer, LibraryTokenizer
from workers.models.wan_arithmetic import WanShape
from workers.models.weights import lacks_weights

if TYPE_CHECKING:
    from workers.models.ltx import LtxCodec, LtxSampler
    from workers.models.ltx_text import LtxCaptions

LTX = "ltx"
TRANSFORMER, VAE, TEXT_ENCODER = "transformer", "vae", "text_encoder"
TOKENIZER = "tokenizer"
REMEDY = "Give a complete diffusers folder of an LTX-Video text-to-video model"
FRAME_RATE = 25
"""Frames a second that positions in time are computed for: LTXPipeline's own default."""

_PIPELINE_CLASS = "LTXPipeline"
_CLASSES = {
    TRANSFORMER: ["diffusers", "LTXVideoTransformer3DModel"],
    VAE: ["diffusers", "AutoencoderKLLTXVideo"],
    TEXT_ENCODER: ["transformers", "T5EncoderModel"],
}
# The released denoisers have these; the arithmetic and the packing of latents rely on them.
_FIXED = {
    "patch_size": 1,
    "patch_size_t": 1,
    "attention_bias": True,
    "attention_out_bias": True,
    "norm_elementwise_affine": False,
}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    TRANSFORMER: {
        "in_channels": 128,
        "num_attention_heads": 32,
        "attention_head_dim": 64,
        "num_layers": 28,
        "caption_channels": 4096,
    },
    VAE: {
        "latent_channels": 128,
        "patch_size": 4,
        "patch_size_t": 1,
        "spatio_temporal_scaling": (True, True, True, False),
    },
}
LAYOUT = one_denoiser_layout(_PIPELINE_CLASS, _CLASSES[TRANSFORMER][1])


@dataclass(frozen=True, slots=True)
class LtxShape(WanShape):
    """The numbers that fix an LTX-Video denoiser.

    The products of its layers are those of a Wan with a feed-forward part of four times the width
    and a patch of one cell. Two vectors a layer fewer: its norms have no weights. The bytes are
    those of such a Wan, and were not counted on LTX-Video.
    """

    @property
    def num_parameters(self) -> int:
        """Parameters, biases and norms included."""
        return WanShape.num_parameters.fget(self) - 2 * self.num_layers * self.width  # pyright: ignore

    @property
    def parameters_per_layer(self) -> int:
        """Parameters of one layer."""
        return WanShape.parameters_per_layer.fget(self) - 2 * self.width  # pyright: ignore

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Linear projections of one layer: sizes in and out by name."""
        named: dict[str, tuple[int, int]] = WanShape.projections.fget(self)  # pyright: ignore
        return {name.replace("ffn.", "ff."): sizes for name, sizes in named.items()}


def ltx_shape(num_layers: int, width: int, text_width: int, channels: int) -> LtxShape:
    """Shape of a denoiser of these sizes."""
    return LtxShape(
        num_layers, width, 4 * width, text_width, 256, channels, channels, patch_size=(1, 1, 1)
    )


_TRAITS = FamilyTraits(
    about="text to video",
    layout=LAYOUT,
    sampling=SamplingRules(
        source="LTXPipeline",
        # LTXPipeline refuses other sizes, whatever the networks could do.
        multiple_px=32,
        num_steps=50,
        guidance_scale=3.0,
        flow_shift=1.0,
        text_length=128,
        num_frames=161,
        height=512,
        width=704,
        fps=FRAME_RATE,
    ),
    computes=frozenset({"bf16", "checkpointing", "selective", "offload", "compile", "lora"}),
    relatives={
        "LTXConditionPipeline": "a model that takes images or videos besides the text",
        "LTXLatentUpsamplePipeline": "an upscaler of latents",
    },
    released={
        "ltx-2b": ModelShape(
            ltx_shape(num_layers=28, width=2048, text_width=4096, channels=128),
            ClipGeometry(128, temporal_factor=8, spatial_factor=32),
            # T5-XXL's encoder, and AutoencoderKLLTXVideo as it is released.
            EncoderSizes(text=4_762_310_656, autoencoder=419_193_649),
        )
    },
    modules=("workers.models.ltx", "workers.models.ltx_text"),
)


class LtxFamily:
    """LTX-Video text-to-video models; see `ModelFamily`."""

    name = LTX
    traits = _TRAITS

    def explain_files(self, folder: Path) -> ModelFolderError | None:
        """None: no other layout of it is known here."""
        del folder
        return None

    def read_shape(self, folder: Path) -> ModelShape:
        """Read the shape from the configurations of denoiser and autoencoder."""
        if (folder / INDEX_FILE).exists():
            require_ltx_index(folder)
        config = read_ltx_component(folder, TRANSFORMER)
        shape = ltx_shape(
            config["num_layers"],
            config["num_attention_heads"] * config["attention_head_dim"],
            config["caption_channels"],
            config["in_channels"],
        )
        return ModelShape(shape, ltx_geometry(folder, config))

    def shape_from_record(self, record: Mapping[str, Any]) -> LtxShape:
        """Rebuild a shape from the fields of `LtxShape`."""
        return LtxShape(**{**record, "patch_size": tuple(record["patch_size"])})

    def inspect(self, folder: Path) -> ModelFolder:
        """Check configurations and weight headers."""
        with paused_collector():
            from workers.models.ltx import check_ltx_component

        require_ltx_index(folder)
        left_out = [name for name in LAYOUT.dispensable if lacks_weights(folder / name)]
        own = [name for name in _CLASSES if name not in left_out]
        parts = {name: check_ltx_component(folder, name) for name in own}
        transformer = parts[TRANSFORMER].config
        geometry = ltx_geometry(folder, transformer)
        for found, expected in (
            (
                ("transformer in_channels", transformer["in_channels"]),
                ("vae latent_channels", geometry.latent_channels),
            ),
            *(
                (
                    ("transformer caption_channels", transformer["caption_channels"]),
                    (f"{name} d_model", parts[name].config["d_model"]),
                )
                for name in own
                if name == TEXT_ENCODER
            ),
        ):
            if found[1] != expected[1]:
                raise ModelFolderError(
                    f"reading {folder}",
                    f"{found[0]} {found[1]} and {expected[0]} {expected[1]}",
                    "the same number: components of one text-to-video model",
                    REMEDY,
                )
        return ModelFolder(
            path=folder,
            family=LTX,
            layout=LAYOUT,
            geometry=geometry,
            text_width=transformer["caption_channels"],
            num_parameters={name: part.architecture.num_parameters for name, part in parts.items()},
            weights={name: part.weights for name, part in parts.items()},
        )

    def load_denoiser(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        prepare: Callable[[Denoiser], object] | None = None,
    ) -> Denoiser:
        """Load the transformer."""
        with paused_collector():
            from workers.models.ltx import load_ltx_transformer

        return load_ltx_transformer(folder, dtype, device, prepare)

    def load_text(self, folder: Path, dtype: torch.dtype | None = None) -> "LtxCaptions":
        """Load tokenizer and T5 encoder."""
        with paused_collector():
            from workers.models.ltx_text import load_ltx_text

        return load_ltx_text(folder, dtype)

    def load_autoencoder(self, folder: Path, dtype: torch.dtype = torch.float32) -> "LtxCodec":
        """Load the autoencoder."""
        with paused_collector():
            from workers.models.ltx import load_ltx_vae

        return load_ltx_vae(folder, dtype)

    def load_tokenizer(self, folder: Path) -> CaptionTokenizer:
        """Load the tokenizer; LTXPipeline takes captions as they are."""
        with paused_collector():
            from workers.models.loading import load_tokenizer

        require_ltx_index(folder)
        return LibraryTokenizer(load_tokenizer(folder / TOKENIZER), str)

    def open_sampler(self, folder: Path, device: str) -> "LtxSampler":
        """Load an LTXPipeline."""
        with paused_collector():
            from workers.models.ltx import LtxSampler

        return LtxSampler(folder, device)

    def export(
        self,
        dst: Path,
        base_folder: Path,
        weights: Mapping[str, Tensor],
        *,
        flow_shift: float | None,
        components: Components = "copy",
    ) -> None:
        """Write a folder that LTXPipeline loads."""
        with paused_collector():
            from workers.models.ltx import save_ltx_generator

        save_ltx_generator(dst, base_folder, weights, flow_shift, components)


def require_ltx_index(folder: Path) -> None:
    """Check model_index.json: an LTXPipeline of these components.

    Raises:
        ModelFolderError: It is missing, no JSON, or of another kind of model.
    """
    index = read_model_json(folder / INDEX_FILE)
    expected = {"_class_name": _PIPELINE_CLASS, **_CLASSES}
    for key, value in expected.items():
        require_class(folder, index, key, value, LAYOUT, REMEDY)


def read_ltx_component(folder: Path, component: str) -> Mapping[str, Any]:
    """Read and check the configuration of one component.

    Raises:
        ModelFolderError: It is missing, no JSON, of another class, quantized, an adapter, or of a
            denoiser that no release has.
    """
    part = folder / component
    config = read_model_json(part / CONFIG_FILE)
    expected = _CLASSES[component][1]
    found = config.get("_class_name")
    if component == TEXT_ENCODER:
        found = expected if config.get("model_type") == "t5" else config.get("model_type")
    if found != expected:
        raise ModelFolderError(
            f"reading {part / CONFIG_FILE}", f"a {found}", f"a {expected}", REMEDY
        )
    require_plain_weights(part, config)
    # A key that the file leaves out has the default of the class.
    config = {**_DEFAULTS.get(component, {}), **config}
    _require_kinds(part, component, config, expected)
    if component == TRANSFORMER:
        _require_released_kind(part, config)
    return config


def _require_kinds(part: Path, component: str, config: Mapping[str, Any], network: str) -> None:
    """Checks the values that sizes are computed from."""
    for name, default in _DEFAULTS.get(component, {}).items():
        value = config[name]
        if isinstance(default, tuple):
            fits = isinstance(value, list | tuple) and all(isinstance(v, bool) for v in value)
        else:
            fits = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if not fits:
            raise ModelFolderError(
                f"reading {part / CONFIG_FILE}",
                f"{name} is {str(value)[:80]}",
                f"the configuration of a {network}",
                REMEDY,
            )
    for name in ("temporal_compression_ratio", "spatial_compression_ratio"):
        value = config.get(name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ModelFolderError(
                f"reading {part / CONFIG_FILE}", f"{name} is {str(value)[:80]}", "a factor", REMEDY
            )


def clip_geometry(vae: Mapping[str, Any]) -> ClipGeometry:
    """Sizes of latents by the configuration of the autoencoder."""
    halvings = 2 ** sum(vae["spatio_temporal_scaling"])
    temporal = vae.get("temporal_compression_ratio") or vae["patch_size_t"] * halvings
    spatial = vae.get("spatial_compression_ratio") or vae["patch_size"] * halvings
    return ClipGeometry(vae["latent_channels"], temporal, spatial)


def ltx_geometry(folder: Path, denoiser: Mapping[str, Any]) -> ClipGeometry:
    """Sizes of latents of a folder, also without its autoencoder's configuration.

    Args:
        folder: The folder.
        denoiser: Configuration of its denoiser.

    Raises:
        ModelFolderError: The configuration cannot be read, or there is none, and no released model
            has so many channels.
    """
    if os.path.lexists(folder / VAE / CONFIG_FILE):
        return clip_geometry(read_ltx_component(folder, VAE))
    released = [shape.geometry for shape in _TRAITS.released.values()]
    return geometry_as_released(folder, VAE, denoiser["in_channels"], (1, 1, 1), released)


def _require_released_kind(part: Path, config: Mapping[str, Any]) -> None:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    wanted = {**_FIXED, "cross_attention_dim": width, "out_channels": config["in_channels"]}
    other = [
        f"{key} is {config[key]!r} and not {value!r}"
        for key, value in wanted.items()
        if key in config and config[key] != value
    ]
    if other:
        raise ModelFolderError(
            f"reading {part / CONFIG_FILE}",
            ", ".join(other),
            "the denoiser of an LTX-Video text-to-video model",
            REMEDY,
        )
