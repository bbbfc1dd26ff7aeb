"""Networks that a flow head adds to a denoiser's last layers: an inner state, and its place.

    z = m + sigmoid(gate(m)) * mlp((1 + scale) * norm(e(y_s)) + shift)
    (scale, shift) = modulation(level(s) + stride_gain * stride(s - r))

m are the backbone's tokens, e the denoiser's own embedding of patches. The last projection of the
MLP and the gain of the stride's embedding are 0 at first, so z = m: a transition starts as the
denoiser that it is made of, whatever its inner states.

The embeddings of s and s - r are of low frequencies, at most 8 half turns from 0 to 1, so that a
difference over 0.01 of s is a derivative.
"""

import math
import sys
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from sgmd_core.schedule import MAX_STEPS
from sgmd_core.seeds import random_generator

NUM_FEATURES = 16
"""Sines and cosines of an inner level."""


class FlowHead(nn.Module):
    """The networks beside the denoiser's own layers.

    Args:
        width: Width of the denoiser's tokens.
        num_layers: Layers of the denoiser that belong to the head: its last ones.
        num_steps: Steps of the inner flow.
        shift: Shift of the inner levels.
    """

    def __init__(self, width: int, num_layers: int, num_steps: int, shift: float) -> None:
        super().__init__()
        self.config = {
            "width": width,
            "num_layers": num_layers,
            "num_steps": num_steps,
            "shift": shift,
        }
        self.level = _embedding(width)
        self.stride = _embedding(width)
        self.stride_gain = nn.Parameter(torch.zeros(width))
        self.modulation = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.gate = nn.Linear(width, width)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Make the networks that a config.json describes.

        Raises:
            KeyError: A number is missing.
            ValueError: A size is not a whole number above 0, there are too many steps, or the shift
                is not finite.
        """
        counts = [config[name] for name in ("width", "num_layers", "num_steps")]
        shift = config["shift"]
        whole = all(is_count(count, sys.maxsize) for count in counts[:2])
        if not whole or not is_count(counts[2], MAX_STEPS) or not is_shift(shift):
            raise ValueError(f"a flow head of {dict(config)}")
        return cls(*counts, shift=float(shift))

    def forward(self, tokens: Tensor, embedded: Tensor, s: Tensor, r: Tensor) -> Tensor:
        """Tokens that the head's layers start from.

        Args:
            tokens: The backbone's (B, N, width).
            embedded: Embedded patches of the inner state, likewise.
            s: Inner level of each sample.
            r: Level that the stride leads to.
        """
        dtype = self.gate.weight.dtype
        stride = self.stride_gain * self.stride(_features(s - r).to(dtype))
        place = self.level(_features(s).to(dtype)) + stride
        scale, shift = self.modulation(nn.functional.silu(place))[:, None].chunk(2, dim=2)
        moved = self.mlp((1 + scale) * self.norm(embedded) + shift)
        return tokens + (self.gate(tokens).sigmoid() * moved).type_as(tokens)


@torch.no_grad()
def with_first_weights(head: FlowHead, seed: int = 0) -> FlowHead:
    """Draw the weights that a head starts from; it then changes nothing.

    Args:
        head: Changed in place.
        seed: Of the draws.
    """
    stream = random_generator(seed, "flow_head")
    for name, value in head.named_parameters():
        if value.ndim == 1 or name == "mlp.2.weight":
            value.zero_()
        else:
            value.copy_(torch.randn(value.shape, generator=stream) / math.sqrt(value.shape[1]))
    return head


def _embedding(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(NUM_FEATURES, width), nn.SiLU(), nn.Linear(width, width))


def _features(level: Tensor) -> Tensor:
    turns = math.pi * torch.arange(1, NUM_FEATURES // 2 + 1, device=level.device)
    angles = level.float()[:, None] * turns
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def is_count(value: object, most: int) -> bool:
    """Tell if a value of a file is a whole number from 1 to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def is_shift(value: object) -> bool:
    """Tell if a value of a file is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value > 0
