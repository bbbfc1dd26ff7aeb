"""Runs of a study in closed-form worlds, and what each costs.

world x variant  ->  iterations of the budget  ->  search of rates  ->  seeds of the comparison
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from pipelines.config.gaussian_study import (
    INNER_STEPS,
    GaussianStudyConfig,
    GaussianVariant,
    MixtureSettings,
)
from pipelines.config.roles import GENERATOR
from pipelines.stages.algorithm import SAMPLE, TRACK
from pipelines.stages.costs import PassCosts, mean_rollout, stage_passes
from pipelines.stages.kind import IterationKind
from pipelines.study.gaussians.distilling import Member
from sgmd_core.errors import ConfigError
from sgmd_core.objectives import phases_of, restarts_of
from sgmd_core.objectives.meanflow import FlowObjective
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.types import Purpose

COSTS = PassCosts(to_input=1.0, to_weights=2.0)
"""Of backward passes, in forward passes: the networks have no attention."""
_SEARCH_SEED = 1_000_000


@dataclass(frozen=True, slots=True)
class StudyCell:
    """One variant in one world.

    Attributes:
        world: Name of the world.
        variant: Name of the variant.
    """

    world: str
    variant: str

    @property
    def name(self) -> str:
        """Name of its file and in messages."""
        return f"{self.world}.{self.variant}"


def cells(config: GaussianStudyConfig) -> Iterator[StudyCell]:
    """Every variant in every world that it is for, world by world."""
    for world in config.worlds:
        for variant in config.variants:
            if world in config.worlds_of(variant):
                yield StudyCell(world, variant)


def units_per_iteration(
    schedule: FlowMatchSchedule,
    world: MixtureSettings,
    variant: GaussianVariant,
    iterations: int = 1,
) -> float:
    """Passes of a mean iteration, in forward passes over a batch.

    Args:
        schedule: The study's.
        world: The world.
        variant: The method.
        iterations: The first ones that the mean is over, for a method with phases.
    """
    objective, is_fresh = variant.objective, variant.tracking == "fresh"
    phases = phases_of(objective, schedule, world.num_steps)
    rollout = sample = mean_rollout(world.num_steps)
    if phases is not None:
        rollout, sample = (
            phases.mean_length(purpose, iterations) for purpose in (Purpose.GENERATE, Purpose.TRACK)
        )
    kind = IterationKind.of_objective(objective, objective.fake_updates if is_fresh else 0)
    table = stage_passes(kind, rollout=rollout, sample=sample, guided=False)
    # The whole of a flow head goes all inner steps in a pass.
    inner = INNER_STEPS if isinstance(objective, FlowObjective) else 1
    head = PassCosts(inner * COSTS.to_input, inner * COSTS.to_weights, inner * COSTS.forward)
    return sum(
        (passes.times(kind.tracking_updates) if stage in (SAMPLE, TRACK) else passes).units(
            head if stage.role == GENERATOR else COSTS
        )
        for stage, passes in table.items()
    )


def num_iterations(config: GaussianStudyConfig, cell: StudyCell) -> int:
    """Iterations that a cell's budget pays for.

    Raises:
        ConfigError: It does not pay for as many as there are measurements, or ends before the last
            phase.
    """
    world, variant = config.worlds[cell.world], config.variants[cell.variant]
    units = units_per_iteration(config.schedule, world, variant)
    found = int(world.forwards / units)
    for last in restarts_of(variant.objective):
        # Passes of the iterations before are counted by the mean over them.
        whole = partial(units_per_iteration, config.schedule, world, variant)
        after = (last + 1) * whole(last + 1) - last * whole(last)
        found = int(last + (world.forwards - last * whole(last)) / after)
        if found <= last:
            raise ConfigError(
                f"giving {cell.name} its budget",
                f"worlds.{cell.world}.forwards is {world.forwards:g}, which does not pay for the "
                f"{last} iterations of the first phase",
                "a budget that reaches the second phase",
                f"Raise it, or lower variants.{cell.variant}.objective.high_iterations",
            )
    if found < config.measurements:
        raise ConfigError(
            f"giving {cell.name} its budget",
            f"worlds.{cell.world}.forwards is {world.forwards:g}, which pays for {found} "
            f"iterations of {units:g}",
            f"at least {config.measurements}, one a measurement",
            "Raise it",
        )
    return found


def search_members(config: GaussianStudyConfig) -> list[Member]:
    """Every pair of rates with every seed of the search."""
    search = config.search
    return [
        Member(_SEARCH_SEED + seed, generator_rate, fake_rate)
        for generator_rate in search.generator_rates
        for fake_rate in search.fake_rates
        for seed in range(search.num_seeds)
    ]


def compared_members(
    config: GaussianStudyConfig, generator_rate: float, fake_rate: float
) -> list[Member]:
    """The seeds of the comparison, with the rates that were found."""
    return [Member(seed, generator_rate, fake_rate) for seed in range(config.num_seeds)]
