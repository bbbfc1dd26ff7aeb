"""A stand-in for the teacher, where only what is kept of its clips matters."""

import torch

from workers.clip_sets import ClipRequest, ClipSet
from workers.measured_clips import MeasuredClips
from workers.samplings import Sampling

REQUEST = ClipRequest(("a red circle",), Sampling(30, 5.0, 0), 16, 8, world=None, shown=(0,))


class CountingSampler:
    """Makes sets of random numbers, and counts them."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, request: ClipRequest) -> ClipSet:
        self.made += 1
        draw = torch.Generator().manual_seed(self.made)
        measured = MeasuredClips(torch.randn(1, 32, generator=draw), {"flow": torch.ones(1)}, None)
        pixels = torch.randint(256, (2, 4, 4, 3), generator=draw, dtype=torch.uint8).numpy()
        return ClipSet(measured, (pixels,), torch.ones(1))
