"""Paired comparisons over seeds: mean difference, its interval, and how far chance explains it.

    difference_i = value_i - baseline_i      seeds that both have
    interval       bootstrap of the mean over seeds
    p              share of the 2^n sign patterns of the differences with a mean as large or larger

If the differences are as likely to be above 0 as equally far below it, all sign patterns are
equally likely, and the test is exact. Two variants that are equal have such differences; for
differences from a margin it is an assumption. It needs seeds: n of them give no p below 2^-n.
Holm's correction keeps the chance of any false claim among several below the level of one.
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
        differences: One a pair. An infinite one outweighs all finite ones together.

    Returns:
        Share of sign patterns whose mean is at least that of the differences, which is one of
        them; beyond `MAX_EXACT` pairs, of the same and 2^20 drawn patterns.

    Raises:
        ShapeError: There is no pair, or a difference is NaN.
    """
    if not differences or any(math.isnan(each) for each in differences):
        found = "no pair" if not differences else "a difference that is NaN"
        raise ShapeError("comparing pairs", found, "at least 1, none of them NaN")
    sizes = torch.tensor(bounded(differences), dtype=torch.float64)
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


def two_sided_p(differences: Sequence[float]) -> float:
    """Twice the smaller of both one-sided p, at most 1: of a mean on either side of 0.

    Args:
        differences: As `sign_flip_p` takes them.
    """
    opposite = [-each for each in differences]
    return min(1.0, 2 * min(sign_flip_p(differences), sign_flip_p(opposite)))


def bounded(differences: Sequence[float]) -> list[float]:
    """Differences with a number in place of each infinite one, above the sum of the others."""
    beyond = 1.0 + sum(abs(each) for each in differences if math.isfinite(each))
    return [math.copysign(min(abs(each), beyond), each) for each in differences]


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
