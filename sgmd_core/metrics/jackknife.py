"""Intervals of figures that are no means, such as a distance between sets, by leaving clips out.

    influence_i = (n - 1) * (figure - figure without clip i)
    error^2     = sum_i influence_i^2 / (n (n - 1))

is the jackknife. For a mean, the influences are the deviations from it and the error is the usual
one. A distance between sets is a square: near zero a bootstrap overstates its spread by root 3 and
the jackknife by root 2, and neither does where the sets differ by more than their noise.

Two figures of the same captions and noise are compared by the difference of their influences, clip
by clip, so that what the clips have in common cancels. Nothing is drawn at random.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgmd_core.errors import ShapeError
from sgmd_core.metrics.bootstrap import Interval

NORMAL_95 = 1.96
"""Standard errors on both sides of a figure that hold 95 % of a normal distribution."""

Influence = Float[Tensor, " n"]
Kept = Int[Tensor, " kept"]


def influences(figure: Callable[[Kept], float], num_samples: int) -> Influence:
    """Influence of each sample on a figure, centred on 0.

    Args:
        figure: Computes the figure of some of the samples, given their indices.
        num_samples: Samples in all; the figure is computed as many times.

    Raises:
        ShapeError: There are fewer than two samples.
    """
    if num_samples < 2:
        raise ShapeError("leaving out one sample", f"{num_samples} samples", "at least 2 samples")
    rows = torch.arange(num_samples)
    without = [figure(torch.cat([rows[:left_out], rows[left_out + 1 :]])) for left_out in rows]
    partial = torch.tensor(without, dtype=torch.float64)
    return (num_samples - 1) * (partial.mean() - partial)


def standard_error(influence: Sequence[float] | Influence) -> float:
    """Standard error of the figure that has these influences.

    Raises:
        ShapeError: There are fewer than two samples.
    """
    values = torch.as_tensor(influence, dtype=torch.float64)
    if len(values) < 2:
        raise ShapeError("computing an error", f"{len(values)} samples", "at least 2 samples")
    return math.sqrt(float(values.square().sum()) / (len(values) * (len(values) - 1)))


def jackknife_interval(value: float, influence: Influence) -> Interval:
    """95 % confidence interval around a figure: that of a normal distribution."""
    reach = NORMAL_95 * standard_error(influence)
    return Interval(value, value - reach, value + reach)
