"""The control of the teacher's word: each sample learns from the gap of its neighbour.

    velocity_teacher[i] -> velocity_fake[i] + (velocity_teacher - velocity_fake)[neighbour of i]

The answers of the teacher keep their statistics, but each belongs to another sample. What a method
still gains so is owed to what all samples of a batch share; what it loses, to the teacher's word on
each sample. A gap keeps the length that it has at its own noise level, so single steps become
longer or shorter than the sample's own, and weights that are formed from the teacher's answer
(`dmd`) are formed from the exchanged one.

* The gap is what is handed on, not the velocity: a velocity holds its own sample's noise, and the
  difference to another's would be many times as large.
* Neighbours are pairs, 2k and 2k + 1. Captions and noise of a batch are drawn independently, so
  one derangement has the law of any other; and a pair stays together wherever a batch is cut into
  parts of even numbers, so the numbers are the same in every placement.
* A shuffled caption would be a weaker control: the sample would still be led to where some caption
  wants it, and in worlds without captions nothing would change.
"""

from typing import Literal

import torch
from torch import Tensor

from sgmd_core.errors import ShapeError
from sgmd_core.types import Latents, float32

Gap = Literal["own", "shuffled"]
"""Gap that teaches the generator at a sample: its own, or another sample's."""


def neighbours(num_samples: int) -> Tensor:
    """Sample whose gap each one learns from: a permutation without a fixed point, its own inverse.

    Args:
        num_samples: An even number of samples.

    Returns:
        Indices (num_samples,).

    Raises:
        ShapeError: The number is odd, so one sample has no neighbour.
    """
    if num_samples < 2 or num_samples % 2:
        raise ShapeError(
            "shuffling the teacher's answers among the samples of a part of a batch",
            f"{num_samples} samples",
            "an even number of them, at least 2",
            "Give every rank of the fake score an even number of samples of each micro-batch",
        )
    return torch.arange(num_samples) ^ 1


def shuffled_teacher(velocity_fake: Latents, velocity_teacher: Latents) -> Latents:
    """Teacher's velocities that leave each sample the gap of its neighbour.

    Args:
        velocity_fake: Fake score's prediction.
        velocity_teacher: Teacher's prediction at the same queries.

    Returns:
        Velocities in float32 or wider, without a graph.

    Raises:
        ShapeError: See `neighbours`.
    """
    fake = float32(velocity_fake).detach()
    gap = float32(velocity_teacher).detach() - fake
    return fake + gap[neighbours(len(gap)).to(gap.device)]
