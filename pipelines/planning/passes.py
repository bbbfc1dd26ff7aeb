"""Passes of an iteration's networks: counted from the settings, exactly, without running it.

`pipelines.stages.costs` has the passes of one call of each stage; here they are counted for a
whole iteration. Only the rollouts vary: one that exits at step e takes e + 1 passes. Exit steps are
drawn by counter, so the passes of a run are known before it starts; on average a rollout of k steps
takes (k + 1) / 2. A measured lag (`lag.every`) is counted with the iteration that it is measured
before, and on average with a share of it. Costs of passes are those of the networks of the recipe's
roles at its clip's size, in forward passes of its teacher.
"""

from collections.abc import Mapping
from statistics import fmean

from cluster.schedule.program import split_evenly
from pipelines.config.recipe import DistillConfig
from pipelines.config.roles import TEACHER
from pipelines.planning.stage_work import role_costs
from pipelines.planning.workload import Workload
from pipelines.stages.algorithm import ANCHOR, DIVERSIFY, SAMPLE, TRACK, StageSpec
from pipelines.stages.costs import (
    PassCosts,
    Passes,
    lag_passes,
    mean_rollouts,
    stage_passes,
)
from pipelines.stages.kind import IterationKind
from sgmd_core.metrics.lag import settling_updates
from sgmd_core.seeds import exit_of, rollout_steps
from sgmd_core.types import MicroBatchKey, Purpose
from workers.models.shape import DenoiserShape

PassTable = Mapping[str, Passes]
"""Passes by `role.stage`, as metrics.jsonl names stages."""

RoleCosts = Mapping[str, PassCosts]
"""Costs of passes by role."""


def pass_costs(config: DistillConfig) -> dict[str, PassCosts]:
    """Costs of passes through the networks of the recipe's roles, in forwards of the teacher.

    Raises:
        ConfigError: The model folder has no configuration, or the clip does not fit it.
    """
    return role_costs(Workload.of(config))


def teacher_shape(config: DistillConfig) -> DenoiserShape:
    """The network whose forward pass is the unit.

    Raises:
        ConfigError: The model folder has no configuration, or the clip does not fit it.
    """
    return Workload.of(config).shape_of(TEACHER)


def expected_passes(config: DistillConfig) -> dict[str, Passes]:
    """Passes of one iteration, rollouts at their mean length."""
    found, every = _mean_passes(config), config.lag.every
    if every:
        measured = {name: part.times(1 / every) for name, part in expected_lag(config).items()}
        found = _added(found, measured)
    return found


def expected_lag(config: DistillConfig) -> dict[str, Passes]:
    """Passes of one measurement of the lag, rollouts at their mean length."""
    _, sample = mean_rollouts(config)
    return _named(lag_passes(config.lag, sample, sample, sample))


def lag_share(config: DistillConfig, costs: RoleCosts) -> float:
    """Cost of measuring the lag, over that of the iterations that it is measured among."""
    every = config.lag.every
    if not every:
        return 0.0
    checkpointed = bool(config.fake_score.compute.checkpointing)
    iteration = _mean_passes(config)
    measured, plain = (
        total_units(table, costs, checkpointed=checkpointed)
        for table in (expected_lag(config), iteration)
    )
    return measured / (every * plain)


def iteration_passes(config: DistillConfig, iteration: int) -> dict[str, Passes]:
    """Passes of one particular iteration: its exit steps are those that the run will draw."""
    parts, updates = config.batch.num_exit_draws, config.fresh_updates
    rollout = _rollout_length(config, iteration, Purpose.GENERATE, parts)
    sample = _rollout_length(config, iteration, Purpose.TRACK, updates * parts) if updates else 0.0
    phase = None if config.phases is None else config.phases.at(iteration)
    follows = 0.0 if phase is not None and phase.first_exit else 1.0
    found = _passes(config, rollout, sample, follows)
    return _added(found, _lag(config, iteration)) if config.lag.is_due(iteration) else found


