"""Records of a checked model folder: its layout, its clip sizes, its weight files."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import lcm
from pathlib import Path
from typing import Any

from sgmd_core.errors import ModelFolderError, ShapeError
from workers.models.configs import INDEX_FILE, read_model_json
from workers.models.weights import (
    DIFFUSERS_STEM,
    TRANSFORMERS_STEM,
    WeightFiles,
    lacks_weights,
)

LatentShape = tuple[int, int, int, int]
"""Channels, frames, rows, columns of one clip's latents."""


@dataclass(frozen=True, slots=True)
class FolderLayout:
    """Sub-folders of a family's model folders.

    Attributes:
        pipeline_class: `_class_name` in model_index.json.
        denoiser_class: `_class_name` in the denoiser's config.json.
        denoiser: Component of the denoiser.
        autoencoder: Component of the autoencoder.
        text: Components that an embedding depends on, in the order of their fingerprint.
        weights: Stem of the weight files by component, for every component that has weights.
        files: Components without weights, such as tokenizer and scheduler.
        experts: Further denoisers, each for a range of noise levels of its own.
    """

    pipeline_class: str
    denoiser_class: str
    denoiser: str
    autoencoder: str
    text: tuple[str, ...]
    weights: Mapping[str, str]
    files: tuple[str, ...]
    experts: tuple[str, ...] = ()

    @property
    def denoisers(self) -> tuple[str, ...]:
        """Components of the denoiser."""
        return (self.denoiser, *self.experts)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Components of the text that have weights."""
        return tuple(name for name in self.text if name in self.weights)

    @property
    def dispensable(self) -> tuple[str, ...]:
        """Components whose weights may be left out, for runs that need none of them."""
        return tuple(name for name in (*self.text, self.autoencoder) if name in self.weights)

    @property
    def components(self) -> tuple[str, ...]:
        """Components that decide what a model makes."""
        return (*self.weights, *self.files)


def one_denoiser_layout(pipeline_class: str, denoiser_class: str) -> FolderLayout:
    """Layout of most text-to-video pipelines of diffusers: one denoiser, one text encoder.

    Args:
        pipeline_class: `_class_name` in model_index.json.
        denoiser_class: `_class_name` in the denoiser's config.json.
    """
    return FolderLayout(
        pipeline_class=pipeline_class,
        denoiser_class=denoiser_class,
        denoiser="transformer",
        autoencoder="vae",
        text=("text_encoder", "tokenizer"),
        # In this order digests of whole folders were taken from the first run on.
        weights={
            "transformer": DIFFUSERS_STEM,
            "text_encoder": TRANSFORMERS_STEM,
            "vae": DIFFUSERS_STEM,
        },
        files=("tokenizer", "scheduler"),
    )


@dataclass(frozen=True, slots=True)
class ClipGeometry:
    """Sizes of latents for the clips that a model can make.

    Attributes:
        latent_channels: Channels of the latents.
        temporal_factor: Video frames a latent frame after the first one.
        spatial_factor: Pixels a latent cell, along height and width.
        patch_size: Latent cells a token of the denoiser, along time, height and width.
        sampled_px: Pixels that the pipeline asks sides to be multiples of besides, for sizes that
            are proposed.
    """

    latent_channels: int
    temporal_factor: int
    spatial_factor: int
    patch_size: tuple[int, int, int] = (1, 1, 1)
    sampled_px: int = field(default=1, compare=False)

    def latent_shape(
        self, num_frames: int, height: int, width: int, attempted: str = "sizing latents"
    ) -> LatentShape:
        """Shape of one clip's latents.

        Args:
            num_frames: Video frames.
            height: Pixels.
            width: Pixels.
            attempted: Purpose, for the error.

        Raises:
            ShapeError: The clip does not divide into latent cells and patches.
        """
        # The first latent frame holds one video frame, and each after it `temporal_factor`.
        per_frame = self.temporal_factor * self.patch_size[0]
        first = 1 + per_frame - self.temporal_factor
        row, column = (self.spatial_factor * size for size in self.patch_size[1:])
        if num_frames < first or (num_frames - first) % per_frame or height % row or width % column:
            sides = f"height a multiple of {row} and width a multiple of {column}"
            if row == column:
                sides = f"height and width multiples of {row}"
            raise ShapeError(
                attempted,
                f"{num_frames} frames of {height}x{width}",
                f"frames = {first} + a multiple of {per_frame}, {sides}; the nearest are "
                f"{_nearest(num_frames - first, per_frame, first=first)} frames, height "
                f"{_nearest(height, lcm(row, self.sampled_px))}, width "
                f"{_nearest(width, lcm(column, self.sampled_px))}",
                "Correct video.num_frames, video.height or video.width",
            )
        return (
            self.latent_channels,
            (num_frames - 1) // self.temporal_factor + 1,
            height // self.spatial_factor,
            width // self.spatial_factor,
        )


def _nearest(size: int, step: int, *, first: int = 0) -> str:
    """The sizes `first` + a multiple of a step on both sides, or the size itself, in words."""
    below = max(size, 0) // step * step
    around = {below, below if size == below else below + step}
    # Frames begin at `first`; sides at one step.
    return " or ".join(str(first + each) for each in sorted(around) if first + each > 0)


def geometry_as_released(
    folder: Path,
    component: str,
    channels: int,
    patch_size: tuple[int, int, int],
    released: Iterable[ClipGeometry],
) -> ClipGeometry:
    """Sizes of latents of a folder without a configuration of its autoencoder.

    Args:
        folder: The folder.
        component: Its autoencoder.
        channels: Latent channels of its denoiser.
        patch_size: Patch of its denoiser.
        released: Sizes of the released models of its family.

    Raises:
        ModelFolderError: No released model has so many channels.
    """
    for geometry in released:
        if geometry.latent_channels == channels:
            return replace(geometry, patch_size=patch_size)
    file = f"{component}/config.json"
    raise ModelFolderError(
        f"reading {folder}",
        f"no {file}, and a denoiser of {channels} channels, which no released model has",
        "the configuration of the autoencoder, which says how large clips are for their latents",
        f"Download this one small file: hf download REPOSITORY {file} --local-dir {folder}",
    )


@dataclass(frozen=True, slots=True)
class EncoderSizes:
    """Parameters of the networks beside the denoiser.

    Attributes:
        text: Of the text encoder.
        autoencoder: Of the autoencoder, and of what else is not text and not the denoiser.
    """

    text: int
    autoencoder: int


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model folder whose configurations and weight headers have been checked.

    Attributes:
        path: The folder.
        family: Name of its family.
        layout: Its components.
        geometry: Clips that it can make.
        text_width: Width of a caption embedding.
        num_parameters: Parameters by component, each counted once.
        weights: Weight files by component; without text encoder or autoencoder that were left out.
    """

    path: Path
    family: str
    layout: FolderLayout
    geometry: ClipGeometry
    text_width: int
    num_parameters: Mapping[str, int]
    weights: Mapping[str, WeightFiles]

    @property
    def has_text_encoder(self) -> bool:
        """False where the weights of the text encoder were left out: it embeds nothing."""
        return all(name in self.weights for name in self.layout.text_encoders)

    @property
    def has_autoencoder(self) -> bool:
        """False where the weights of the autoencoder were left out: nothing is decoded."""
        name = self.layout.autoencoder
        return name in self.weights or name not in self.layout.weights

    @property
    def num_denoiser_parameters(self) -> int:
        """Parameters of the denoiser."""
        return sum(self.num_parameters[name] for name in self.layout.denoisers)

    @property
    def num_text_parameters(self) -> int:
        """Parameters of the text encoder."""
        return sum(self.num_parameters.get(name, 0) for name in self.layout.text)

    @property
    def encoder_sizes(self) -> EncoderSizes:
        """Parameters of all networks but the denoiser."""
        rest = sum(self.num_parameters.values()) - self.num_denoiser_parameters
        return EncoderSizes(self.num_text_parameters, rest - self.num_text_parameters)

    def latent_shape(self, num_frames: int, height: int, width: int) -> LatentShape:
        """Shape of one clip's latents.

        Raises:
            ShapeError: The clip does not divide into latent cells and patches.
        """
        attempted = f"fitting clips to the networks in {self.path}"
        return self.geometry.latent_shape(num_frames, height, width, attempted)


