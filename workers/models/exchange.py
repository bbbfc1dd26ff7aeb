"""Files in which other programs take a denoiser: their formats, and what a family does for them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from workers.models.low_rank import LowRank

SINGLE_FILE, COMFYUI = "single-file", "comfyui"
LORA, LORA_COMFYUI = "lora", "lora-comfyui"
WEIGHT_FORMATS = (SINGLE_FILE, COMFYUI)
"""Files of all weights."""

LORA_FORMATS = (LORA, LORA_COMFYUI)
"""Files of a change of low rank."""

LORA_STEM = "pytorch_lora_weights"
"""Name of a LoRA's file without suffix, where diffusers looks for it."""


@dataclass(frozen=True, slots=True)
class ScaledLora:
    """A LoRA and its strength.

    Attributes:
        paths: Files by part; a part without one stays as it is.
        strength: Factor of all of its changes.
    """

    paths: Mapping[str, Path]
    strength: float = 1.0


class ExchangeFiles(Protocol):
    """Writes a family's denoiser in these formats, and reads it as its users would.

    Names of weights are those of the `Denoiser`. Paths are given by part.
    """

    @property
    def parts(self) -> tuple[str, ...]:
        """Networks that get a file each: `("",)` for one, or the names of the experts."""
        ...

    def write_weights(
        self, form: str, paths: Mapping[str, Path], weights: Mapping[str, Tensor]
    ) -> None:
        """Write all weights, in the types that they have; `form` is one of `WEIGHT_FORMATS`."""
        ...

    def read_weights(self, paths: Mapping[str, Path], base_folder: Path) -> dict[str, Tensor]:
        """Read such files in float32; the base folder has the configuration."""
        ...

    def write_low_rank(
        self,
        form: str,
        paths: Mapping[str, Path],
        factors: Mapping[str, LowRank],
        dtype: torch.dtype,
    ) -> None:
        """Write matrices of low rank by name of their layer; `form` is one of `LORA_FORMATS`.

        A part of which there is none gets no file.
        """
        ...

    def read_low_rank(self, paths: Mapping[str, Path], base_folder: Path) -> dict[str, Tensor]:
        """Read LoRAs that `write_low_rank` has written, as another program would.

        Returns the base's weights with them merged in, in float32. A part without a path keeps the
        base's weights.
        """
        ...

    def merge_loras(self, loras: Sequence[ScaledLora], base_folder: Path) -> Mapping[str, Tensor]:
        """Merge LoRAs of any program into a base, in order; returns its weights in float32.

        Weights of a part that none of them has a file of are left out.

        Raises:
            ModelFolderError: A file has something that cannot be merged into this base; names it.
        """
        ...


def part_path(folder: Path, stem: str, part: str) -> Path:
    """File of a part in the folder of an export."""
    return folder / f"{stem}{part and f'-{part}'}.safetensors"


def part_by_name(path: Path, parts: Sequence[str]) -> str | None:
    """Part that a file's name says it is of: of experts by `high_noise`, `HighNoise`, `HIGH`, ...

    Returns None where the name says nothing, or both.
    """
    if len(parts) == 1:
        return parts[0]
    name = path.stem.lower()
    noises = set(re.findall(r"(high|low)[ _-]?noise", name))
    words = noises or set(re.findall(r"(?<![a-z])(high|low)(?![a-z])", name))
    found = [part for part in parts if words == {part.partition("_")[0]}]
    return found[0] if found else None
