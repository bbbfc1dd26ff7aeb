"""Distillation of small generators from an exact teacher: the iteration of the roles, in one place.

    x0 = rollout(generator)                            graph at the exit step only
    signal   d L_G / d x0, by the ways the objective names
    track    L_F back to the fake score's weights, on the same batch or on fresh ones
    learn    x0.backward(signal)

All members make their iteration together (`networks.py`). Draws are counted by (seed, purpose,
iteration): equal seeds of all variants see equal numbers, so variants are compared seed by seed.
Exit steps are drawn once an iteration for all seeds.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.config.gaussian_study import GaussianStudyConfig, GaussianVariant, MixtureSettings
from pipelines.study.gaussians.networks import MemberAdam, MemberNetworks
from sgmd_core.metrics.lag import falling_rate
from sgmd_core.objectives import GradientPath
from sgmd_core.objectives.shuffled import shuffled_teacher
from sgmd_core.rollout import euler_sample, rollout
from sgmd_core.schedule import NUM_SCORE_LEVELS
from sgmd_core.seeds import exit_step, random_generator
from sgmd_core.types import Latents, MicroBatchKey, NoisedBatch, Purpose, detached
from sgmd_core.worlds.mixture import GaussianMixture, mixture_centres
from workers.ema import effective_decay

Velocity = Callable[[NoisedBatch], Latents]
"""A velocity, or a difference of two, at a query."""

_WORLD_SEED = 0
_EXIT_SEED = 0


@dataclass(frozen=True, slots=True)
class Member:
    """One run: a seed and its learning rates."""

    seed: int
    generator_rate: float
    fake_rate: float


@dataclass(frozen=True, slots=True)
class _Batch:
    """Random numbers of one batch of all members; an exit step for all."""

    initial_noise: Latents
    sigma: Tensor
    noise: Latents
    exit_step: int


def mixture_of(world: MixtureSettings) -> GaussianMixture:
    """The world's mixture, which is also its exact teacher."""
    stream = random_generator(_WORLD_SEED, "gaussians/centres", world.dim, world.modes)
    centres = mixture_centres(world.dim, world.modes, world.radius, stream)
    return GaussianMixture(centres, world.spread)


def points(values: Latents) -> Tensor:
    """Latents (n, dim, 1, 1, 1) as points (n, dim)."""
    return values.flatten(1)


