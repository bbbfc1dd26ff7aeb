"""Adapters as files: merged into a base's weights, or alone as diffusers loads them.

merged_weights    base + alpha / rank * B A, in float32      a denoiser's parameters
save_lora         FOLDER/pytorch_lora_weights.safetensors    pipeline.load_lora_weights(FOLDER)
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sgmd_core.errors import CheckpointError
from workers.models.families import family_of
from workers.models.low_rank import LowRank
from workers.settings import LoraSettings

_FIRST, _SECOND = ".lora_A.default.weight", ".lora_B.default.weight"


@torch.no_grad()
def merged_weights(
    base_folder: str | Path, adapters: Mapping[str, Tensor], lora: LoraSettings
) -> dict[str, Tensor]:
    """Parameters of a denoiser with its adapters merged, in float32.

    Args:
        base_folder: Model folder that the adapters were trained over.
        adapters: A and B by name, as a generator's checkpoint has them.
        lora: Their settings.

    Raises:
        ModelFolderError: The base folder is missing, torn or of another family.
        CheckpointError: The adapters are not those of this denoiser.
    """
    folder = Path(base_folder)
    merged = family_of(folder).load_denoiser(folder).state_dict()
    for name, (first, second) in _pairs(adapters).items():
        weight = merged.get(f"{name}.weight")
        if weight is None or weight.shape != (second.shape[0], first.shape[1]):
            raise CheckpointError(
                f"merging adapters into {folder}",
                f"an adapter of {name}, {tuple(second.shape)} x {tuple(first.shape)}",
                "adapters of the denoiser of this folder",
                "Give the model folder that the run was started with",
            )
        weight += lora.scale * (second.float().cpu() @ first.float().cpu())
    return merged


@torch.no_grad()
def adapter_factors(adapters: Mapping[str, Tensor], lora: LoraSettings) -> dict[str, LowRank]:
    """Adapters as what they are: an exact change of low rank, by the name of its projection.

    Args:
        adapters: A and B by name, as a generator's checkpoint has them.
        lora: Their settings; the scale goes into B, so that a reader needs no alpha.

    Raises:
        CheckpointError: The weights are not adapters.
    """
    found: dict[str, LowRank] = {}
    for name, (first, second) in _pairs(adapters).items():
        up, down = (lora.scale * second.float()).contiguous(), first.float().contiguous()
        # The squared norm of `up @ down`, by products of the small sides.
        energy = float(((up.mT @ up).double() * (down @ down.mT).double()).sum())
        found[name] = LowRank(up, down, energy, 1.0)
    return found


def _pairs(adapters: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by the name of their projection.

    Raises:
        CheckpointError: Something else is among them, or half of a pair.
    """
    names = [name.removesuffix(_FIRST) for name in adapters if name.endswith(_FIRST)]
    expected = {name + end for name in names for end in (_FIRST, _SECOND)}
    odd = sorted(expected ^ set(adapters))
    if odd or not names:
        raise CheckpointError(
            "reading adapters",
            f"{odd[0]} without its other half" if odd else "no adapters",
            "A and B of each projection",
            "Export a checkpoint of a run with generator.lora",
        )
    return {name: (adapters[name + _FIRST], adapters[name + _SECOND]) for name in names}
