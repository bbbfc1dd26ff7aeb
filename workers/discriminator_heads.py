"""Heads on features of a frozen network, which say how real a sample is.

    features (b, c, t, h, w)
      num_strides x [3-d convolution 3x3x3, stride 2 in rows and columns -> group norm -> SiLU]
      1 x           [3-d convolution 3x3x3                               -> group norm -> SiLU]
      mean over all positions -> linear -> one logit

The published image head has three strides of 4x4 convolutions and needs maps of at least 8x8; the
number of strides is a setting here, so that small maps have a head too. A norm's groups have eight
channels, as the published ones: with one channel a group, a norm before the mean would take away
all but the shape of a map. The last layer starts at zero: a new head says nothing, and its first
gradients do not move a generator.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sgmd_core.seeds import random_generator

_MOST_GROUPS, _CHANNELS_A_GROUP = 32, 8
_STREAM = "discriminator-heads"


class DiscriminatorHead(nn.Module):
    """One head.

    Args:
        channels: Of the features.
        width: Of the convolutions; a multiple of 8, and of 32 above 256.
        num_strides: Convolutions that halve rows and columns.
    """

    def __init__(self, channels: int, width: int = 256, num_strides: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number in range(num_strides + 1):
            stride = (1, 2, 2) if number < num_strides else 1
            layers += [
                nn.Conv3d(width if number else channels, width, 3, stride=stride, padding=1),
                nn.GroupNorm(min(_MOST_GROUPS, width // _CHANNELS_A_GROUP), width),
                nn.SiLU(),
            ]
        self.layers = nn.Sequential(*layers)
        self.last = nn.Linear(width, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (b,) of features (b, c, t, h, w)."""
        # A copy: FSDP hooks the output, and must not hook a view.
        return self.last(self.layers(features).mean(dim=(2, 3, 4))).squeeze(1).clone()


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


def num_head_parameters(channels: int, width: int, num_strides: int) -> int:
    """Parameters of one head; see `DiscriminatorHead`.

    Args:
        channels: Of the features.
        width: Of the convolutions.
        num_strides: Convolutions that halve rows and columns.
    """
    # Each convolution has a bias, and its norm a gain and a bias.
    first, others = 27 * channels * width + 3 * width, 27 * width * width + 3 * width
    return first + num_strides * others + width + 1


def build_heads(
    channels: Sequence[int], width: int, num_strides: int, seed: int
) -> DiscriminatorHeads:
    """Heads with weights drawn by a run's seed, by the law of torch's convolutions.

    Args:
        channels: Of each feature.
        width: Of the convolutions.
        num_strides: See `DiscriminatorHead`.
        seed: The run's seed.
    """
    # Torch's own constructors draw from its global generator.
    with torch.device("meta"):
        heads = DiscriminatorHeads(channels, width, num_strides)
    heads.to_empty(device="cpu")
    layers = [part for part in heads.modules() if not [*part.children()]]
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.Conv3d):
            stream = random_generator(seed, _STREAM, index)
            bound = 1 / math.sqrt(layer.weight[0].numel())
            nn.init.uniform_(layer.weight, -bound, bound, generator=stream)
            assert layer.bias is not None, "these convolutions have biases"
            nn.init.uniform_(layer.bias, -bound, bound, generator=stream)
        elif isinstance(layer, nn.GroupNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return heads
