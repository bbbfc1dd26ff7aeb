"""Random numbers that depend on what they are for and on nothing else.

Every stream is named by the run's seed, a purpose and a few counters, and is made afresh where it
is needed. There is no state to save, so a run that was resumed, restarted after a failure or split
over other ranks and micro-batches sees the same numbers.

Streams are torch's CPU generators, and draws are made in float32 on the CPU, whatever the run
computes on: a generator on a GPU would give other numbers on another device. The integers are the
same on every machine; normal deviates are made from them in floating point, so they agree to
rounding between processor families and exactly between like machines.

Two streams of a run may coincide: torch's CPU engine (a Mersenne twister) keeps 32 bits of its
seed. In a run of a million streams about a hundred pairs do, almost all of them far apart in time
and under other captions, where an equal noise does no harm. Nothing here may be used for secrets.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sgmd_core.phases import Phase
from sgmd_core.schedule import NUM_SCORE_LEVELS, FlowMatchSchedule, RandomSteps
from sgmd_core.types import Draws, Look, Looks, MicroBatchKey, PerSample, Samples

_SEPARATOR = "\x1f"


def random_generator(seed: int, stream: str, *counters: int) -> torch.Generator:
    """Makes the random stream of that name, at its beginning.

    Args:
        seed: The run's seed.
        stream: What the numbers are for, for example "samples/generate".
        *counters: Which of them: iteration, sample, ...

    Returns:
        A generator on the CPU, seeded by 63 bits of a hash of all arguments.
    """
    name = _SEPARATOR.join(str(part) for part in (seed, stream, *counters))
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@dataclass(frozen=True, slots=True)
class RolloutRule:
    """Rule by which the number of steps of a rollout and its exit step are drawn.

    Attributes:
        first_exit: The exit step is uniform on first_exit .. num_steps - 1.
        random_steps: Draws number and levels of the rollout's steps; None: the steps of the
            generator on the schedule's own grid.
        phase: Bounds exit steps and score levels to those of a phase.
    """

    first_exit: int = 0
    random_steps: RandomSteps | None = None
    phase: Phase | None = None


def draw(
    seed: int,
    key: MicroBatchKey,
    sample_indices: Sequence[int],
    latent_shape: tuple[int, int, int, int],
    schedule: FlowMatchSchedule,
    num_steps: int,
    rule: RolloutRule = RolloutRule(),
    looks: Looks | None = None,
) -> Draws:
    """Draws every random number that a micro-batch consumes.

    Each sample has one stream, counted by (iteration, sample index): its initial noise, its score
    level and its score noise, in this order. The exit step, which is one for the whole
    micro-batch, has a stream counted by (iteration, `key.exit_draw`), which is the micro-batch
    where the key names no other. So initial noise, score levels and score noise do not depend on
    how an iteration is split into micro-batches; exit steps do not either, if micro-batches that
    are parts of one name the same draw. The incarnation is not counted: a restarted iteration
    repeats its numbers.

    Args:
        seed: The run's seed.
        key: The micro-batch.
        sample_indices: Position of each sample in the iteration's whole batch.
        latent_shape: (c, t, h, w) of one sample.
        schedule: Gives the score law.
        num_steps: Steps of the generator.
        rule: Law of the rollout's steps and exit step.
        looks: Score queries beside the one at the samples.

    Returns:
        The draws, in float32 on the CPU.
    """
    random_steps, phase = rule.random_steps, rule.phase
    if random_steps is not None:
        num_steps = rollout_steps(seed, key, random_steps)
    exits_at = exit_of(seed, key, num_steps, rule.first_exit, phase)
    grid = _grid(seed, key, sample_indices, schedule, num_steps, random_steps)
    # Levels of a random grid are each sample's own, and bound no window.
    bounds = grid[0] if random_steps is None else None
    levels_of = phase.levels_for(key.purpose) if phase else schedule.score_levels(bounds, exits_at)
    has_own_table = phase is not None and not phase.is_expert
    sigma_of = schedule.table_sigma if has_own_table else schedule.score_sigma
    streams = _SampleStreams(seed, key, tuple(sample_indices), latent_shape)
    own = streams.own(levels_of)
    looks = looks or Looks()
    return Draws(
        initial_noise=own.initial_noise,
        exit_step=exits_at,
        sigma=sigma_of(own.levels),
        noise=own.noise,
        grid=None if random_steps is None else grid,
        guide=streams.guide(grid[:, exits_at]) if looks.splits_guidance else None,
        off=streams.off(schedule) if looks.off_trajectory else None,
    )


def _grid(
    seed: int,
    key: MicroBatchKey,
    sample_indices: Sequence[int],
    schedule: FlowMatchSchedule,
    num_steps: int,
    random_steps: RandomSteps | None,
) -> Tensor:
    """Noise levels of each sample's rollout: the schedule's, or drawn from a stream of its own."""
    if random_steps is None:
        return schedule.generator_grid(num_steps).expand(len(sample_indices), -1)
    inner = [
        torch.rand(
            num_steps - 1,
            generator=random_generator(seed, f"grid/{key.purpose}", key.iteration, index),
        )
        for index in sample_indices
    ]
    return random_steps.grid(torch.stack(inner), schedule.shift)


@dataclass(frozen=True, slots=True)
class _OwnDraws:
    """Initial noise, raw score level and score noise of each sample of a micro-batch."""

    initial_noise: Tensor
    levels: Tensor
    noise: Tensor


@dataclass(frozen=True, slots=True)
class _SampleStreams:
    """Draws of a micro-batch by sample; every sample has its own stream, and one for each look."""

    seed: int
    key: MicroBatchKey
    sample_indices: tuple[int, ...]
    latent_shape: tuple[int, int, int, int]

    def own(self, levels_of: tuple[int, int]) -> _OwnDraws:
        """Draws from the samples' own streams; raw levels in levels_of[0] .. levels_of[1] - 1."""
        initial_noise: list[Tensor] = []
        levels: list[Tensor] = []
        noise: list[Tensor] = []
        for stream in self._streams("samples"):
            initial_noise.append(self._noise(stream))
            levels.append(torch.randint(*levels_of, (1,), generator=stream))
            noise.append(self._noise(stream))
        return _OwnDraws(torch.stack(initial_noise), torch.cat(levels), torch.stack(noise))

    def guide(self, exit_sigma: PerSample) -> Look:
        """Guidance is looked at uniformly between no noise and that of the exit step."""
        shares: list[Tensor] = []
        noise: list[Tensor] = []
        for stream in self._streams("guide"):
            shares.append(torch.rand(1, generator=stream))
            noise.append(self._noise(stream))
        return Look(torch.cat(shares) * exit_sigma, torch.stack(noise))

    def off(self, schedule: FlowMatchSchedule) -> Look:
        """Both levels off the trajectory are drawn by one law, independently."""
        levels: list[Tensor] = []
        noise: list[Tensor] = []
        for stream in self._streams("off"):
            levels.append(torch.randint(NUM_SCORE_LEVELS, (2,), generator=stream))
            noise.append(self._noise(stream))
        start, sigma = torch.stack(levels, dim=1)
        return Look(
            schedule.renoise_sigma(sigma), torch.stack(noise), start=schedule.renoise_sigma(start)
        )

    def _streams(self, name: str) -> Iterator[torch.Generator]:
        for index in self.sample_indices:
            stream = f"{name}/{self.key.purpose}"
            yield random_generator(self.seed, stream, self.key.iteration, index)

    def _noise(self, stream: torch.Generator) -> Tensor:
        return torch.randn(self.latent_shape, generator=stream, dtype=torch.float32)


