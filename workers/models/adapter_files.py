"""Adapters in the forms that are exported: merged into a base's weights, or as factors.

merged_weights     base + alpha / rank * B A, in float32    a denoiser's parameters
adapter_factors    A and B with the scale in B              what `ExchangeFiles` writes as a LoRA
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sgmd_core.errors import CheckpointError
from workers.models.families import family_of
from workers.models.low_rank import LowRank
from workers.models.weight_changes import ChangedWeights, Product, WeightChange
from workers.network_settings import LoraSettings

_FIRST, _SECOND = ".lora_A.default.weight", ".lora_B.default.weight"


def merge_adapters(
    base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], lora: LoraSettings
) -> ChangedWeights:
    """Parameters of a denoiser with its adapters merged; those with adapters in float32.

    Args:
        base: Parameters of the base by name.
        adapters: A and B by name, as a generator's checkpoint has them.
        lora: Their settings.

    Raises:
        CheckpointError: The adapters are not those of this base.
    """
    changes: dict[str, list[WeightChange]] = {}
    for layer, (first, second) in _pairs(adapters).items():
        name, change = f"{layer}.weight", Product(second, first, lora.scale)
        if name not in base or base[name].shape != change.shape:
            raise CheckpointError(
                "merging adapters into a base",
                f"an adapter of {name}, {tuple(second.shape)} x {tuple(first.shape)}",
                "adapters of this base",
                "Give the model folder that the run was started with",
            )
        changes[name] = [change]
    return ChangedWeights(base, changes)


def merged_weights(
    base_folder: str | Path,
    adapters: Mapping[str, Tensor],
    lora: LoraSettings,
    dtype: torch.dtype = torch.float32,
) -> ChangedWeights:
    """Merge adapters into the denoiser of a model folder, read in the type that it had in training.

    Raises:
        ModelFolderError: The base folder is missing, torn or of another family.
        CheckpointError: The adapters are not those of this denoiser.
    """
    folder = Path(base_folder)
    base = dict(family_of(folder).load_denoiser(folder, dtype).named_parameters())
    return merge_adapters(base, adapters, lora)


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
