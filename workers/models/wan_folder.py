"""Check a Wan folder before a long job starts, without reading a value of its weights.

configurations -> networks without weights -> names, shapes and dtypes in the headers
"""

import os
from pathlib import Path
from typing import Any

from sgmd_core.collector import paused_collector
from sgmd_core.errors import ModelFolderError
from workers.models.architecture import (
    CheckedComponent,
    NetworkKind,
    build_without_weights,
    check_network,
)
from workers.models.configs import CONFIG_FILE
from workers.models.folder import ClipGeometry, FolderLayout, ModelFolder
from workers.models.wan_configs import (
    EXPERTS_LAYOUT,
    LAYOUT,
    REMEDY,
    SAMPLED_PX,
    TEXT_ENCODER,
    TRANSFORMER,
    VAE,
    WAN,
    read_component,
    read_configs,
    wan_geometry,
)
from workers.models.weights import ForeignNames

_SCRIPT = "scripts/convert_wan_to_diffusers.py of diffusers"
_ORIGINAL_NAMES = ForeignNames(
    r"self_attn\.|^blocks\.\d+\.attn\.|^token_embedding\.|^(text|time)_embedding\.|^head\.|"
    r"^(encoder|decoder)\.(conv1|middle|downsamples|upsamples|head)\.|^conv[12]\.",
    "the names of the original Wan release",
    "Convert it: {convert}; " + _SCRIPT + " makes a whole folder",
)


def _kind(component: str) -> NetworkKind:
    """The network of a component; imports the library of that component alone."""
    if component == TEXT_ENCODER:
        with paused_collector():
            from transformers import UMT5Config, UMT5EncoderModel

        return NetworkKind(
            lambda config: UMT5EncoderModel(UMT5Config(**config)),
            LAYOUT.weights[TEXT_ENCODER],
            counts=("num_layers", "num_decoder_layers"),
            # The decoder of the model that the encoder was taken from.
            ignored=(r"^(decoder|lm_head)\.",),
            convert=_SCRIPT,
            foreign=(_ORIGINAL_NAMES,),
        )
    # Seconds of CPU, which a process of the text encoder spares.
    with paused_collector():
        from diffusers import AutoencoderKLWan, WanTransformer3DModel

    if component in EXPERTS_LAYOUT.denoisers:
        return NetworkKind(
            WanTransformer3DModel.from_config,
            LAYOUT.weights[TRANSFORMER],
            convert="sgmd import FILE DST --base FOLDER, with a diffusers folder of the same size",
            foreign=(_ORIGINAL_NAMES,),
        )
    return NetworkKind(
        AutoencoderKLWan.from_config,
        LAYOUT.weights[VAE],
        counts=("num_res_blocks",),
        convert="AutoencoderKLWan.from_single_file(FILE).save_pretrained(FOLDER)",
        foreign=(_ORIGINAL_NAMES,),
    )


def inspect_wan_folder(
    folder: str | Path, family: str = WAN, layout: FolderLayout = LAYOUT
) -> ModelFolder:
    """Read configurations and weight headers of a Wan folder.

    Args:
        folder: The folder.
        family: Name of its family.
        layout: Components that it must have.

    Raises:
        ModelFolderError: The folder, a component or a weight file is missing, torn or of another
            kind of model, or weights and configurations do not belong together; names the file.
    """
    configs = read_configs(folder, layout)
    parts = {name: check_component(configs.path, name) for name in configs.components}
    transformer = parts[TRANSFORMER].config
    if TEXT_ENCODER in parts:
        _require_alike(
            configs.path,
            ("transformer text_dim", transformer["text_dim"]),
            ("text_encoder d_model", parts[TEXT_ENCODER].config["d_model"]),
        )
    return ModelFolder(
        path=configs.path,
        family=family,
        layout=layout,
        geometry=_geometry(configs.path, transformer, parts.get(VAE)),
        text_width=transformer["text_dim"],
        num_parameters={name: part.architecture.num_parameters for name, part in parts.items()},
        weights={name: part.weights for name, part in parts.items()},
    )


def check_component(folder: Path, component: str) -> CheckedComponent:
    """Check one component of a Wan folder, reading its configuration and its weight headers.

    Raises:
        ModelFolderError: As `inspect_wan_folder`.
    """
    config = read_component(folder, component)
    return check_network(folder / component, config, _kind(component))


def build_component(folder: Path, component: str) -> Any:  # noqa: ANN401  (a network of diffusers)
    """Build the network of a component without weights, on the meta device.

    Raises:
        ModelFolderError: Its configuration is missing or of another network.
    """
    config = read_component(folder, component)
    return build_without_weights(folder / component, config, _kind(component))


def _geometry(
    path: Path, transformer: dict[str, Any], autoencoder: CheckedComponent | None
) -> ClipGeometry:
    """Sizes of latents, also of a folder without the autoencoder's weights or configuration."""
    frames, rows, columns = transformer["patch_size"]
    if autoencoder is not None:
        vae = autoencoder.config
    elif os.path.lexists(path / VAE / CONFIG_FILE):
        vae = dict(build_component(path, VAE).config)
    else:
        return wan_geometry(path, transformer["in_channels"], (frames, rows, columns))
    _require_alike(
        path,
        ("transformer in_channels", transformer["in_channels"]),
        ("vae z_dim", vae["z_dim"]),
    )
    _require_statistics(path / VAE, vae)
    return ClipGeometry(
        latent_channels=vae["z_dim"],
        temporal_factor=vae["scale_factor_temporal"],
        spatial_factor=vae["scale_factor_spatial"],
        patch_size=(frames, rows, columns),
        sampled_px=SAMPLED_PX,
    )


def _require_alike(path: Path, *settings: tuple[str, int]) -> None:
    if len({value for _, value in settings}) > 1:
        raise ModelFolderError(
            f"reading {path}",
            " and ".join(f"{name} {value}" for name, value in settings),
            "the same number: components of one text-to-video model",
            REMEDY,
        )


def _require_statistics(part: Path, config: dict[str, Any]) -> None:
    """Check the mean and the deviation that latents are normalised with."""
    for name in ("latents_mean", "latents_std"):
        values = config.get(name)
        fits = isinstance(values, list | tuple) and len(values) == config["z_dim"]
        fits = fits and all(isinstance(value, int | float) for value in values or ())
        if fits and name == "latents_std":
            fits = all(value > 0 for value in values or ())
        if not fits:
            raise ModelFolderError(
                f"reading {part}",
                f"{name} = {values}",
                f"{config['z_dim']} numbers" + ", above 0" * (name == "latents_std"),
                REMEDY,
            )
