"""Best approximation of a change of weights by two narrow matrices: a LoRA of a full fine-tuning.

    change (out, in)  ~  up (out, rank) @ down (rank, in)

Truncated singular value decomposition: no other pair of this rank is nearer (Eckart and Young).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Above it a whole decomposition takes minutes a matrix; the sketch takes seconds.
_WHOLE_UP_TO = 1024
_OVERSAMPLING = 16
_POWER_ITERATIONS = 6


@dataclass(frozen=True, slots=True)
class LowRank:
    """Two matrices in place of a change.

    Attributes:
        up: Shape (out, rank).
        down: Shape (rank, in).
        energy: Squared Frobenius norm of the change.
        kept: Share of it that `up @ down` has, in [0, 1].
    """

    up: Tensor
    down: Tensor
    energy: float
    kept: float


def approximate(change: Tensor, rank: int) -> LowRank:
    """Approximate a change by its largest singular values, the root of each in both matrices.

    The same change gives the same matrices, also where random directions are drawn.

    Args:
        change: Shape (out, in), in float32.
        rank: Columns of `up`; fewer where the change has a smaller side.
    """
    rank = min(rank, *change.shape)
    energy = float(change.double().square().sum())
    if min(change.shape) <= max(_WHOLE_UP_TO, rank + _OVERSAMPLING):
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        right = right.mT
    else:
        with torch.random.fork_rng(devices=[change.device] if change.is_cuda else []):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(
                change, q=rank + _OVERSAMPLING, niter=_POWER_ITERATIONS
            )
    root = values[:rank].sqrt()
    kept = float(values[:rank].double().square().sum()) / energy if energy else 1.0
    up = (left[:, :rank] * root).contiguous()
    down = (right[:, :rank] * root).mT.contiguous()
    return LowRank(up, down, energy, min(kept, 1.0))


def approximate_all(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], rank: int
) -> dict[str, LowRank]:
    """Approximate the change of every matrix among the weights that has changed.

    Args:
        before: Weights of the base by name.
        after: Weights of the fine-tuned network, of the same names and shapes.
        rank: Of each approximation.
    """
    found: dict[str, LowRank] = {}
    for name, value in after.items():
        change = value.float() - before[name].float()
        if name.endswith(".weight") and value.ndim == 2 and bool(change.any()):
            found[name.removesuffix(".weight")] = approximate(change, rank)
    return found


def share_kept(factors: Mapping[str, LowRank], energy: float) -> float:
    """Share of the change of all weights that the approximations hold.

    Biases, norms and convolutions have no approximation, and none of their change is held.

    Args:
        factors: Approximations by name.
        energy: Squared norm of the change of all weights.
    """
    held = sum(each.energy * each.kept for each in factors.values())
    return held / energy if energy else 1.0
