"""Brings records to the device of the network that will work on them."""

from dataclasses import replace

import torch
from torch import nn

from sgmd_core.types import Draws, NoisedBatch, TextBatch


def device_of(network: nn.Module) -> torch.device:
    """Returns the device of a network's parameters."""
    return next(network.parameters()).device


def query_on(query: NoisedBatch, device: torch.device) -> NoisedBatch:
    """The same score query, its tensors on `device`."""
    return replace(
        query,
        x0=query.x0.to(device),
        sigma=query.sigma.to(device),
        noise=query.noise.to(device),
        text=query.text.to(device),
    )


def draws_on(draws: Draws, device: torch.device) -> Draws:
    """The same draws, their tensors on `device`."""
    return replace(
        draws,
        initial_noise=draws.initial_noise.to(device),
        sigma=draws.sigma.to(device),
        noise=draws.noise.to(device),
    )


def text_on(text: TextBatch, device: torch.device) -> TextBatch:
    """The same captions, their embeddings on `device`."""
    return replace(text, text=text.text.to(device))
