"""State of one rank in main memory: what a run goes back to when a process of it is lost.

A checkpoint holds whole tensors on disk. A snapshot holds the rank's own parts, so no rank gathers
and no rank waits for another one. It belongs to the same number of ranks and to the same settings.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

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
def copies(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copies of this rank's parts in main memory, by name.

    Args:
        tensors: Names and tensors.
    """
    return {name: local_part(value).to("cpu", copy=True) for name, value in tensors}
