"""Terms of generators by data and by a discriminator, in closed-form worlds.

    consistency   rCM, sCM    data at drawn noise levels, derivative along the teacher's path
    strides       TMD         data at the generator's own steps, strides of the flow head
    heads         ADM, GAN    the teacher's step and the fake score's; or data and samples

Losses are means over the samples of all members; the caller of the backward pass multiplies by
their number.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipelines.study.gaussians.draws import MemberDraws, no_caption
from pipelines.study.gaussians.networks import (
    MemberAdam,
    MemberHeads,
    MemberTransition,
    NetworkShape,
)
from sgmd_core.objectives import Objective, SteppingObjective, adversary_of
from sgmd_core.objectives.adversarial import noised_alike
from sgmd_core.objectives.consistency import ConsistencyTerm
from sgmd_core.objectives.meanflow import MeanFlowTerm, Strides
from sgmd_core.trigflow import direction_weight
from sgmd_core.types import Latents, MicroBatchKey, NoisedBatch, PerSample, Purpose, per_sample
from sgmd_core.velocity import VelocityModel
from workers.tangents import derivative_along


def consistency_of_members(
    term: ConsistencyTerm,
    generator: VelocityModel,
    teacher: VelocityModel,
    draws: MemberDraws,
    iteration: int,
) -> Tensor:
    """The consistency term on data of the mixture, its weight included.

    Args:
        term: The term.
        generator: The generators.
        teacher: The exact teacher.
        draws: Where data, levels and noise come from.
        iteration: Updates of the generators made before.
    """
    uniform = draws.uniform("gaussians/data/level", iteration).double().clamp(1e-9, 1 - 1e-9)
    query = _noised_data(draws, iteration, term.sigma(torch.special.ndtri(uniform), 1))
    asked = (query.x_t, query.sigma, query.text)
    with torch.no_grad():
        path = teacher(*asked)
    weight = direction_weight(query.sigma).to(path)
    direction = per_sample(weight, path) * path, weight
    constant, derivative = derivative_along(generator, *asked, direction)
    return term.loss(query, generator(*asked), constant, path, derivative).value


def strides_of_members(
    term: MeanFlowTerm,
    generator: MemberTransition,
    grid: Tensor,
    draws: MemberDraws,
    iteration: int,
) -> Tensor:
    """The MeanFlow term on data of the mixture, its weight included.

    Args:
        term: The term, without guidance.
        generator: The generators.
        grid: Noise levels of the generator's steps, the end included.
        draws: Where data, levels and noise come from.
        iteration: Updates of the generators made before.
    """
    starts = grid[:-1].float()
    place = draws.uniform("gaussians/data/level", iteration) * len(starts)
    query = _noised_data(draws, iteration, starts[place.long().clamp_max(len(starts) - 1)])
    s, r = term.levels(
        draws.uniform("gaussians/strides/level", iteration),
        draws.uniform("gaussians/strides/choice", iteration),
        generator.inner_levels,
    )
    inner_noise = draws.noise("gaussians/strides/noise", iteration)
    strides = Strides(query.velocity, inner_noise, s, r)
    head = generator.head(query.x_t, query.sigma, query.text)
    at_s, below, above = strides.states
    low, high = strides.ends
    with torch.no_grad():
        ends = head(below, low, r), head(above, high, r)
    return term.loss(strides, head(at_s, s, r), *ends).value


class MemberDiscriminator:
    """Heads of all members on what the exact teacher says of a state, and their updates.

    Args:
        objective: Has an adversarial term without a penalty.
        teacher: The exact teacher.
        shape: Size of the heads.
        rates: Learning rate of each member: that of its fake score.
        beta2: Of Adam.
    """

    def __init__(
        self,
        objective: Objective,
        teacher: VelocityModel,
        shape: NetworkShape,
        rates: Sequence[float],
        beta2: float,
    ) -> None:
        term = adversary_of(objective)
        assert term is not None, "an objective with a discriminator has its term"
        self._objective, self._term = objective, term
        self._heads = MemberHeads(teacher, shape)
        self._optimizer = MemberAdam(self._heads, rates, beta2)
        self._members = len(rates)

    def loss(
        self,
        query: NoisedBatch,
        velocity_fake: Latents,
        velocity_teacher: Latents,
        draws: MemberDraws,
    ) -> Tensor:
        """Term of the generators' loss; accumulates the heads' own gradient.

        Args:
            query: Samples and the noise that they are looked at through; `x0` is a leaf.
            velocity_fake: The fake scores' answers, with a graph where steps are compared.
            velocity_teacher: The teacher's.
            draws: Where data come from.
        """
        objective = self._objective
        if isinstance(objective, SteppingObjective):
            real, made = objective.states(query, velocity_fake, velocity_teacher)
            sigma = query.sigma - objective.delta
        else:
            real, made = noised_alike(query, draws.data(query.key.iteration))
            sigma = query.sigma
        own = self._term.discriminator_loss(
            self._heads(real, sigma, query.text),
            self._heads(made.detach(), sigma, query.text),
            None,
        )
        parameters = list(self._heads.parameters())
        (self._members * own.value).backward(inputs=parameters)
        return self._term.generator_loss(self._heads(made, sigma, query.text)).value

    def step(self) -> None:
        """One update of the heads by the accumulated gradients."""
        self._optimizer.step()


def _noised_data(draws: MemberDraws, iteration: int, sigma: PerSample) -> NoisedBatch:
    x0 = draws.data(iteration)
    return NoisedBatch(
        x0=x0,
        sigma=sigma.float(),
        noise=draws.noise("gaussians/data/noise", iteration),
        text=no_caption(len(x0)),
        key=MicroBatchKey(iteration, 0, Purpose.GENERATE),
    )
