"""Brings records to the device of the network that will work on them."""

from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sgmd_core.sample_record import SampleRecord
from sgmd_core.types import Draws, NoisedBatch, TextBatch

R = TypeVar("R", bound=SampleRecord)


def device_of(network: nn.Module) -> torch.device:
    """Returns the device of a network's parameters."""
    return next(network.parameters()).device


def query_on(query: NoisedBatch, device: torch.device) -> NoisedBatch:
    """The same score query, its tensors on `device`."""
    return _record_on(query, device)


def draws_on(draws: Draws, device: torch.device) -> Draws:
    """The same draws, their tensors on `device`."""
    return _record_on(draws, device)


def text_on(text: TextBatch, device: torch.device) -> TextBatch:
    """The same captions, their embeddings on `device`."""
    return replace(text, text=text.text.to(device))


def _record_on(record: R, device: torch.device) -> R:
    """The same record, its tensors and those of the records in it on `device`."""
    moved: dict[str, Any] = {}
    for field in fields(record):  # pyright: ignore[reportArgumentType]
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            moved[field.name] = value.to(device)
        elif isinstance(value, SampleRecord):
            moved[field.name] = _record_on(value, device)
    return replace(record, **moved)  # pyright: ignore[reportArgumentType, reportReturnType, reportCallIssue]
