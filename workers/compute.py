"""How a role's network is computed: memory and speed, and of the numbers only the rounding.

    precision bf16    matrix products in bfloat16; weights, moments and gradients stay float32
    checkpointing     activations of the layers are made again in the backward pass, not kept
    compile           the layers as compiled code, one region for all of them

All three leave the weights as they are, and work with gradients asked for at the network's input.
One thing is lost with `compile`: compiled code makes all gradients of a layer at once, so the
generator's signal makes those of the fake score's parameters too, and throws them away.
"""

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch._functorch import config as functorch_config

from sgmd_core.errors import ConfigError
from workers.models.wan import WanVelocity


@dataclass(frozen=True, slots=True)
class ComputeSettings:
    """How a network is computed.

    Attributes:
        precision: `fp32`, or `bf16` for matrix products in bfloat16 with float32 weights.
        checkpointing: Keep no activations of the layers: a third more work, far less memory.
        compile: Compile the layers with `torch.compile`; the first iteration takes minutes.
    """

    precision: Literal["fp32", "bf16"] = "fp32"
    checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(
                "checking the settings",
                f"compute.precision is {self.precision!r}",
                "fp32 or bf16",
                "Correct compute.precision",
            )


def prepare(network: WanVelocity, settings: ComputeSettings) -> WanVelocity:
    """Makes a network compute that way; call it before the network is sharded.

    Args:
        network: Changed in place.
        settings: How.

    Returns:
        The same network.
    """
    if settings.precision == "bf16":
        network.autocast_dtype = torch.bfloat16
        # Wan's norms take a bfloat16 input and float32 weights: right, only not fused.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
    if settings.checkpointing:
        network.transformer.enable_gradient_checkpointing()
    if settings.compile:
        # A graph that serves the generator's loss and the tracking loss is walked twice; compiled
        # code would otherwise reuse its buffers on the first walk.
        functorch_config.donated_buffer = False
        for block in network.blocks:
            nn.Module.compile(block)
    return network
