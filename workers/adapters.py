"""Low-rank adapters of a role over weights that stay as they are.

    base              the frozen denoiser of a model folder, `workers.base_networks`
      view            modules of its own over the same tensors            the teacher
      view + A, B     W x + alpha / rank * B (A x)                        generator, fake score

Each role has modules of its own, and only the tensors of the base are shared. So no adapter is ever
switched on or off: a layer that checkpointing makes again, in whatever order the roles work, has
the adapters of the role whose graph it belongs to.

B is zero at first, so every role begins as the base, and A is drawn by the run's seed and the
role's name. Both are float32 on a base of any type.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sgmd_core.errors import ConfigError
from sgmd_core.seeds import random_generator
from workers.models.family import Denoiser
from workers.network_settings import LoraSettings

ADAPTER = "default"
"""Name that peft has for the one adapter of a network."""


def lora_of(network: nn.Module) -> LoraSettings | None:
    """Settings of a network's adapters; None where all its weights are trained."""
    return getattr(network, "lora", None)


def make_trainable(network: nn.Module) -> nn.Module:
    """Puts a network into the state in which a role trains it: its adapters, or all weights.

    The mode is that of evaluation: transformers without dropout or batch statistics have the same
    gradients in both modes, and repeat themselves in this one.

    Args:
        network: Changed in place.

    Returns:
        The same network.
    """
    network.eval()
    return network if lora_of(network) is not None else network.requires_grad_(True)


def add_adapters(network: Denoiser, lora: LoraSettings, seed: int, role: str) -> None:
    """Adds adapters to the projections of a network's layers; all other weights are frozen.

    Args:
        network: Changed in place; `view_of` has made it.
        lora: Rank, scale and projections.
        seed: The run's seed.
        role: Name of the role, which has draws of its own.

    Raises:
        ConfigError: A target is not a projection of the layers.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    names = _projections(network, lora.targets)
    network.requires_grad_(False)
    config = LoraConfig(
        r=lora.rank,
        # peft takes any number here, although it declares whole ones.
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=names,
        lora_dropout=0.0,
        bias="none",
    )
    inject_adapter_in_model(config, network, ADAPTER)
    layers = [part for part in network.modules() if isinstance(part, LoraLayer)]
    for index, layer in enumerate(layers):
        # Each is a linear layer; peft's dictionaries do not say so.
        first: Any = layer.lora_A[ADAPTER]
        second: Any = layer.lora_B[ADAPTER]
        # peft gives them the type of the base and draws from torch's global stream.
        first.float()
        second.float()
        drawn = torch.empty(first.weight.shape)
        generator = random_generator(seed, f"adapters/{role}", index)
        nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)
        with torch.no_grad():
            first.weight.copy_(drawn)
            second.weight.zero_()
    network.lora = lora


def targeted(projections: Sequence[str], targets: Sequence[str]) -> list[str]:
    """The projections that a setting `lora.targets` means.

    Args:
        projections: Names of the projections, of one layer or with the layer's name before.
        targets: Ends of names; none: all.

    Raises:
        ConfigError: A target is the end of none of the names.
    """
    if not targets:
        return list(projections)
    unknown = [target for target in targets if not _named(projections, target)]
    if unknown:
        raise ConfigError(
            "looking for the projections that get adapters",
            f"lora.targets names {', '.join(unknown)}",
            f"ends of the names {', '.join(dict.fromkeys(projections))}",
            "Correct lora.targets, or set it to [] for all of them",
        )
    return [name for name in projections if any(_named([name], target) for target in targets)]


def _named(projections: Sequence[str], target: str) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in projections)


def _projections(network: Denoiser, targets: Sequence[str]) -> list[str]:
    """Whole names of the linear layers inside of blocks that get adapters."""
    blocks = {id(block) for block in network.trained_blocks}
    found: list[str] = []
    for prefix, block in network.named_modules():
        if id(block) in blocks:
            linear = [name for name, part in block.named_modules() if isinstance(part, nn.Linear)]
            found += [f"{prefix}.{name}" for name in targeted(linear, targets)]
    return found
