"""Paired comparisons over seeds: mean difference, its interval, and how far chance explains it.

    difference_i = value_i - baseline_i      seeds that both have
    interval       bootstrap of the mean over seeds
    p              share of the 2^n sign patterns of the differences with a mean as large or larger

If two methods were equal, every difference could as well have the other sign, so all sign patterns
are equally likely: the test is exact, whatever the law of the differences. It needs seeds: n of
them give no p below 2^-n. Holm's correction keeps the chance of any false claim among several
below the level of one.
"""

import math
from collections.abc import Sequence

import torch

from sgmd_core.errors import ShapeError
from sgmd_core.metrics.bootstrap import Interval, mean_interval, resampled_rows

MAX_EXACT = 20
"""Differences up to which every sign pattern is counted; beyond, as many are drawn."""

_SEED = 0
# Sums of the same numbers in another order differ by rounding; they count as equal.
_ROUNDING = 1e-12


def paired_differences(values: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Differences to the baseline, of the pairs in which both are finite."""
    pairs = zip(values, baseline, strict=True)
    return [own - other for own, other in pairs if math.isfinite(own - other)]


def mean_difference(differences: Sequence[float]) -> Interval | None:
    """Mean of paired differences with its 95 % bootstrap interval; None of fewer than two."""
    if len(differences) < 2:
        return None
    rows = resampled_rows(len(differences), _SEED)
    return mean_interval(torch.tensor(differences, dtype=torch.float64), rows)


def sign_flip_p(differences: Sequence[float]) -> float:
    """One-sided p of a mean above 0 by sign flips (Fisher's randomisation test).

    Args:
        differences: One a pair.

    Returns:
        Share of sign patterns whose mean is at least that of the differences, which is one of
        them; beyond `MAX_EXACT` pairs, of the same and 2^20 drawn patterns.

    Raises:
        ShapeError: There is no pair.
    """
    if not differences:
        raise ShapeError("comparing pairs", "no pair", "at least 1")
    sizes = torch.tensor(differences, dtype=torch.float64)
    found = float(sizes.sum())
    if len(sizes) <= MAX_EXACT:
        sums = torch.zeros(1, dtype=torch.float64)
        for size in sizes:
            sums = torch.cat([sums + size, sums - size])
    else:
        random = torch.Generator().manual_seed(_SEED)
        drawn = torch.zeros(2**MAX_EXACT, dtype=torch.float64)
        for size in sizes:
            drawn += size * (2.0 * torch.randint(2, drawn.shape, generator=random) - 1.0)
        sums = torch.cat([drawn, sizes.sum()[None]])
    return float((sums >= found - _ROUNDING * float(sizes.abs().sum())).double().mean())


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrects several p values by Holm's method, in their order.

    The smallest of m counts m times, the next m - 1 times, and so on; none falls below one before
    it, nor rises above 1.
    """
    corrected = [1.0] * len(p_values)
    least = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = least
    return corrected
