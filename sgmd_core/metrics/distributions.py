"""Distances between distributions: what two sets of clips do, whatever each clip does.

    Wasserstein   integral |F(x) - G(x)| dx          of values, in their unit
    variation     sum_i |p_i - q_i| / 2              of shares, in [0, 1]
    entropy       - sum_i p_i log2 p_i               of shares, in bits

Where a caption leaves motion open, no clip is wrong, and a generator that always does the same is
seen here alone. Estimated from finite sets, both distances are above 0 also for sets of the same
origin: compare at equal numbers of clips, and with the distance of two such sets, the floor.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

DIRECTION_SECTORS = 8
STILL_PX_PER_FRAME = 0.2
"""Slower objects count as still."""
_MOST_OBJECTS = 6


@dataclass(frozen=True, slots=True)
class ClipMotion:
    """Motion of the objects of b clips, k places for objects each.

    Attributes:
        present: Places that hold an object.
        speed_px_per_frame: Of each object.
        heading: (right, down), any length.
        texture: Contrast of each background; NaN in worlds without textures.
    """

    present: Bool[Tensor, "b k"]
    speed_px_per_frame: Float[Tensor, "b k"]
    heading: Float[Tensor, "b k 2"]
    texture: Float[Tensor, " b"]

    def take(self, clips: Int[Tensor, " n"]) -> "ClipMotion":
        """Returns some of the clips."""
        return ClipMotion(
            self.present[clips],
            self.speed_px_per_frame[clips],
            self.heading[clips],
            self.texture[clips],
        )

    @property
    def speeds(self) -> Float[Tensor, " objects"]:
        """Speeds of all objects."""
        return self.speed_px_per_frame[self.present]

    @property
    def direction_shares(self) -> Float[Tensor, " sectors"]:
        """Share of the moving objects that start in each of eight sectors; 0 if none moves."""
        moving = self.present & (self.speed_px_per_frame > STILL_PX_PER_FRAME)
        right, down = self.heading[moving].unbind(dim=-1)
        turn = torch.atan2(down, right) / (2 * math.pi)
        # The first sector is centred on the right.
        sector = (turn * DIRECTION_SECTORS).round().long() % DIRECTION_SECTORS
        return _shares(sector, DIRECTION_SECTORS)

    @property
    def count_shares(self) -> Float[Tensor, " counts"]:
        """Share of the clips with no, one, two ... objects."""
        return _shares(self.present.sum(dim=1), _MOST_OBJECTS + 1)


def wasserstein(first: Float[Tensor, " n"], second: Float[Tensor, " m"]) -> float:
    """First Wasserstein distance between two sets of values, in their unit.

    Returns:
        The distance; NaN if a set is empty.
    """
    if not (len(first) and len(second)):
        return math.nan
    ordered = [values.double().sort().values for values in (first, second)]
    places = torch.cat(ordered).sort().values
    below, other = (
        torch.searchsorted(values, places[:-1], right=True) / len(values) for values in ordered
    )
    return float(((below.double() - other.double()).abs() * places.diff()).sum())


def total_variation(first: Float[Tensor, " n"], second: Float[Tensor, " n"]) -> float:
    """Total variation between two sets of shares; 1 between none at all and some."""
    if bool(first.sum() > 0) != bool(second.sum() > 0):
        return 1.0
    return float((first.double() - second.double()).abs().sum()) / 2


def entropy_bits(shares: Float[Tensor, " n"]) -> float:
    """Entropy of shares, in bits."""
    shares = shares.double()
    # Classes that are empty add nothing; 1 stands in for them.
    return -float((shares * shares.where(shares > 0, 1.0).log2()).sum()) + 0.0


def speed_distance(own: ClipMotion, reference: ClipMotion) -> float:
    """Wasserstein distance of the speeds of objects."""
    return wasserstein(own.speeds, reference.speeds)


def direction_distance(own: ClipMotion, reference: ClipMotion) -> float:
    """Total variation of the sectors in which moving objects start."""
    return total_variation(own.direction_shares, reference.direction_shares)


def direction_entropy(own: ClipMotion, reference: ClipMotion) -> float:
    """Entropy of the sectors in which moving objects start, in bits."""
    return entropy_bits(own.direction_shares)


def still_share(own: ClipMotion, reference: ClipMotion) -> float:
    """Share of the clips in which nothing moves."""
    moving = own.present & (own.speed_px_per_frame > STILL_PX_PER_FRAME)
    return float((~moving.any(dim=1)).double().mean())


def count_distance(own: ClipMotion, reference: ClipMotion) -> float:
    """Total variation of the numbers of objects."""
    return total_variation(own.count_shares, reference.count_shares)


def texture_distance(own: ClipMotion, reference: ClipMotion) -> float:
    """Wasserstein distance of the contrasts of backgrounds; NaN in worlds without textures."""
    return wasserstein(own.texture, reference.texture)


def _shares(classes: Int[Tensor, " n"], num_classes: int) -> Float[Tensor, " classes"]:
    counts = torch.bincount(classes, minlength=num_classes).double()
    return counts / counts.sum().clamp_min(1)
