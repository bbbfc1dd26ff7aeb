"""Random numbers of all members of a study in closed-form worlds.

Draws are counted by (seed, purpose, iteration): equal seeds of all variants see equal numbers, so
variants are compared seed by seed. Exit steps are drawn once an iteration for all seeds. Data are
samples of the mixture itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.config.gaussian_study import GaussianStudyConfig
from sgmd_core.phases import Phases
from sgmd_core.schedule import NUM_SCORE_LEVELS
from sgmd_core.seeds import exit_of, random_generator
from sgmd_core.types import Latents, MicroBatchKey, PerSample, Purpose, Text
from sgmd_core.worlds.mixture import GaussianMixture

_EXIT_SEED = 0


@dataclass(frozen=True, slots=True)
class MemberBatch:
    """Random numbers of one batch of all members; an exit step for all."""

    key: MicroBatchKey
    initial_noise: Latents
    sigma: PerSample
    noise: Latents
    exit_step: int


class MemberDraws:
    """Draws of all members, one under the other; members of one seed share them.

    Args:
        config: The study.
        mixture: The world.
        num_steps: Steps of the generator.
        seeds: Seed of each member.
        phases: Phases of the iterations, for a method that has them.
    """

    def __init__(
        self,
        config: GaussianStudyConfig,
        mixture: GaussianMixture,
        num_steps: int,
        seeds: Sequence[int],
        phases: Phases | None,
    ) -> None:
        self._size, self._schedule = config.batch_size, config.schedule
        self._mixture, self._num_steps = mixture, num_steps
        self._seeds, self._phases = seeds, phases

    def batch(self, iteration: int, purpose: Purpose, update: int) -> MemberBatch:
        """Numbers of a rollout and of a score query at each of its samples."""
        stream, place = f"gaussians/{purpose}", (iteration, update)
        key = MicroBatchKey(iteration, update, purpose)
        phase = None if self._phases is None else self._phases.at(iteration)
        first, stop = (0, NUM_SCORE_LEVELS) if phase is None else phase.levels_for(purpose)
        levels = self._each(
            lambda seed: torch.randint(
                first,
                stop,
                (self._size,),
                generator=random_generator(seed, f"{stream}/level", *place),
            )
        )
        schedule = self._schedule
        return MemberBatch(
            key,
            self.noise(f"{stream}/start", *place),
            schedule.score_sigma(levels) if phase is None else schedule.table_sigma(levels),
            self.noise(f"{stream}/noise", *place),
            exit_of(_EXIT_SEED, key, self._num_steps, 0, phase),
        )

    def data(self, iteration: int) -> Latents:
        """Samples of the mixture, a batch for each member."""
        drawn = self._each(
            lambda seed: self._mixture.sample(
                self._size, random_generator(seed, "gaussians/data", iteration)
            )
        )
        return drawn[:, :, None, None, None]

    def noise(self, stream: str, *counters: int, size: int | None = None) -> Latents:
        """Standard normal latents, a batch for each member."""
        shape = (size or self._size, self._mixture.centres.shape[1])
        drawn = self._each(
            lambda seed: torch.randn(shape, generator=random_generator(seed, stream, *counters))
        )
        return drawn[:, :, None, None, None]

    def uniform(self, stream: str, *counters: int) -> PerSample:
        """Uniform numbers in [0, 1), one a sample."""
        return self._each(
            lambda seed: torch.rand(self._size, generator=random_generator(seed, stream, *counters))
        )

    def _each(self, drawn: Callable[[int], Tensor]) -> Tensor:
        by_seed = {seed: drawn(seed) for seed in set(self._seeds)}
        return torch.cat([by_seed[seed] for seed in self._seeds])


def no_caption(count: int) -> Text:
    """Captions of worlds that have none."""
    return torch.zeros(count, 1, 1)
