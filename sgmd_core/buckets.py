"""Sizes that a run trains at: every iteration takes one of them, drawn by weight.

The draw is counted by the iteration alone, as every other one (`sgmd_core.seeds`): all roles, ranks
and layouts agree on it without communication, and a resumed run repeats it. All micro-batches of an
iteration, and all of its updates, have one size.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from sgmd_core.seeds import random_generator


def drawn_bucket(seed: int, iteration: int, weights: Sequence[float]) -> int:
    """Number of the bucket of an iteration.

    Args:
        seed: The run's seed.
        iteration: Updates of the generator made before.
        weights: Of the buckets, each above 0; their shares are these over their sum.
    """
    stream = random_generator(seed, "bucket", iteration)
    drawn = float(torch.rand((), generator=stream, dtype=torch.float64))
    *edges, whole = accumulate(weights)
    return bisect_right(edges, drawn * whole)


@dataclass(frozen=True, slots=True)
class LatentBuckets:
    """Shapes of latents that iterations draw from.

    Attributes:
        shapes: (c, t, h, w) of one sample, of each bucket.
        weights: Of the buckets; their shares are these over their sum.
    """

    shapes: tuple[tuple[int, int, int, int], ...]
    weights: tuple[float, ...]

    @property
    def shares(self) -> tuple[float, ...]:
        """Shares of the iterations, which add up to 1."""
        whole = sum(self.weights)
        return tuple(weight / whole for weight in self.weights)

    def shape_at(self, seed: int, iteration: int) -> tuple[int, int, int, int]:
        """Shape (c, t, h, w) of a sample of an iteration; see `drawn_bucket`."""
        return self.shapes[drawn_bucket(seed, iteration, self.weights)]
