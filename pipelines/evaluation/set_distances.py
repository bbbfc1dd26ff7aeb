"""Distances of sets of clips from a reference set, without the part that chance explains.

    above_floor(set) = distance(set, reference) - distance(floor, reference)
    ratio(set)       = above_floor(set) / above_floor(baseline)

The floor is a second set from the reference's own origin, with other seeds: its distance is what
the finite number of clips makes of no difference at all. Errors come from a bootstrap over
captions: every set shows the same captions in the same order, so one draw of captions is taken for
all sets, and what the sets have in common cancels in the differences.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pipelines.evaluation.result import Figure
from sgmd_core.errors import ShapeError
from sgmd_core.metrics.frechet import Features, Gaussian, fit_gaussian, frechet_distance
from sgmd_core.seeds import random_generator

# Ends of the central interval that holds as much as one standard deviation to both sides.
_LOW, _HIGH = 0.1587, 0.8413


@dataclass(frozen=True, slots=True)
class SetDistance:
    """Distance of one set from the reference.

    Attributes:
        distance: Frechet distance to the reference; biased upwards by the number of clips.
        above_floor: The distance less the floor's.
        ratio: `above_floor` over the baseline's.
    """

    distance: Figure
    above_floor: Figure
    ratio: Figure


def set_distances(
    reference: Features,
    sets: Mapping[str, Features],
    *,
    floor: str,
    baseline: str,
    num_bootstraps: int,
    seed: int,
) -> dict[str, SetDistance]:
    """Distances of all sets to the reference.

    Args:
        reference: Features of the reference set, one row a clip.
        sets: Features by name; row i of every set belongs to the same caption.
        floor: Which of the sets has the reference's origin.
        baseline: Which of the sets the ratios are taken to.
        num_bootstraps: Draws behind the errors.
        seed: Seed of the draws.

    Returns:
        One entry a set, the floor (whose `above_floor` is 0) included.

    Raises:
        ShapeError: The sets differ in size.
    """
    num_clips = len(reference)
    sizes = {name: len(features) for name, features in sets.items()}
    if set(sizes.values()) != {num_clips}:
        raise ShapeError(
            "comparing sets of clips", f"{num_clips} in the reference and {sizes}", "equal sizes"
        )
    found = _distances(reference, sets)
    random = random_generator(seed, "bootstrap over captions")
    draws: list[dict[str, float]] = []
    for _ in range(num_bootstraps):
        rows = torch.randint(num_clips, (num_clips,), generator=random)
        drawn = {name: features[rows] for name, features in sets.items()}
        draws.append(_distances(reference[rows], drawn))
    return {
        name: SetDistance(
            distance=_estimate(found[name], [draw[name] for draw in draws]),
            above_floor=_estimate(
                found[name] - found[floor], [draw[name] - draw[floor] for draw in draws]
            ),
            ratio=_estimate(
                _ratio(found, name, floor, baseline),
                [_ratio(draw, name, floor, baseline) for draw in draws],
            ),
        )
        for name in sets
    }


def _distances(reference: Features, sets: Mapping[str, Features]) -> dict[str, float]:
    target: Gaussian = fit_gaussian(reference)
    return {
        name: frechet_distance(*fit_gaussian(features), *target) for name, features in sets.items()
    }


def _ratio(distances: Mapping[str, float], name: str, floor: str, baseline: str) -> float:
    below = distances[baseline] - distances[floor]
    return (distances[name] - distances[floor]) / below if below else float("nan")


def _estimate(value: float, draws: list[float]) -> Figure:
    ends = torch.tensor(draws, dtype=torch.float64).quantile(
        torch.tensor([_LOW, _HIGH], dtype=torch.float64)
    )
    return Figure(value=value, error=float(ends[1] - ends[0]) / 2)
