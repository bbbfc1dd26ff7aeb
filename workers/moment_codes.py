"""Second moments in 8 bits: codes on one logarithmic grid, rounded at random and right in the mean.

    grid       g(n) = 2 ** (n / 10), the same for all times: steps of 7 %
    block      256 entries of a row, with the exponent `base` of their largest
    code c     0: exactly 0      1 .. 255: g(base + c), 25 octaves down from the largest
    rounding   to g(n) or g(n + 1), with the odds that make the mean exact

A decay of 0.999 changes a moment by a thousandth, far less than a step: rounded to the nearest
code it would stay where it is. The odds move one entry in seventy instead. The grid never
moves, so an entry that does not change is not rounded again. What lies below the last code goes up
to it, so no denominator is rounded to nothing. Blocks end with their row: ranks of any number
share them as they share the rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sgmd_core.seeds import random_generator

BLOCK = 256
PER_OCTAVE = 10
LEAST_ROW = 32
"""Shorter rows, and vectors, stay in float32: they are few, and exponents would outweigh them."""
BYTES_PER_ENTRY = 1 + 2 / BLOCK
_LAST = 255


class MomentCodes(NamedTuple):
    """A tensor of second moments.

    Attributes:
        codes: Of the tensor's shape, uint8.
        bases: Exponents, int16: one row a row, one entry a block.
    """

    codes: Tensor
    bases: Tensor


def has_codes(parameter: Tensor) -> bool:
    """Returns True if a parameter's second moments are kept in 8 bits; the same for all ranks."""
    return parameter.ndim > 1 and _row(parameter) >= LEAST_ROW


def encode_moments(values: Tensor, *counters: int) -> MomentCodes:
    """Rounds second moments to codes.

    Args:
        values: Not negative, float32; this rank's rows.
        counters: Of the draws that round: the same ones round alike.
    """
    blocks = _blocks(values)
    position = PER_OCTAVE * blocks.log2()
    top = position.amax(dim=2, keepdim=True).ceil()
    base = torch.where(top.isfinite(), top, 0.0) - _LAST
    below = torch.maximum(position.floor(), base + 1)
    low, high = _grid(below), _grid(below + 1)
    stream = torch.Generator(values.device)
    stream.manual_seed(random_generator(0, "moments/round", *counters).initial_seed())
    drawn = torch.rand(blocks.shape, generator=stream, device=values.device)
    up = drawn < (blocks - low) / (high - low)
    code = (below - base + up).clamp(1, _LAST)
    codes = torch.where(blocks > 0, code, 0.0).to(torch.uint8)
    return MomentCodes(
        codes.flatten(1)[:, : _row(values)].reshape(values.shape).contiguous(),
        base.squeeze(2).to(torch.int16),
    )


def decode_moments(kept: MomentCodes) -> Tensor:
    """The second moments that codes stand for, in float32."""
    blocks = _blocks(kept.codes)
    values = torch.where(blocks > 0, _grid(kept.bases.unsqueeze(2) + blocks.float()), 0.0)
    return values.flatten(1)[:, : _row(kept.codes)].reshape(kept.codes.shape).contiguous()


def _grid(exponent: Tensor) -> Tensor:
    return torch.exp2(exponent / PER_OCTAVE)


def _row(values: Tensor) -> int:
    return values.shape[1:].numel()


def _blocks(values: Tensor) -> Tensor:
    """Rows in blocks, (rows, blocks, entries), the last ones filled up with zeros."""
    row = _row(values)
    rows = values.reshape(len(values), row)
    number = -(-row // BLOCK)
    return torch.nn.functional.pad(rows, (0, number * BLOCK - row)).unflatten(1, (number, BLOCK))
