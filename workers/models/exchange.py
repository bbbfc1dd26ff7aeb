"""Files in which other programs take a denoiser: their formats, and what a family does for them."""

from collections.abc import Mapping
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


class ExchangeFiles(Protocol):
    """Writes a family's denoiser in these formats, and reads it as its users would.

    Names of weights are those of the `Denoiser`.
    """

    def write_weights(self, form: str, path: Path, weights: Mapping[str, Tensor]) -> None:
        """Write all weights, in the types that they have; `form` is one of `WEIGHT_FORMATS`."""
        ...

    def read_weights(self, path: Path, base_folder: Path) -> dict[str, Tensor]:
        """Read such a file in float32; the base folder has the configuration."""
        ...

    def write_low_rank(
        self, form: str, path: Path, factors: Mapping[str, LowRank], dtype: torch.dtype
    ) -> None:
        """Write matrices of low rank by name of their layer; `form` is one of `LORA_FORMATS`."""
        ...

    def read_low_rank(self, path: Path, base_folder: Path) -> dict[str, Tensor]:
        """Read a LoRA and return the base's weights with it merged in, in float32."""
        ...
