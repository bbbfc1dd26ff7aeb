"""Heads on features of a frozen network, which say how real a sample is.

    features (b, c, t, h, w)
      num_strides x [3-d convolution 3x3x3, stride 2 in rows and columns -> group norm -> SiLU]
      1 x           [3-d convolution 3x3x3                               -> group norm -> SiLU]
      mean over all positions -> linear -> one logit

The published image head has three strides of 4x4 convolutions and needs maps of at least 8x8; the
number of strides is a setting here, so that small maps have a head too. The last layer starts at
zero: a new head says nothing, and its first gradients do not move a generator.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_GROUPS = 32


class DiscriminatorHead(nn.Module):
    """One head.

    Args:
        channels: Of the features.
        width: Of the convolutions; a multiple of 32, or below 32.
        num_strides: Convolutions that halve rows and columns.
    """

    def __init__(self, channels: int, width: int = 256, num_strides: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number in range(num_strides + 1):
            stride = (1, 2, 2) if number < num_strides else 1
            layers += [
                nn.Conv3d(width if number else channels, width, 3, stride=stride, padding=1),
                nn.GroupNorm(min(_GROUPS, width), width),
                nn.SiLU(),
            ]
        self.layers = nn.Sequential(*layers)
        self.last = nn.Linear(width, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (b,) of features (b, c, t, h, w)."""
        return self.last(self.layers(features).mean(dim=(2, 3, 4))).squeeze(1)


class DiscriminatorHeads(nn.Module):
    """A head for each of several features of one network.

    Args:
        channels: Of each feature.
        width: Of the convolutions.
        num_strides: See `DiscriminatorHead`.
    """

    def __init__(self, channels: Sequence[int], width: int = 256, num_strides: int = 3) -> None:
        super().__init__()
        self.heads = nn.ModuleList(DiscriminatorHead(each, width, num_strides) for each in channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (b, heads) of features (b, c, t, h, w)."""
        found = [head(each) for head, each in zip(self.heads, features, strict=True)]
        return torch.stack(found, dim=1)