def require_autoencoder(model: ModelFolder, attempted: str, otherwise: str = "") -> None:
    """Checks that a folder can decode latents, and encode videos.

    Args:
        model: The folder.
        attempted: Purpose, for the error.
        otherwise: Words on what does without one, for the error.

    Raises:
        ModelFolderError: The weights of its autoencoder were left out.
    """
    if not model.has_autoencoder:
        name = model.layout.autoencoder
        raise ModelFolderError(
            attempted,
            f"no weights in {model.path / name}",
            "an autoencoder, which makes clips of latents and latents of clips",
            f"Download it: hf download REPOSITORY --include '{name}/*' --local-dir {model.path}; "
            f"or link it from another copy of the model{_to_be_named(model, [name])}{otherwise}",
        )


def require_encoders(model: ModelFolder, attempted: str) -> None:
    """Checks that a folder can turn prompts into clips.

    Raises:
        ModelFolderError: The weights of its text encoder or of its autoencoder were left out.
    """
    require_text_encoder(model, attempted)
    require_autoencoder(model, attempted)


def require_text_encoder(model: ModelFolder, attempted: str) -> None:
    """Checks that a folder can embed prompts.

    Raises:
        ModelFolderError: The weights of its text encoder were left out.
    """
    if not model.has_text_encoder:
        names = " and ".join(model.layout.text_encoders)
        raise ModelFolderError(
            attempted,
            f"no weights in {model.path / names}",
            "a text encoder, which embeds prompts",
            f"Download it: hf download REPOSITORY --include '{names}/*' --local-dir {model.path}"
            + _to_be_named(model, model.layout.text_encoders)
            + ". A distillation whose texts are all stored needs none",
        )


