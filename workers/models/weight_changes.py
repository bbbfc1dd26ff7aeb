"""Changes of a base's weights, merged when a weight is asked for: no network is ever held twice.

    weight + sum of    scale * up @ down       `Product`, a LoRA's
                       scale * values          `DenseChange`, of a bias, a norm or a whole matrix

Sums are taken in float32, in the order of the changes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class WeightChange(Protocol):
    """A change of one weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights that it fits."""
        ...

    def values(self, device: torch.device) -> Tensor:
        """The change in float32, of this shape."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A change of low rank.

    Attributes:
        up: Shape (out, rank), with ones behind in a convolution.
        down: Shape (rank, in), or (rank, in, ...) in a convolution.
        scale: Of the product.
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights that it fits."""
        return (self.up.shape[0], *self.down.shape[1:])

    def values(self, device: torch.device) -> Tensor:
        """The change in float32."""
        up, down = (half.detach().float().to(device).flatten(1) for half in (self.up, self.down))
        return (self.scale * (up @ down)).reshape(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class DenseChange:
    """A change that is there number by number.

    Attributes:
        difference: Shape of the weight.
        scale: Factor.
    """

    difference: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights that it fits."""
        return tuple(self.difference.shape)

    def values(self, device: torch.device) -> Tensor:
        """The change in float32."""
        return self.scale * self.difference.detach().float().to(device)


class ChangedWeights(Mapping[str, Tensor]):
    """Parameters of a denoiser with changes merged; those with a change in float32.

    Args:
        base: Parameters of the base by name.
        changes: Changes by the name of their weight, each of its shape.
    """

    def __init__(
        self, base: Mapping[str, Tensor], changes: Mapping[str, Sequence[WeightChange]]
    ) -> None:
        self._base = base
        self._changes = changes

    def __getitem__(self, name: str) -> Tensor:
        """The weight of a name, on the device of the base."""
        weight = self._base[name].detach()
        for change in self._changes.get(name, ()):
            weight = weight.float() + change.values(weight.device)
        return weight

    def __iter__(self) -> Iterator[str]:
        """Names of the base's parameters."""
        return iter(self._base)

    def __len__(self) -> int:
        """Number of the base's parameters."""
        return len(self._base)