class GaussianDistillation:
    """Distillation of all members by one variant in one world.

    Args:
        config: The study.
        world: The world.
        variant: The method.
        members: The runs.
    """

    def __init__(
        self,
        config: GaussianStudyConfig,
        world: MixtureSettings,
        variant: GaussianVariant,
        members: Sequence[Member],
    ) -> None:
        self._config, self._variant, self._members = config, variant, members
        self._objective, self._dim = variant.objective, world.dim
        self._grid = config.schedule.few_step_grid(world.num_steps)
        self.teacher = mixture_of(world)
        seeds = [member.seed for member in members]
        networks = config.networks
        layers = networks.hidden_layers
        own = layers if networks.generator_layers is None else networks.generator_layers
        base = self.teacher if world.num_steps > 1 else None
        self._generator = MemberNetworks(base, world.dim, networks.width, own, seeds, "generator")
        self._fake_score = MemberNetworks(
            self.teacher, world.dim, networks.width, layers, seeds, "fake_score"
        )
        self._average = [each.detach().clone() for each in self._generator.parameters()]
        self._optimizers = (
            MemberAdam(self._generator, [member.generator_rate for member in members]),
            MemberAdam(self._fake_score, [member.fake_rate for member in members]),
        )

    def iterate(self, iteration: int) -> None:
        """Makes one update of the generators, and those of the fake scores that belong to it."""
        generator_step, fake_step = (each.step for each in self._optimizers)
        is_shared = self._variant.tracking == "shared"
        self._learn(iteration, is_shared)
        generator_step()
        self._average_weights(iteration)
        if is_shared:
            fake_step()
            return
        for update in range(self._objective.fake_updates):
            batch = self._draw(iteration, Purpose.TRACK, update)
            query = self._query(batch, keep_graph=False)
            self._track(query, self._fake_score(query.x_t, query.sigma, query.text))
            fake_step()

    @torch.no_grad()
    def samples(self, num_samples: int) -> Tensor:
        """Samples of the averaged generators: (members, num_samples, dim)."""
        own = [parameter.detach().clone() for parameter in self._generator.parameters()]
        self._load(self._average)
        noise = self._noise("gaussians/measure", 0, num_samples)
        made = euler_sample(self._generator, self._grid, noise, _no_text(len(noise)))
        self._load(own)
        return points(made).reshape(len(self._members), num_samples, self._dim)

    def held_queries(self, iteration: int, count: int) -> list[NoisedBatch]:
        """Score queries of the present generators, for measurements only."""
        return [self._lag_query(iteration, number) for number in range(count)]

    def held_loss(self, queries: Sequence[NoisedBatch]) -> Tensor:
        """Tracking loss of each member, in velocities: a mean over queries, (members,)."""
        return self._mean_square(queries, lambda query: self._fake_velocity(query) - query.velocity)

    def held_error(self, queries: Sequence[NoisedBatch], exact: Velocity) -> Tensor:
        """Squared error of each fake score against exact velocities, (members,).

        Args:
            queries: Where both are looked at.
            exact: Velocities that the fake scores should have.
        """
        return self._mean_square(queries, lambda query: self._fake_velocity(query) - exact(query))

    @contextmanager
    def extra_updates(
        self, iteration: int, rate: float, updates: int, first: int
    ) -> Iterator[None]:
        """Makes extra updates of the fake scores, which are taken back when the block ends.

        Args:
            iteration: Iteration after the present state, by which draws are counted.
            rate: Multiple of the rates of the first of them; it falls to 0.
            updates: How many.
            first: Batches of the iteration's that are held.
        """
        optimizer = self._optimizers[1]
        with optimizer.taken_back():
            for update in range(updates):
                query = self._lag_query(iteration, first + update)
                self._track(query, self._fake_score(query.x_t, query.sigma, query.text))
                optimizer.step(falling_rate(rate, update, updates))
            yield

    @torch.no_grad()
    def affine_laws(self) -> list[tuple[Tensor, Tensor]]:
        """Mean and covariance of what each generator makes, of affine ones of one step."""
        corners = torch.cat([torch.zeros(1, self._dim), torch.eye(self._dim)])
        noise = corners.repeat(len(self._members), 1)[:, :, None, None, None]
        made = rollout(
            self._generator, self._grid, noise, _no_text(len(noise)), 0, keep_graph=False
        )
        means = points(made).reshape(len(self._members), -1, self._dim).double()
        laws: list[tuple[Tensor, Tensor]] = []
        for mean, *rows in means:
            matrix = torch.stack(rows) - mean
            laws.append((mean, matrix.T @ matrix))
        return laws

    def _lag_query(self, iteration: int, number: int) -> NoisedBatch:
        return self._query(self._draw(iteration, Purpose.LAG, number), keep_graph=False)

    @torch.no_grad()
    def _fake_velocity(self, query: NoisedBatch) -> Latents:
        return self._fake_score(query.x_t, query.sigma, query.text)

    def _mean_square(self, queries: Sequence[NoisedBatch], error_of: Velocity) -> Tensor:
        squares = [error_of(query).double().square() for query in queries]
        members = len(self._members)
        return torch.stack([each.reshape(members, -1).mean(dim=1) for each in squares]).mean(dim=0)

    def _learn(self, iteration: int, is_shared: bool) -> None:
        """Gathers the generators' gradient, and with shared tracking the fake scores' as well."""
        batch = self._draw(iteration, Purpose.GENERATE, 0)
        made = self._query(batch, keep_graph=True)
        query = detached(made, x0=made.x0.detach().requires_grad_())
        through_teacher = self._objective.path is GradientPath.BOTH_SCORES
        # In the shared graph the fake score's weights get the tracking loss alone.
        through_fake = is_shared or self._objective.path is not GradientPath.SAMPLE
        with torch.set_grad_enabled(through_fake):
            velocity_fake = self._fake_score(query.x_t, query.sigma, query.text)
        with torch.set_grad_enabled(through_teacher):
            velocity_teacher = self.teacher(query.x_t, query.sigma, query.text)
        if self._variant.gap == "shuffled":
            # Members have even numbers of samples: neighbours are of one member.
            velocity_teacher = shuffled_teacher(velocity_fake, velocity_teacher)
        loss = self._objective.generator_loss(query, velocity_fake, velocity_teacher)
        (grad_x0,) = torch.autograd.grad(
            len(self._members) * loss.value, query.x0, retain_graph=is_shared
        )
        if is_shared:
            self._track(detached(query), velocity_fake)
        made.x0.backward(grad_x0)

    def _track(self, query: NoisedBatch, velocity_fake: Latents) -> None:
        loss = self._objective.tracking_loss(query, velocity_fake).value
        (len(self._members) * loss).backward(inputs=list(self._fake_score.parameters()))

    def _query(self, batch: _Batch, *, keep_graph: bool) -> NoisedBatch:
        text = _no_text(len(batch.sigma))
        x0 = rollout(
            self._generator,
            self._grid,
            batch.initial_noise,
            text,
            batch.exit_step,
            keep_graph=keep_graph,
        )
        return NoisedBatch(x0=x0, sigma=batch.sigma, noise=batch.noise, text=text)

    def _draw(self, iteration: int, purpose: Purpose, update: int) -> _Batch:
        size, num_steps = self._config.batch_size, len(self._grid) - 1
        stream = f"gaussians/{purpose}"
        place = (iteration, update)
        initial_noise = self._noise(f"{stream}/start", *place, size)
        noise = self._noise(f"{stream}/noise", *place, size)
        levels = self._each(
            lambda seed: torch.randint(
                NUM_SCORE_LEVELS,
                (size,),
                generator=random_generator(seed, f"{stream}/level", *place),
            )
        )
        key = MicroBatchKey(iteration, update, purpose)
        return _Batch(
            initial_noise,
            self._config.schedule.score_sigma(levels),
            noise,
            exit_step(_EXIT_SEED, key, num_steps),
        )

    def _noise(self, stream: str, *counters_and_size: int) -> Latents:
        *counters, size = counters_and_size
        drawn = self._each(
            lambda seed: torch.randn(
                size, self._dim, generator=random_generator(seed, stream, *counters)
            )
        )
        return drawn[:, :, None, None, None]

    def _each(self, drawn: Callable[[int], Tensor]) -> Tensor:
        """Draws of every member, one under the other; members of one seed share them."""
        by_seed = {seed: drawn(seed) for seed in {member.seed for member in self._members}}
        return torch.cat([by_seed[member.seed] for member in self._members])

    def _average_weights(self, updates: int) -> None:
        decay = effective_decay(self._config.networks.ema_decay, updates)
        with torch.no_grad():
            pairs = zip(self._average, self._generator.parameters(), strict=True)
            for average, parameter in pairs:
                average.lerp_(parameter, 1 - decay)

    def _load(self, values: Sequence[Tensor]) -> None:
        pairs = zip(self._generator.parameters(), values, strict=True)
        for parameter, value in pairs:
            parameter.copy_(value)


def measured_on_the_way(
    distillation: GaussianDistillation, num_iterations: int, measurements: int, num_samples: int
) -> Iterator[tuple[int, Tensor]]:
    """Distils, and gives samples of all members at equally spaced iterations, the last one the end.

    Yields:
        (iterations made, samples (members, num_samples, dim))
    """
    places = sorted({round(num_iterations * (i + 1) / measurements) for i in range(measurements)})
    for iteration in range(num_iterations):
        distillation.iterate(iteration)
        if iteration + 1 in places:
            yield iteration + 1, distillation.samples(num_samples)


def _no_text(count: int) -> Tensor:
    return torch.zeros(count, 1, 1)