def require_class(
    folder: Path,
    index: Mapping[str, Any],
    name: str,
    expected: object,
    layout: FolderLayout,
    remedy: str,
) -> None:
    """Checks what model_index.json says of a component, which is null where one is left out.

    Args:
        folder: The folder.
        index: Content of its model_index.json.
        name: The component.
        expected: What its family has there.
        layout: Layout of the family.
        remedy: What to do where the folder is of another model.

    Raises:
        ModelFolderError: It says something else, or null of a component that has weights.
    """
    found = index.get(name)
    is_null = name in layout.dispensable and _is_null(found)
    if found == expected or (is_null and lacks_weights(folder / name)):
        return
    if is_null:
        # Exports copy the index, and other programs load nothing that it does not name.
        remedy = f'{name}/ has weights: write "{name}": {json.dumps(expected)} into {INDEX_FILE}'
    words = f"{name} is {found}", f"{name} to be {expected}"
    raise ModelFolderError(f"reading {folder / INDEX_FILE}", *words, remedy)


def _to_be_named(model: ModelFolder, names: Iterable[str]) -> str:
    """Words on the model_index.json of a folder, where it has null for what is to be added."""
    if not (model.path / INDEX_FILE).is_file():
        return ""
    index = read_model_json(model.path / INDEX_FILE)
    null = " and ".join(name for name in names if _is_null(index.get(name)))
    return f", and write what REPOSITORY's {INDEX_FILE} has of {null} into this one" if null else ""


def _is_null(entry: object) -> bool:
    return entry in (None, [None, None])
