"""Measures of sets of clips of an embedded world, beside the teacher's.

    value   of a set and the reference set
    ratio   over the same value of the floor: a set of the reference's origin with other seeds

So a ratio of 1 is chance, and 3 is three floors away. Intervals by leaving clips out; clip i of all
sets has the same caption, and leaves all of them.
"""

import math
from collections.abc import Callable
from functools import partial

import torch

from sgmd_core.metrics.comparison import Compared
from sgmd_core.metrics.distributions import ClipMotion
from sgmd_core.metrics.jackknife import Kept, influences, jackknife_interval
from workers.measures import MOTION_MEASURES


def motion_figures(own: ClipMotion, reference: ClipMotion) -> dict[str, float]:
    """All measures of a set that have a value in its world."""
    found = {name: function(own, reference) for name, function in MOTION_MEASURES.items()}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def compare_motions(
    own: ClipMotion, reference: ClipMotion, floor: ClipMotion | None = None
) -> dict[str, Compared]:
    """Measures of a set, with intervals and ratios to the floor.

    Args:
        own: The set; clip i of all three has the same caption.
        reference: Clips of the teacher.
        floor: Clips of the teacher from other seeds; None for those themselves.

    Returns:
        By name; a ratio is None where the floor is 0, with all clips or without one.
    """
    found = {
        name: _compare(MOTION_MEASURES[name], own, reference, floor)
        for name in motion_figures(own, reference)
    }
    return {name: compared for name, compared in found.items() if compared is not None}


def _compare(
    function: Callable[[ClipMotion, ClipMotion], float],
    own: ClipMotion,
    reference: ClipMotion,
    floor: ClipMotion | None,
) -> Compared | None:
    def value(of: ClipMotion, kept: Kept) -> float:
        return function(of.take(kept), reference.take(kept))

    every = torch.arange(len(own.present))
    whole = value(own, every)
    parts = influences(partial(value, own), len(every))
    if math.isnan(float(parts.sum())):
        # One clip alone shows what is measured: without it there is no value, and no interval.
        return None
    interval = jackknife_interval(whole, parts)
    if floor is None:
        return Compared(interval, None)

    def ratio(kept: Kept) -> float:
        below = value(floor, kept)
        return value(own, kept) / below if below else math.nan

    parts = influences(ratio, len(every))
    if math.isnan(float(parts.sum())):
        return Compared(interval, None)
    return Compared(interval, jackknife_interval(ratio(every), parts))
