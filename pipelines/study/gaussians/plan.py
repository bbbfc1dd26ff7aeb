"""Runs of a study in closed-form worlds, and what each costs.

world x variant  ->  iterations of the budget  ->  search of rates  ->  seeds of the comparison
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.config.gaussian_study import GaussianStudyConfig, GaussianVariant, MixtureSettings
from pipelines.stages.algorithm import SAMPLE, TRACK
from pipelines.stages.costs import PassCosts, mean_rollout, stage_passes
from pipelines.study.gaussians.distilling import Member
from sgmd_core.errors import ConfigError

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
    """All cells, world by world."""
    for world in config.worlds:
        for variant in config.variants:
            yield StudyCell(world, variant)


def units_per_iteration(world: MixtureSettings, variant: GaussianVariant) -> float:
    """Passes of a mean iteration, in forward passes over a batch."""
    is_fresh = variant.tracking == "fresh"
    rollout = mean_rollout(world.num_steps)
    table = stage_passes(
        path=variant.objective.path,
        rollout=rollout,
        sample=rollout,
        guided=False,
        fresh_tracking=is_fresh,
    )
    updates = variant.objective.fake_updates if is_fresh else 1
    return sum(
        (passes.times(updates) if stage in (SAMPLE, TRACK) else passes).units(COSTS)
        for stage, passes in table.items()
    )


def num_iterations(config: GaussianStudyConfig, cell: StudyCell) -> int:
    """Iterations that a cell's budget pays for.

    Raises:
        ConfigError: It does not pay for as many as there are measurements.
    """
    world, variant = config.worlds[cell.world], config.variants[cell.variant]
    units = units_per_iteration(world, variant)
    found = int(world.forwards / units)
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
