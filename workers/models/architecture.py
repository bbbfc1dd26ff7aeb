"""Build networks without weights, and compare them with the headers of their weight files."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sgmd_core.errors import ModelFolderError
from workers.models.configs import CONFIG_FILE, REMEDY
from workers.models.weights import (
    Architecture,
    ForeignNames,
    WeightFiles,
    check_weights,
)

# Far above any released model; keeps a damaged number from building without end.
_MAX_LAYERS = 1000


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


@dataclass(frozen=True, slots=True)
class NetworkKind:
    """A class of networks, as far as its files are concerned.

    Attributes:
        build: Makes the network from the content of its config.json.
        stem: Name of the weight files without suffix.
        counts: Keys of the configuration that count layers, bounded before the network is built.
        ignored: Patterns of names in files that the network leaves out without a loss.
        convert: Command that makes a component of a single file of another program.
        foreign: Names that other programs give to the tensors of this network.
    """

    build: Callable[[dict[str, Any]], Any]
    stem: str
    counts: tuple[str, ...] = ("num_layers",)
    ignored: tuple[str, ...] = ()
    convert: str = "save it with save_pretrained(FOLDER)"
    foreign: tuple[ForeignNames, ...] = ()


def check_network(part: Path, config: Mapping[str, Any], kind: NetworkKind) -> CheckedComponent:
    """Check that the weight files of a component are those of its network, by headers alone.

    Args:
        part: Folder of the component.
        config: Content of its config.json.
        kind: Its network.

    Raises:
        ModelFolderError: No network has this configuration, or weights are missing, torn or of
            another network; names the file.
    """
    written = _Written(json.dumps(config, default=repr), part, config)
    settings, architecture = _settings_and_tensors(written, kind)
    weights = check_weights(part, architecture)
    return CheckedComponent(part, deepcopy(settings), architecture, weights)


@dataclass(frozen=True, slots=True)
class _Written:
    """A configuration, the same as any other with its text, wherever it lies."""

    text: str
    part: Path = field(compare=False)
    config: Mapping[str, Any] = field(compare=False)


@lru_cache(maxsize=32)
def _settings_and_tensors(
    written: _Written, kind: NetworkKind
) -> tuple[dict[str, Any], Architecture]:
    """Describe a network once: every role of a run, and what looks at its folder, asks for it."""
    network = build_without_weights(written.part, written.config, kind)
    own: Any = network.config
    settings = own.to_dict() if hasattr(own, "to_dict") else dict(own)
    return settings, architecture_of(network, kind)


def build_without_weights(part: Path, config: Mapping[str, Any], kind: NetworkKind) -> nn.Module:
    """Build a component's network on the meta device, which takes no memory for weights.

    Raises:
        ModelFolderError: No network has this configuration.
    """
    try:
        for name in kind.counts:
            _require_bounded(name, config.get(name))
        with torch.device("meta"):
            # from_config of diffusers is declared to return a pair.
            network = kind.build(dict(config))
        assert isinstance(network, nn.Module)
        return network
    # Whatever a constructor raises, the file that it was given is at fault.
    except Exception as error:
        raise ModelFolderError(
            f"building the network of {part / CONFIG_FILE}",
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            "the configuration of a network of this family",
            REMEDY,
        ) from error


def architecture_of(network: nn.Module, kind: NetworkKind) -> Architecture:
    """List the tensors that the files of a network must hold."""
    tensors = network.state_dict(keep_vars=True)
    names_of: dict[int, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        names_of[id(tensor)].append(name)
    # Some releases of these networks brought parameters that are no more, and load without them.
    ignored = getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ()
    return Architecture(
        stem=kind.stem,
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        aliases=tuple(tuple(names) for names in names_of.values() if len(names) > 1),
        ignored=(*ignored, *kind.ignored),
        convert=kind.convert,
        foreign=kind.foreign,
    )


def _require_bounded(name: str, value: object) -> None:
    if value is not None and not (isinstance(value, int) and 0 < value <= _MAX_LAYERS):
        raise ValueError(f"{name} is {value!r}, expected 1 to {_MAX_LAYERS}")
