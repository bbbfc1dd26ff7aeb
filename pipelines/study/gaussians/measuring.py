"""Figures of a generator's samples against the mixture that it was to learn.

energy       squared energy distance to samples of the truth, without bias; 0 is perfect
on_mode      share of samples within the radius of a mode that holds 99 % of the truth's
lost_modes   modes that get less than a tenth of their share of the samples
spread       standard deviation within modes over the truth's; below 1 they have shrunk
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sgmd_core.metrics.energy import energy_distance
from sgmd_core.seeds import random_generator
from sgmd_core.worlds.mixture import GaussianMixture

ENERGY, ON_MODE, LOST_MODES, SPREAD = "energy", "on_mode", "lost_modes", "spread"
FIGURES = (ENERGY, ON_MODE, LOST_MODES, SPREAD)

_TRUTH_SHARE = 0.99
_LOST_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Truth:
    """Samples of the mixture to compare with, one set a seed, and a second one for the floor.

    Attributes:
        mixture: The world.
        num_samples: Samples of a set.
    """

    mixture: GaussianMixture
    num_samples: int

    def samples(self, seed: int, which: int = 0) -> Float[Tensor, "n dim"]:
        """A seed's samples; `which` counts independent sets."""
        stream = random_generator(seed, "gaussians/truth", which)
        return self.mixture.sample(self.num_samples, stream)

    def figures(self, samples: Float[Tensor, "n dim"], seed: int) -> dict[str, float]:
        """Figures of samples against the seed's set; NaN where a sample is not finite."""
        if not samples.isfinite().all():
            return dict.fromkeys(FIGURES, float("nan"))
        truth = self.samples(seed)
        return {
            ENERGY: energy_distance(samples, truth).item(),
            ON_MODE: self._on_mode(samples, truth),
            LOST_MODES: float(self._lost_modes(samples)),
            SPREAD: self._spread(samples) / self.mixture.spread,
        }

    def floor(self, seeds: Sequence[int]) -> list[Mapping[str, float]]:
        """Figures of a second set of the truth, as good as any generator can be."""
        return [self.figures(self.samples(seed, 1), seed) for seed in seeds]

    def _on_mode(self, samples: Tensor, truth: Tensor) -> float:
        _, usual = self.mixture.nearest_mode(truth)
        _, distance = self.mixture.nearest_mode(samples)
        return (distance <= usual.quantile(_TRUTH_SHARE)).double().mean().item()

    def _lost_modes(self, samples: Tensor) -> int:
        mode, _ = self.mixture.nearest_mode(samples)
        modes = len(self.mixture.centres)
        counts = torch.bincount(mode, minlength=modes)
        return int((counts < _LOST_SHARE * len(samples) / modes).sum())

    def _spread(self, samples: Tensor) -> float:
        """Root mean square deviation from the mean of each mode's own samples, per direction."""
        mode, _ = self.mixture.nearest_mode(samples)
        squares, freedom = torch.zeros((), dtype=torch.float64), 0
        for which in mode.unique():
            own = samples[mode == which].double()
            squares += (own - own.mean(dim=0)).square().sum()
            freedom += (len(own) - 1) * samples.shape[1]
        return (squares / freedom).sqrt().item() if freedom else 0.0
