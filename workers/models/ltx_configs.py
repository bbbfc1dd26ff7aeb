"""Checks that recognise an LTX-Video folder by its configurations alone.

No weight file is opened: `ltx` checks those.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgmd_core.errors import ModelFolderError
from workers.models.configs import (
    CONFIG_FILE,
    INDEX_FILE,
    read_model_json,
    require_plain_weights,
)
from workers.models.folder import (
    ClipGeometry,
    geometry_as_released,
    one_denoiser_layout,
    require_class,
)

LTX = "ltx"
TRANSFORMER, VAE, TEXT_ENCODER = "transformer", "vae", "text_encoder"
TOKENIZER = "tokenizer"
REMEDY = "Give a complete diffusers folder of an LTX-Video text-to-video model"
FRAME_RATE = 25
"""Frames a second that positions in time are computed for: LTXPipeline's own default."""

_PIPELINE_CLASS = "LTXPipeline"
CLASSES = {
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
LAYOUT = one_denoiser_layout(_PIPELINE_CLASS, CLASSES[TRANSFORMER][1])
LTX_GEOMETRY = ClipGeometry(128, temporal_factor=8, spatial_factor=32)


def require_ltx_index(folder: Path) -> None:
    """Check model_index.json: an LTXPipeline of these components.

    Raises:
        ModelFolderError: It is missing, no JSON, or of another kind of model.
    """
    index = read_model_json(folder / INDEX_FILE)
    expected = {"_class_name": _PIPELINE_CLASS, **CLASSES}
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
    expected = CLASSES[component][1]
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
    channels = denoiser["in_channels"]
    return geometry_as_released(folder, VAE, channels, (1, 1, 1), [LTX_GEOMETRY])


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