def data_draws(
    seed: int,
    key: MicroBatchKey,
    sample_indices: Sequence[int],
    latent_shape: tuple[int, int, int, int],
) -> tuple[PerSample, Tensor]:
    """Draws that data are noised by: a standard normal number of each sample, and its noise.

    Args:
        seed: The run's seed.
        key: The micro-batch.
        sample_indices: Position of each sample in the iteration's whole batch.
        latent_shape: (c, t, h, w) of one sample.
    """
    streams = [
        random_generator(seed, f"data/{key.purpose}", key.iteration, index)
        for index in sample_indices
    ]
    normal = torch.cat([torch.randn(1, generator=stream) for stream in streams])
    return normal, _noise(streams, latent_shape)


def stride_draws(
    seed: int,
    key: MicroBatchKey,
    sample_indices: Sequence[int],
    latent_shape: tuple[int, int, int, int],
) -> tuple[PerSample, PerSample, Tensor]:
    """Draws of strides of an inner flow: two uniform numbers of each sample, and its inner noise.

    Args:
        seed: The run's seed.
        key: The micro-batch.
        sample_indices: Position of each sample in the iteration's whole batch.
        latent_shape: (c, t, h, w) of one sample.
    """
    streams = [
        random_generator(seed, f"strides/{key.purpose}", key.iteration, index)
        for index in sample_indices
    ]
    uniform, choice = torch.stack([torch.rand(2, generator=each) for each in streams], dim=1)
    return uniform, choice, _noise(streams, latent_shape)


