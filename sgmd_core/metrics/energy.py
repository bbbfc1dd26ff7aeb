"""Energy distance between two sets of points: 0 where their distributions are equal, else above.

    E^2 = 2 E|x - y| - E|x - x'| - E|y - y'|

Estimated without bias (a point is not paired with itself), so two sets of one distribution are at
a distance around 0 that may be negative. Unlike a Frechet distance it sees more than two moments: a
mode that is missing, or samples between modes, with means and covariances that agree.

Source: Szekely and Rizzo, Energy statistics (2013).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sgmd_core.errors import ShapeError

SetOfPoints = Float[Tensor, "n dim"]


def energy_distance(x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"]) -> Float[Tensor, ""]:
    """Squared energy distance of two sets, in the units of the points.

    Args:
        x: Points of the one, at least two.
        y: Points of the other, at least two.

    Raises:
        ShapeError: A set is too small.
    """
    if min(len(x), len(y)) < 2:
        raise ShapeError("measuring an energy distance", f"{len(x)} and {len(y)} points", "2 each")
    between = torch.cdist(x, y).double().mean()
    return 2 * between - _mean_within(x) - _mean_within(y)


def _mean_within(x: SetOfPoints) -> Float[Tensor, ""]:
    return torch.pdist(x).double().mean()
