"""State of one rank in main memory: what a run goes back to when a process of it is lost.

A checkpoint holds whole tensors on disk. A snapshot holds the rank's own parts, so no rank gathers
and no rank waits for another one. It belongs to the same number of ranks and to the same settings.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from workers.sharding import local_part


@dataclass(frozen=True, slots=True)
class RoleSnapshot:
    """One rank's part of a role's state.

    Attributes:
        updates: Updates that the weights have seen.
        weights: Parts of the trained parameters, by name.
        moments: Parts of the optimizer's state, by `KIND/NAME`.
        average: Parts of the averaged weights, by name; empty where none are kept.
        skipped: Updates that were skipped.
    """

    updates: int
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    average: Mapping[str, Tensor] = field(default_factory=dict)
    skipped: int = 0

    @property
    def num_bytes(self) -> int:
        """Size of its tensors."""
        parts = (self.weights, self.moments, self.average)
        return sum(value.nbytes for part in parts for value in part.values())


@torch.no_grad()
def copies(
    tensors: Iterable[tuple[str, Tensor]], over: Mapping[str, Tensor] = MappingProxyType({})
) -> dict[str, Tensor]:
    """Copies of this rank's parts in main memory, by name.

    Args:
        tensors: Names and tensors.
        over: Copies that are no longer needed, by name; they are written over. Memory that is
            mapped takes a copy several times faster than what the system has to clear first.
    """
    return {name: _copy(local_part(value), over.get(name)) for name, value in tensors}


def _copy(part: Tensor, over: Tensor | None) -> Tensor:
    if over is None or over.shape != part.shape or over.dtype != part.dtype:
        return part.to("cpu", copy=True)
    return over.copy_(part)