def _lag(config: DistillConfig, iteration: int) -> dict[str, Passes]:
    """Passes of the measurement before an iteration: its exit steps are those of the run."""
    parts, lag = config.batch.num_exit_draws, config.lag
    after = lag.batches * parts
    held = _rollout_length(config, iteration, Purpose.LAG, after)
    extra, settling = (
        _rollout_length(config, iteration, Purpose.LAG, updates * parts, first=after)
        for updates in (lag.updates, settling_updates(lag.updates))
    )
    return _named(lag_passes(lag, held, extra, settling))


def run_passes(config: DistillConfig, num_iterations: int) -> dict[str, Passes]:
    """Passes of the first iterations of a run, all together."""
    total: dict[str, Passes] = {}
    for iteration in range(num_iterations):
        total = _added(total, iteration_passes(config, iteration))
    return total


def total_units(table: PassTable, costs: RoleCosts, *, checkpointed: bool = False) -> float:
    """Cost of all stages together, in forward passes of the teacher.

    Args:
        table: The passes.
        costs: Costs of each role's passes.
        checkpointed: Generator and fake score keep no activations and make them again.
    """
    return sum(
        passes.units(costs[role_of(stage)], checkpointed=checkpointed and role_of(stage) != TEACHER)
        for stage, passes in table.items()
    )


def units_by_role(table: PassTable, costs: RoleCosts) -> dict[str, float]:
    """Cost of each role's stages, in forward passes of the teacher."""
    found: dict[str, float] = {}
    for stage, passes in table.items():
        role = role_of(stage)
        found[role] = found.get(role, 0.0) + passes.units(costs[role])
    return found


def role_of(stage: str) -> str:
    """The role of a `role.stage`."""
    return stage.partition(".")[0]


def _mean_passes(config: DistillConfig) -> dict[str, Passes]:
    """Passes of an iteration without measurements, rollouts at their mean length."""
    phases = config.phases
    follows = 1.0 if phases is None else phases.high_share(config.iterations)
    return _passes(config, *mean_rollouts(config), follows)


def _passes(
    config: DistillConfig, rollout: float, sample: float, follows: float
) -> dict[str, Passes]:
    """Passes of an iteration.

    Args:
        config: The run's settings.
        rollout: Passes of a rollout of the generator's batch, on average.
        sample: Of a rollout of a tracking batch.
        follows: Share of such iterations in which a diversity loss has its part.
    """
    kind = IterationKind.of(config)
    table = stage_passes(
        kind,
        rollout=rollout,
        sample=sample,
        guided=config.teacher.guidance_scale != 1,
        anchor_steps=config.generator.diversity.num_anchor_steps,
    )
    updates = kind.tracking_updates
    times = {SAMPLE: updates, TRACK: updates, ANCHOR: follows, DIVERSIFY: follows}
    return _named({stage: passes.times(times.get(stage, 1)) for stage, passes in table.items()})


def _named(table: Mapping[StageSpec, Passes]) -> dict[str, Passes]:
    return {f"{stage.role}.{stage.name}": passes for stage, passes in table.items()}


def _added(one: PassTable, other: PassTable) -> dict[str, Passes]:
    stages = dict.fromkeys([*one, *other])
    return {name: one.get(name, Passes()) + other.get(name, Passes()) for name in stages}


def _rollout_length(
    config: DistillConfig, iteration: int, purpose: Purpose, count: int, first: int = 0
) -> float:
    """Mean passes of an iteration's rollouts, by the samples of each draw of an exit step."""
    samples = split_evenly(config.batch.size, config.batch.num_exit_draws)
    generator = config.generator
    exits: list[int] = []
    for draw in range(first, first + count):
        key, steps = MicroBatchKey(iteration, draw, purpose), generator.num_steps
        if generator.random_steps is not None:
            steps = rollout_steps(config.seed, key, generator.random_steps)
        phase = None if config.phases is None else config.phases.at(iteration)
        exits.append(exit_of(config.seed, key, steps, config.first_exit(purpose), phase))
    return 1 + fmean(exits, samples * (count // len(samples)))
