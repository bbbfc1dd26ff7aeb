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
from collections.abc import Sequence

import torch
from torch import Tensor

from sgmd_core.schedule import NUM_SCORE_LEVELS, FlowMatchSchedule
from sgmd_core.types import Draws, MicroBatchKey

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


def draw(
    seed: int,
    key: MicroBatchKey,
    sample_indices: Sequence[int],
    latent_shape: tuple[int, int, int, int],
    schedule: FlowMatchSchedule,
    num_steps: int,
    first_exit: int = 0,
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
        first_exit: The exit step is uniform on first_exit .. num_steps - 1.

    Returns:
        The draws, in float32 on the CPU.
    """
    initial_noise: list[Tensor] = []
    levels: list[Tensor] = []
    noise: list[Tensor] = []
    for index in sample_indices:
        stream = random_generator(seed, f"samples/{key.purpose}", key.iteration, index)
        initial_noise.append(torch.randn(latent_shape, generator=stream, dtype=torch.float32))
        levels.append(torch.randint(NUM_SCORE_LEVELS, (1,), generator=stream))
        noise.append(torch.randn(latent_shape, generator=stream, dtype=torch.float32))
    return Draws(
        initial_noise=torch.stack(initial_noise),
        exit_step=exit_step(seed, key, num_steps, first_exit),
        sigma=schedule.score_sigma(torch.cat(levels)),
        noise=torch.stack(noise),
    )


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
