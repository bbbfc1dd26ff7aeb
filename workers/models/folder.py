"""Check a diffusers Wan folder before a long job starts, without reading a value of its weights.

configurations -> networks without weights -> names, shapes and dtypes in the headers
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgmd_core.errors import ModelFolderError, ShapeError
from workers.models.architecture import architecture_of, build_without_weights
from workers.models.family import (
    REMEDY,
    TEXT_ENCODER,
    TRANSFORMER,
    VAE,
    read_component,
    read_configs,
)
from workers.models.weights import Architecture, WeightFiles, check_weights


@dataclass(frozen=True, slots=True)
class WanFolder:
    """Content of a Wan folder.

    Attributes:
        path: The folder.
        latent_channels: Channels of the latents.
        temporal_factor: Video frames a latent frame after the first one.
        spatial_factor: Pixels a latent cell, along height and width.
        patch_size: Latent cells a transformer token, along time, height and width.
        text_width: Width of a caption embedding.
        num_parameters: Parameters by component, each counted once.
        weights: Weight files by component.
    """

    path: Path
    latent_channels: int
    temporal_factor: int
    spatial_factor: int
    patch_size: tuple[int, int, int]
    text_width: int
    num_parameters: dict[str, int]
    weights: dict[str, WeightFiles]

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape (channels, frames, rows, columns) of one clip's latents.

        Raises:
            ShapeError: The clip does not divide into latent cells and transformer patches.
        """
        per_frame = self.temporal_factor * self.patch_size[0]
        row, column = (self.spatial_factor * size for size in self.patch_size[1:])
        if (num_frames - 1) % per_frame or height % row or width % column:
            raise ShapeError(
                f"fitting clips to the networks in {self.path}",
                f"{num_frames} frames of {height}x{width}",
                f"1 + a multiple of {per_frame} frames, height a multiple of {row} and width a "
                f"multiple of {column}",
                "Correct video.num_frames, video.height or video.width",
            )
        frames = (num_frames - 1) // self.temporal_factor + 1
        return (
            self.latent_channels,
            frames,
            height // self.spatial_factor,
            width // self.spatial_factor,
        )


@dataclass(frozen=True, slots=True)
class CheckedComponent:
    """A component whose weights are those of its network.

    Attributes:
        path: Its folder.
        config: Its configuration, with the defaults of what the file leaves out.
        architecture: The tensors of its network.
        weights: Its weight files.
    """

    path: Path
    config: dict[str, Any]
    architecture: Architecture
    weights: WeightFiles


def inspect_wan_folder(folder: str | Path) -> WanFolder:
    """Read configurations and weight headers of a diffusers Wan folder.

    Raises:
        ModelFolderError: The folder, a component or a weight file is missing, torn or of another
            kind of model, or weights and configurations do not belong together; names the file.
    """
    configs = read_configs(folder)
    parts = {name: check_component(configs.path, name) for name in configs.components}
    transformer, vae = parts[TRANSFORMER].config, parts[VAE].config
    _require_alike(
        configs.path,
        ("transformer in_channels", transformer["in_channels"]),
        ("vae z_dim", vae["z_dim"]),
    )
    _require_alike(
        configs.path,
        ("transformer text_dim", transformer["text_dim"]),
        ("text_encoder d_model", parts[TEXT_ENCODER].config["d_model"]),
    )
    _require_statistics(configs.path / VAE, vae)
    frames, rows, columns = transformer["patch_size"]
    return WanFolder(
        path=configs.path,
        latent_channels=vae["z_dim"],
        temporal_factor=vae["scale_factor_temporal"],
        spatial_factor=vae["scale_factor_spatial"],
        patch_size=(frames, rows, columns),
        text_width=transformer["text_dim"],
        num_parameters={name: part.architecture.num_parameters for name, part in parts.items()},
        weights={name: part.weights for name, part in parts.items()},
    )


def check_component(folder: Path, component: str) -> CheckedComponent:
    """Check one component of a folder, reading its configuration and its weight headers.

    Raises:
        ModelFolderError: As `inspect_wan_folder`.
    """
    part = folder / component
    network: Any = build_without_weights(part, read_component(folder, component))
    architecture = architecture_of(part, network)
    config = network.config
    settings = config.to_dict() if component == TEXT_ENCODER else dict(config)
    return CheckedComponent(part, settings, architecture, check_weights(part, architecture))


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
        if fits and name == "latents_std":
            fits = all(value > 0 for value in values or ())
        if not fits:
            raise ModelFolderError(
                f"reading {part}",
                f"{name} = {values}",
                f"{config['z_dim']} numbers" + ", above 0" * (name == "latents_std"),
                REMEDY,
            )
