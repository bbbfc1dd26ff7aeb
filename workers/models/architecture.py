"""Build the networks of a Wan folder without weights, to know what their files must hold."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from sgmd_core.errors import ModelFolderError
from workers.models.family import CONFIG_FILE, REMEDY, TEXT_ENCODER, TRANSFORMER
from workers.models.weights import Architecture

# Far above any released model; keeps a damaged number from building for ever.
_MAX_LAYERS = 1000


def build_without_weights(part: Path, config: Mapping[str, Any]) -> nn.Module:
    """Build a component's network on the meta device, which takes no memory for weights.

    Args:
        part: Folder of the component, whose name says which network it is.
        config: Content of its config.json.

    Raises:
        ModelFolderError: No network has this configuration.
    """
    try:
        _require_bounded(config)
        with torch.device("meta"):
            if part.name == TRANSFORMER:
                return _network(WanTransformer3DModel.from_config(dict(config)))
            if part.name == TEXT_ENCODER:
                return UMT5EncoderModel(UMT5Config(**config))
            return _network(AutoencoderKLWan.from_config(dict(config)))
    # Whatever a constructor raises, the file that it was given is at fault.
    except Exception as error:
        raise ModelFolderError(
            f"building the network of {part / CONFIG_FILE}",
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            "the configuration of a Wan network",
            REMEDY,
        ) from error


def architecture_of(part: Path, network: nn.Module) -> Architecture:
    """List the tensors that the files of a network must hold.

    Args:
        part: Folder of the component.
        network: The network, without weights.
    """
    tensors = network.state_dict(keep_vars=True)
    names_of: dict[int, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        names_of[id(tensor)].append(name)
    # Some releases of these networks brought parameters that are no more, and load without them.
    ignored = getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ()
    return Architecture(
        component=part.name,
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        aliases=tuple(tuple(names) for names in names_of.values() if len(names) > 1),
        ignored=tuple(ignored) + ((r"^(decoder|lm_head)\.",) if part.name == TEXT_ENCODER else ()),
    )


def _network(made: Any) -> nn.Module:  # noqa: ANN401  (from_config may return a pair)
    assert isinstance(made, nn.Module)
    return made


def _require_bounded(config: Mapping[str, Any]) -> None:
    for name in ("num_layers", "num_res_blocks", "num_decoder_layers"):
        value = config.get(name)
        if value is not None and not (isinstance(value, int) and 0 < value <= _MAX_LAYERS):
            raise ValueError(f"{name} is {value!r}, expected 1 to {_MAX_LAYERS}")
