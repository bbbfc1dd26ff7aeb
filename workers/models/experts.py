"""A denoiser of two experts, one for each range of noise levels.

    sigma >= boundary   high-noise expert
    sigma <  boundary   low-noise expert

Each sample goes through the expert of its own noise level, so the whole is a velocity model of all
noise levels: teacher, fake score and generator are each one such pair. A rollout crosses the
boundary, and a loss reaches the expert that made the prediction; the other one gets no gradient
and is left as it is by that update.

A role that looks at the noise levels of one expert has that one alone. A generator of which the
low-noise expert is trained has both: its rollouts begin with the other one, which is frozen.
"""

from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sgmd_core.phases import Expert
from workers.attention import AttentionName
from workers.models.family import Denoiser
from workers.sharding import is_sharded, num_ranks


class ExpertDenoiser(Denoiser):
    """Two denoisers as one velocity model, or one of them alone.

    Args:
        high: Expert of the noise levels from `boundary` to 1; None: nothing asks it.
        low: Expert of those below; None: nothing asks it.
        boundary: Noise level in (0, 1).
    """

    def __init__(self, high: Denoiser | None, low: Denoiser | None, boundary: float) -> None:
        super().__init__()
        self.high = high
        self.low = low
        self.boundary = boundary
        self._trained: Expert | None = None

    @property
    def experts(self) -> tuple[Denoiser, ...]:
        """Those that there are, the high-noise expert first."""
        return tuple(part for part in (self.high, self.low) if part is not None)

    def train_alone(self, expert: Expert) -> None:
        """Freeze the other expert for good: `requires_grad_` leaves it as it is."""
        self._trained = expert
        self.requires_grad_(True)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Turn gradients of the parameters on or off, except for those of a frozen expert."""
        super().requires_grad_(requires_grad)
        frozen = {"high": self.low, "low": self.high, None: None}[self._trained]
        if frozen is not None:
            frozen.requires_grad_(False)
        return self

    def forward(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Predict the velocity `noise - x0`; see `Denoiser.forward`.

        On several ranks every rank calls an expert that one of them has a sample for, because the
        ranks gather its weights together. A rank without such a sample gives it the first of its
        own, with weight 0.
        """
        is_high = sigma >= self.boundary
        if self.high is None or self.low is None:
            return self._alone(x_t, sigma, text, is_high)
        parts = ((self.high, is_high), (self.low, ~is_high))
        asked = self._asked(torch.stack([mine.any() for _, mine in parts]))
        order: list[Tensor] = []
        found: list[Tensor] = []
        unused: list[Tensor] = []
        for (expert, mine), is_asked in zip(parts, asked, strict=True):
            if not is_asked:
                continue
            expert.autocast_dtype = self.autocast_dtype
            positions = mine.nonzero().flatten()
            if len(positions) == len(sigma):
                found.append(expert(x_t, sigma, text))
            elif len(positions):
                found.append(expert(x_t[positions], sigma[positions], text[positions]))
            else:
                unused.append(expert(x_t[:1], sigma[:1], text[:1]))
            order.append(positions)
        velocity = found[0] if len(found) == 1 else torch.cat(found)[torch.cat(order).argsort()]
        return velocity + sum(0 * part.sum() for part in unused) if unused else velocity

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers of both experts, the high-noise expert's first."""
        return [block for expert in self.experts for block in expert.blocks]

    @property
    def trained_blocks(self) -> list[nn.Module]:
        """The layers of the experts that are not frozen."""
        own = {"high": self.high, "low": self.low, None: None}[self._trained]
        return self.blocks if own is None else own.blocks

    @property
    def frozen_part(self) -> str:
        """Prefix of the names of the expert that is there and never trained."""
        frozen = {"high": ("low.", self.low), "low": ("high.", self.high), None: ("", None)}
        prefix, expert = frozen[self._trained]
        return "" if expert is None else prefix

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a token, of either expert."""
        return self.experts[0].patch_size

    def store_in_fp8(self) -> None:
        """Keep the weights of both experts in 8 bits."""
        for expert in self.experts:
            expert.store_in_fp8()

    def set_attention(self, name: AttentionName) -> None:
        """Compute attention of both experts by a kernel."""
        for expert in self.experts:
            expert.set_attention(name)

    def split_tokens(self, ranks: int) -> None:
        """Split the tokens of every sample over ranks, in both experts."""
        for expert in self.experts:
            expert.split_tokens(ranks)

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of the layers of both experts in the backward pass."""
        for expert in self.experts:
            expert.layer_function = self.layer_function
            expert.set_checkpointing(enabled)

    def _alone(self, x_t: Tensor, sigma: Tensor, text: Tensor, is_high: Tensor) -> Tensor:
        """Predict by the one expert that is here."""
        expert = self.experts[0]
        own = is_high if self.low is None else ~is_high
        assert bool(own.all()), f"noise levels {sigma.tolist()} of an expert that is not here"
        expert.autocast_dtype = self.autocast_dtype
        return expert(x_t, sigma, text)

    def _asked(self, mine: Tensor) -> list[bool]:
        """Experts that this rank or another one has a sample for."""
        if is_sharded(self) and num_ranks() > 1:
            counts = mine.to(torch.int32)
            dist.all_reduce(counts)
            mine = counts > 0
        return mine.tolist()
