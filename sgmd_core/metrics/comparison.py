"""Figures of a set of clips as they are, and as ratios to a partner set.

    value  mean over the clips                   with its 95 % interval
    ratio  that mean over the partner set's      with its own, captions resampled for both together

Clip i of both sets shows the same caption from the same noise, so that what the caption asks for
cancels: a generator is compared with what its teacher made of the same request.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sgmd_core.metrics.bootstrap import Interval, mean_interval, ratio_interval, resampled_rows

PerClip = Float[Tensor, " n"]


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure of a set.

    Attributes:
        value: Its mean over the clips.
        ratio: Over the partner's; None without a partner, or where the partner's is 0.
    """

    value: Interval
    ratio: Interval | None


def compare_sets(
    figures: Mapping[str, PerClip], partner: Mapping[str, PerClip] | None, seed: int
) -> dict[str, Compared]:
    """Means of figures and their ratios to a partner's.

    Args:
        figures: By name, one value a clip.
        partner: The same of the set to compare with; figures that it lacks get no ratio.
        seed: Seed of the resampling.

    Raises:
        ShapeError: The sets differ in size.
    """
    found: dict[str, Compared] = {}
    for name, values in figures.items():
        rows = resampled_rows(len(values), seed)
        other = (partner or {}).get(name)
        ratio = None if other is None else ratio_interval(values, other, rows)
        found[name] = Compared(mean_interval(values, rows), ratio)
    return found
