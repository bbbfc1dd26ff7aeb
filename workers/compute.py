"""Memory and speed of a role's network; of the numbers, only the rounding changes.

    precision bf16    matrix products in bfloat16; weights, moments and gradients stay float32, and
                      weights of several ranks are gathered in bfloat16
    checkpointing     activations of the layers are made again in the backward pass, not kept
    attention         one kernel of attention in place of torch's choice
    ulysses           tokens of a sample over several ranks, heads of it inside attention
    compile           the layers as compiled code, one region for all of them

All of them leave the weights as they are, and work with gradients asked for at the network's input.
One thing is lost with `compile`: compiled code makes all gradients of a layer at once, so the
generator's signal makes those of the fake score's parameters too, and throws them away.
"""

import warnings

import torch
from torch import nn
from torch._functorch import config as functorch_config

from workers.models.family import Denoiser
from workers.network_settings import ComputeSettings
from workers.recomputation import layer_function


def prepare_network(network: Denoiser, settings: ComputeSettings) -> Denoiser:
    """Makes a network compute that way; call it before the network is sharded.

    Args:
        network: Changed in place.
        settings: How.

    Returns:
        The same network.
    """
    network.set_attention(settings.attention)
    if settings.ulysses > 1:
        network.split_tokens(settings.ulysses)
    if settings.precision == "bf16":
        network.autocast_dtype = torch.bfloat16
        # Norms take a bfloat16 input and float32 weights: right, only not fused.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
    if settings.checkpointing:
        network.layer_function = layer_function(settings.checkpointing)
        network.set_checkpointing(True)
    if settings.compile:
        # A graph that serves the generator's loss and the tracking loss is walked twice; compiled
        # code would otherwise reuse its buffers on the first backward pass.
        functorch_config.donated_buffer = False
        for block in network.blocks:
            nn.Module.compile(block)
    return network