def _noise(streams: Sequence[torch.Generator], latent_shape: tuple[int, int, int, int]) -> Tensor:
    """Noise of each sample, drawn from its stream."""
    return torch.stack(
        [torch.randn(latent_shape, generator=each, dtype=torch.float32) for each in streams]
    )


def derived_noise(latents: Samples, *counters: int) -> Samples:
    """Standard normal numbers, those of each sample drawn from a hash of its latents.

    They do not depend on how a batch is split, where it is computed or what was drawn before.

    Args:
        latents: Noise, or other latents that no two samples share.
        *counters: Which draw of several.
    """
    drawn: list[Tensor] = []
    # Stacked runs of one seed hold the same samples many times; a draw costs more than a hash.
    by_seed: dict[int, Tensor] = {}
    for sample in latents.detach().float().cpu():
        digest = hashlib.blake2b(sample.contiguous().numpy().tobytes(), digest_size=8)
        for counter in counters:
            digest.update(f"{_SEPARATOR}{counter}".encode())
        seed = int.from_bytes(digest.digest(), "big") >> 1
        if seed not in by_seed:
            stream = torch.Generator().manual_seed(seed)
            by_seed[seed] = torch.randn(sample.shape, generator=stream)
        drawn.append(by_seed[seed])
    return torch.stack(drawn).to(latents)


def rollout_steps(seed: int, key: MicroBatchKey, random_steps: RandomSteps) -> int:
    """Number of steps of a micro-batch's rollout, as `draw` draws it.

    It is counted as the exit step is, by iteration and `key.exit_draw`, so all ranks and parts that
    share an exit step share it; nothing that a rank has of its own enters.

    Args:
        seed: The run's seed.
        key: The micro-batch.
        random_steps: Range of the number.
    """
    draw = key.micro_batch if key.exit_draw is None else key.exit_draw
    stream = random_generator(seed, f"steps/{key.purpose}", key.iteration, draw)
    first, last = random_steps.min_steps, random_steps.max_steps
    return int(torch.randint(first, last + 1, (), generator=stream))


def exit_of(
    seed: int, key: MicroBatchKey, num_steps: int, first_exit: int, phase: Phase | None
) -> int:
    """The exit step of a micro-batch that may belong to a phase; see `exit_step`."""
    if phase is None:
        return exit_step(seed, key, num_steps, first_exit)
    first = max(first_exit, phase.first_exit_for(key.purpose))
    return exit_step(seed, key, phase.end, first)


def exit_step(seed: int, key: MicroBatchKey, num_steps: int, first_exit: int = 0) -> int:
    """The rollout step at which a micro-batch leaves for x0, as `draw` draws it.

    Args:
        seed: The run's seed.
        key: The micro-batch.
        num_steps: Steps of the generator.
        first_exit: The exit step is uniform on first_exit .. num_steps - 1.
    """
    draw = key.micro_batch if key.exit_draw is None else key.exit_draw
    stream = random_generator(seed, f"exit/{key.purpose}", key.iteration, draw)
    return int(torch.randint(first_exit, num_steps, (), generator=stream))
