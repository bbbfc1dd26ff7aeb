"""Means and their ratios with confidence intervals, by resampling what was measured.

    value     mean of the figures, or ratio of two means
    interval  2.5 % to 97.5 % quantile of the same over samples drawn with replacement

Two sets that show the same captions from the same noise are resampled together: one draw of rows
serves both, so what the captions have in common cancels in the ratio. The draws are seeded.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgmd_core.errors import ShapeError
from sgmd_core.seeds import random_generator

NUM_DRAWS = 1000
_ENDS = (0.025, 0.975)

Figures = Float[Tensor, " n"]
Partners = Float[Tensor, " partners"]
Rows = Int[Tensor, "draws n"]
PartnerRows = Int[Tensor, "draws partners"]


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its 95 % confidence interval."""

    value: float
    low: float
    high: float


def resampled_rows(num_samples: int, seed: int, num_draws: int = NUM_DRAWS) -> Rows:
    """Rows of each resample: as many as there are samples, drawn with replacement.

    Raises:
        ShapeError: There is nothing to draw from.
    """
    if num_samples < 1:
        raise ShapeError("resampling figures", "no samples", "at least 1")
    random = random_generator(seed, "bootstrap of means", num_samples)
    return torch.randint(num_samples, (num_draws, num_samples), generator=random)


def mean_interval(figures: Figures, rows: Rows) -> Interval:
    """Mean of the figures.

    Args:
        figures: One per sample.
        rows: `resampled_rows` of as many samples.
    """
    figures = figures.double()
    return _interval(float(figures.mean()), figures[rows].mean(dim=1))


def ratio_interval(figures: Figures, reference: Partners, rows: Rows) -> Interval | None:
    """Mean of the figures over mean of the reference's, resampled in pairs.

    Args:
        figures: One per sample.
        reference: The same figure of the sample's partner.
        rows: `resampled_rows` of as many samples.

    Returns:
        The ratio; None where the reference's mean is 0 in all or in some resample.

    Raises:
        ShapeError: There are not as many figures as partners.
    """
    if figures.shape != reference.shape:
        raise ShapeError(
            "comparing figures in pairs",
            f"{len(figures)} figures and {len(reference)} of the reference",
            "as many of either",
        )
    figures, reference = figures.double(), reference.double()
    below = reference[rows].mean(dim=1)
    if reference.mean() == 0 or (below == 0).any():
        return None
    value = float(figures.mean() / reference.mean())
    return _interval(value, figures[rows].mean(dim=1) / below)


def median_interval(figures: Figures, rows: Rows) -> Interval:
    """Median of the figures, where a few of them are far off, as seconds are."""
    figures = figures.double()
    return _interval(float(figures.median()), figures[rows].median(dim=1).values)


def median_ratio_interval(
    figures: Figures, reference: Partners, rows: Rows, reference_rows: PartnerRows
) -> Interval:
    """Median of the figures over that of the reference's, each resampled on its own.

    Args:
        figures: One per sample.
        reference: The same figure of others, above 0.
        rows: `resampled_rows` of as many samples.
        reference_rows: The same of as many as the reference has; as many draws.
    """
    figures, reference = figures.double(), reference.double()
    below = reference[reference_rows].median(dim=1).values
    value = float(figures.median() / reference.median())
    return _interval(value, figures[rows].median(dim=1).values / below)


def _interval(value: float, draws: Float[Tensor, " draws"]) -> Interval:
    ends = draws.quantile(torch.tensor(_ENDS, dtype=draws.dtype))
    return Interval(value, float(ends[0]), float(ends[1]))
