"""Looks a diffusers Wan folder over without loading a weight.

Configurations and safetensors headers say everything that has to fit before a long job starts:
families, sizes, factors, and whether each weight file is whole.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sgmd_core.errors import ModelFolderError, ShapeError

_FAMILIES = {
    "transformer": "WanTransformer3DModel",
    "vae": "AutoencoderKLWan",
    "text_encoder": "UMT5EncoderModel",
}
_ENDS_BYTES = 2**20
_REMEDY = "Point model.folder at a complete diffusers Wan text-to-video folder"


@dataclass(frozen=True, slots=True)
class WanFolder:
    """What a Wan folder holds.

    Attributes:
        path: The folder.
        latent_channels: Channels of the latents.
        temporal_factor: Video frames a latent frame after the first one.
        spatial_factor: Pixels a latent cell, along height and width.
        patch_size: Latent cells a transformer token, along time, height and width.
        text_width: Width of a caption embedding.
        num_parameters: Parameters by component.
    """

    path: Path
    latent_channels: int
    temporal_factor: int
    spatial_factor: int
    patch_size: tuple[int, int, int]
    text_width: int
    num_parameters: dict[str, int]

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


def inspect_wan_folder(folder: str | Path) -> WanFolder:
    """Reads configurations and weight headers of a diffusers Wan folder.

    Raises:
        ModelFolderError: The folder, a component or a weight file is missing, torn or of another
            family; names the file.
    """
    path = Path(folder)
    index = _read_json(path, "model_index.json")
    for component, family in _FAMILIES.items():
        found = index.get(component, [None, "nothing"])[1]
        if found != family:
            raise ModelFolderError(
                f"reading {path / 'model_index.json'}",
                f"{component} is {found}",
                f"{component} to be {family}",
                _REMEDY,
            )
    transformer = _read_json(path, "transformer/config.json")
    vae = _read_json(path, "vae/config.json")
    if transformer["in_channels"] != vae["z_dim"]:
        raise ModelFolderError(
            f"reading {path}",
            f"a denoiser for {transformer['in_channels']} latent channels and a VAE with "
            f"{vae['z_dim']}",
            "the same number (a text-to-video model; image-to-video models take more channels)",
            _REMEDY,
        )
    frames, rows, columns = transformer["patch_size"]
    return WanFolder(
        path=path,
        latent_channels=vae["z_dim"],
        # Folders written before diffusers stored the factors are Wan 2.1: 4 and 8.
        temporal_factor=vae.get("scale_factor_temporal", 4),
        spatial_factor=vae.get("scale_factor_spatial", 8),
        patch_size=(frames, rows, columns),
        text_width=transformer["text_dim"],
        num_parameters={name: _count_parameters(path / name) for name in _FAMILIES},
    )


def fingerprint(folder: str | Path, components: Sequence[str]) -> str:
    """Names the networks in some components of a folder, so that what they made can be recognised.

    Sizes and names of all files count, and of each the first and the last MiB: that is all of a
    configuration or a tokenizer, and of weights the header and the ends, which is quick for any
    size.

    Args:
        folder: Diffusers folder.
        components: Names of sub-folders, for example ["vae"].

    Raises:
        ModelFolderError: A component has no files.
    """
    digest = hashlib.sha256()
    for component in components:
        part = Path(folder) / component
        files = sorted(path for path in part.rglob("*") if path.is_file())
        if not files:
            raise ModelFolderError(f"looking for {part}", "no files there", remedy=_REMEDY)
        for path in files:
            size = path.stat().st_size
            digest.update(f"{component}/{path.relative_to(part)}\n{size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(_ENDS_BYTES))
                file.seek(-min(size, _ENDS_BYTES), os.SEEK_END)
                digest.update(file.read())
    return digest.hexdigest()[:16]


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((path / name).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ModelFolderError(
            f"reading {path / name}",
            f"{type(error).__name__}: {error}",
            "a diffusers model folder",
            _REMEDY,
        ) from error


def _count_parameters(component: Path) -> int:
    files = sorted(component.glob("*.safetensors"))
    if not files:
        raise ModelFolderError(
            f"looking for weights in {component}",
            "no .safetensors file",
            "safetensors weights (pickled .bin files are refused)",
            _REMEDY,
        )
    return sum(_parameters_in(file) for file in files)


def _parameters_in(file: Path) -> int:
    try:
        with safe_open(file, framework="pt") as weights:
            return sum(prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelFolderError(
            f"reading the header of {file}",
            f"{type(error).__name__}: {error}",
            "a complete safetensors file",
            "Copy the file again; it is probably cut short",
        ) from error
