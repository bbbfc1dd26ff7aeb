"""The two collective operations that the training loops need; no-ops for a single worker."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the workers.

    One flat tensor travels rather than one per parameter; the networks are small.
    """
    if not _is_distributed():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, mean in zip(gradients, flat.split(sizes), strict=True):
        gradient.copy_(mean.view_as(gradient))


def from_first_worker(value: float) -> float:
    """The value that worker 0 passed, on every worker."""
    if not _is_distributed():
        return value
    shared = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(shared, src=0)
    return float(shared)


def _is_distributed() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
