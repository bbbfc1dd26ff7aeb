"""Distillation of small generators from an exact teacher: the iteration of the roles, in one place.

    x0 = rollout(generator)                            graph at the exit step only
    signal   d L_G / d x0, by the ways the objective names
    track    L_F back to the fake score's weights, on the same batch or on fresh ones
    learn    x0.backward(signal)
    data     terms on samples of the mixture, where the objective has them (`data_terms.py`)

All members make their iteration together (`networks.py`), with the draws of their seeds
(`draws.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipelines.config.gaussian_study import (
    INNER_STEPS,
    GaussianStudyConfig,
    GaussianVariant,
    MixtureSettings,
)
from pipelines.study.gaussians.data_terms import (
    MemberDiscriminator,
    consistency_of_members,
    strides_of_members,
)
from pipelines.study.gaussians.draws import MemberBatch, MemberDraws, no_caption
from pipelines.study.gaussians.networks import (
    MemberAdam,
    MemberExperts,
    MemberNetworks,
    MemberTransition,
    NetworkShape,
)
from sgmd_core.inner_flow import inner_grid
from sgmd_core.metrics.lag import falling_rate
from sgmd_core.objectives import GradientPath, compared_by, phases_of, restarts_of
from sgmd_core.objectives.consistency import consistency_of, learns_from_samples
from sgmd_core.objectives.meanflow import FlowObjective, flow_of
from sgmd_core.objectives.shuffled import shuffled_teacher
from sgmd_core.phases import Phases
from sgmd_core.rollout import anchored, euler_sample, rollout, rollout_exit
from sgmd_core.seeds import random_generator
from sgmd_core.types import Latents, NoisedBatch, Purpose, detached
from sgmd_core.worlds.mixture import GaussianMixture, mixture_centres
from workers.ema import effective_decay

Velocity = Callable[[NoisedBatch], Latents]
"""A velocity, or a difference of two, at a query."""

_WORLD_SEED = 0


@dataclass(frozen=True, slots=True)
class Member:
    """One run: a seed and its learning rates."""

    seed: int
    generator_rate: float
    fake_rate: float


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
        self._phases = phases_of(variant.objective, config.schedule, world.num_steps)
        self._draws = MemberDraws(config, self.teacher, world.num_steps, seeds, self._phases)
        # A consistency function leads to x0 from any state, so its steps renoise.
        self._renoises = consistency_of(variant.objective) is not None
        networks = config.networks
        shape = NetworkShape(world.dim, networks.width, networks.hidden_layers, seeds)
        self._generator = _generators(config, world, variant, shape, self.teacher, self._phases)
        self._fake_score = MemberNetworks(self.teacher, shape, "fake_score")
        self._start = [each.detach().clone() for each in self._fake_score.parameters()]
        self._average = [each.detach().clone() for each in self._generator.parameters()]
        fake_rates = [member.fake_rate for member in members]
        self._optimizers = (
            MemberAdam(
                self._generator, [member.generator_rate for member in members], networks.beta2
            ),
            MemberAdam(self._fake_score, fake_rates, networks.beta2),
        )
        self._discriminator = (
            None
            if compared_by(variant.objective) is None
            else MemberDiscriminator(
                variant.objective, self.teacher, shape, fake_rates, networks.beta2
            )
        )

    def iterate(self, iteration: int) -> None:
        """Makes one update of the generators, and those of the fake scores that belong to it."""
        generator_step, fake_step = (each.step for each in self._optimizers)
        is_shared = self._variant.tracking == "shared"
        if iteration in restarts_of(self._objective):
            self._optimizers[1].restart(self._start)
        if learns_from_samples(self._objective):
            self._learn(iteration, is_shared)
        self._learn_from_data(iteration)
        generator_step()
        if self._discriminator is not None:
            self._discriminator.step()
        self._average_weights(iteration)
        if is_shared:
            fake_step()
            return
        for update in range(self._objective.fake_updates):
            batch = self._draws.batch(iteration, Purpose.TRACK, update)
            query = self._query(batch, keep_graph=False)
            self._track(query, self._fake_score(query.x_t, query.sigma, query.text))
            fake_step()

    @torch.no_grad()
    def samples(self, num_samples: int) -> Tensor:
        """Samples of the averaged generators: (members, num_samples, dim)."""
        own = [parameter.detach().clone() for parameter in self._generator.parameters()]
        self._load(self._average)
        noise = self._draws.noise("gaussians/measure", 0, size=num_samples)
        made = euler_sample(
            self._generator, self._grid, noise, no_caption(len(noise)), renoise=self._renoises
        )
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
            self._generator, self._grid, noise, no_caption(len(noise)), 0, keep_graph=False
        )
        means = points(made).reshape(len(self._members), -1, self._dim).double()
        laws: list[tuple[Tensor, Tensor]] = []
        for mean, *rows in means:
            matrix = torch.stack(rows) - mean
            laws.append((mean, matrix.T @ matrix))
        return laws

    def _lag_query(self, iteration: int, number: int) -> NoisedBatch:
        return self._query(self._draws.batch(iteration, Purpose.LAG, number), keep_graph=False)

    @torch.no_grad()
    def _fake_velocity(self, query: NoisedBatch) -> Latents:
        return self._fake_score(query.x_t, query.sigma, query.text)

    def _mean_square(self, queries: Sequence[NoisedBatch], error_of: Velocity) -> Tensor:
        squares = [error_of(query).double().square() for query in queries]
        members = len(self._members)
        return torch.stack([each.reshape(members, -1).mean(dim=1) for each in squares]).mean(dim=0)

    def _learn(self, iteration: int, is_shared: bool) -> None:
        """Gathers the generators' gradient, and with shared tracking the fake scores' as well."""
        batch = self._draws.batch(iteration, Purpose.GENERATE, 0)
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
        loss = self._objective.generator_loss(query, velocity_fake, velocity_teacher).value
        if self._discriminator is not None:
            answers = velocity_fake, velocity_teacher
            loss = loss + self._discriminator.loss(query, *answers, self._draws)
        (grad_x0,) = torch.autograd.grad(
            len(self._members) * loss, query.x0, retain_graph=is_shared
        )
        if is_shared:
            self._track(detached(query), velocity_fake)
        made.x0.backward(grad_x0)

    def _track(self, query: NoisedBatch, velocity_fake: Latents) -> None:
        loss = self._objective.tracking_loss(query, velocity_fake).value
        (len(self._members) * loss).backward(inputs=list(self._fake_score.parameters()))

    def _learn_from_data(self, iteration: int) -> None:
        """Gathers the generators' gradient by terms on samples of the mixture."""
        consistency, flow = consistency_of(self._objective), flow_of(self._objective)
        generator, draws = self._generator, self._draws
        if consistency is not None:
            loss = consistency_of_members(consistency, generator, self.teacher, draws, iteration)
            (len(self._members) * loss).backward()
        if flow is not None:
            assert isinstance(generator, MemberTransition), "strides are those of a flow head"
            loss = strides_of_members(flow, generator, self._grid, draws, iteration)
            (len(self._members) * loss).backward()

    def _query(self, batch: MemberBatch, *, keep_graph: bool) -> NoisedBatch:
        text = no_caption(len(batch.sigma))
        left = rollout_exit(
            self._generator,
            self._grid,
            batch.initial_noise,
            text,
            batch.exit_step,
            keep_graph=keep_graph,
            renoise=self._renoises,
        )
        query = NoisedBatch(left.x0, batch.sigma, batch.noise, text, batch.key)
        phase = None if self._phases is None else self._phases.at(batch.key.iteration)
        if phase is None or not phase.anchored:
            return query
        return anchored(query, left, self._grid[phase.end])

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


def _generators(
    config: GaussianStudyConfig,
    world: MixtureSettings,
    variant: GaussianVariant,
    shape: NetworkShape,
    teacher: GaussianMixture,
    phases: Phases | None,
) -> MemberNetworks | MemberExperts | MemberTransition:
    """Generators as a method has them: one network, two experts, or a flow head."""
    layers = config.networks.generator_layers
    own = shape if layers is None else replace(shape, hidden_layers=layers)
    base = teacher if world.num_steps > 1 else None
    if isinstance(variant.objective, FlowObjective):
        return MemberTransition(base, own, inner_grid(INNER_STEPS, 1.0), "generator")
    if phases is None:
        return MemberNetworks(base, own, "generator")
    grid = config.schedule.few_step_grid(world.num_steps)
    names = ("generator", "generator/low")
    high, low = (MemberNetworks(base, own, name) for name in names)
    return MemberExperts((high, low), float(grid[phases.high.end]))
