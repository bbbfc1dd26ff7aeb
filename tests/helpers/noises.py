"""Noises whose sample moments are exact."""

import torch
from torch import Tensor


def balanced_noises(num_samples: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two noises (b, 1, 1, 2, 2) whose four elements hold all combinations of +1 and -1.

    Their means, variances and correlation over a sample are exactly 0, 1 and 0, so the mean of any
    quadratic function of them is its expectation under standard normals, without a sampling error.
    """
    first = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=dtype)
    second = torch.tensor([[1.0, -1.0], [1.0, -1.0]], dtype=dtype)
    shape = (num_samples, 1, 1, 2, 2)
    return first.expand(shape).clone(), second.expand(shape).clone()
