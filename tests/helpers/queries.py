"""Score queries with nothing behind them but the tensors that a test names."""

import torch
from torch import Tensor

from sgmd_core.types import MicroBatchKey, NoisedBatch

KEY = MicroBatchKey(iteration=0, micro_batch=0)


def make_query(x0: Tensor, noise: Tensor, sigma: Tensor, text: Tensor | None = None) -> NoisedBatch:
    """A query; without `text` the captions are one zero each."""
    if text is None:
        text = torch.zeros(len(x0), 1, 1, dtype=x0.dtype)
    return NoisedBatch(x0, sigma, noise, text, KEY)
