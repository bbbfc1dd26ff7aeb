"""A generator as a model folder: trained weights beside the other parts of a base."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cluster.folders import whole_folder_at
from workers.adapters import lora_of
from workers.base_networks import base_parameters
from workers.models.adapter_files import merge_adapters
from workers.models.addresses import local_model
from workers.models.configs import INDEX_FILE
from workers.models.exporting import DTYPES, narrowed
from workers.models.families import family_of
from workers.models.weight_digests import SETTINGS_FILE, write_model_settings
from workers.settings import ExportSettings


def write_generator(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    dst: str,
    base_folder: str,
    settings: Mapping[str, Any],
    form: ExportSettings,
) -> None:
    """Writes trained weights as a folder that is there whole or not at all.

    Args:
        network: That was trained; adapters are merged into its base.
        weights: Of the whole network, or of its adapters.
        dst: New folder: a path or an address.
        base_folder: Model folder that the generator started from.
        settings: How the folder is sampled, for its `sgmd.json`; `flow_shift` is among them.
        form: Type of the weights, and whether the other parts are linked or copied.

    Raises:
        ModelFolderError: The base folder is of no known family, or not complete.
    """
    base, lora = local_model(base_folder), lora_of(network)
    if lora is not None:
        # Into the base as it was trained over, in whatever type that is.
        weights = merge_adapters(base_parameters(network), weights, lora)
    family = family_of(base)
    weights = narrowed(weights, DTYPES[form.dtype], family.traits.keep_fp32)
    with whole_folder_at(dst, (SETTINGS_FILE, INDEX_FILE)) as draft:
        family.export(
            draft,
            base,
            weights,
            flow_shift=settings["flow_shift"],
            components=form.components,
        )
        write_model_settings(draft, settings)
