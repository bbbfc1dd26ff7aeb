"""Constants of a run's iterations: program, processes, parts."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.schedule.program import Pass, Program, Team, split_evenly
from cluster.schedule.schedule import Call, order_calls
from cluster.worker_group import Future
from pipelines.config.recipe import DistillConfig
from pipelines.planning.stage_work import stage_units
from pipelines.planning.workload import Workload
from pipelines.stages.algorithm import iteration_program
from pipelines.stages.kind import IterationKind
from sgmd_core.errors import ConfigError
from sgmd_core.types import MicroBatchKey, Purpose, Text


@dataclass(frozen=True, slots=True)
class IterationPlan:
    """Constants of all iterations.

    Attributes:
        program: Passes and updates of the objective.
        teams: Processes by role.
        batch_size: Samples of one update.
        micro_batches: Parts that the batch is split into.
        depth: Micro-batches whose graphs the generator may hold at once.
        max_staleness_iterations: 1 lets an iteration begin before the fake score's update of the
            one before has ended.
        timeout_s: How long a group of calls may take before the run is given up.
        negative: Embedding of the negative prompt, on its way to the teacher.
        exit_draws: Draws of the exit step in one batch; None draws one per micro-batch.
        stage_seconds: Of one sample by role and stage, in any unit: see `order_calls`.
        incarnation: Repairs of the run so far; calls of an earlier one are refused.
        generator_rate: Multiple of the generator's learning rate, by the lag's governor.
    """

    program: Program
    teams: Mapping[str, Team]
    batch_size: int
    micro_batches: int
    depth: int
    max_staleness_iterations: int
    timeout_s: float
    negative: Future[Text]
    exit_draws: int | None = None
    stage_seconds: Mapping[tuple[str, str], float] = field(default_factory=dict)
    incarnation: int = 0
    generator_rate: float = 1.0

    @property
    def tracking_passes(self) -> int:
        """Updates of the fake score on samples of their own; 0 with shared tracking."""
        return sum(isinstance(part, Pass) for part in self.program) - 1

    @property
    def fresh_tracking(self) -> bool:
        """True if the fake score is tracked on samples of its own."""
        return self.tracking_passes > 0

    @property
    def batches_per_iteration(self) -> int:
        """Caption batches that one iteration takes from the stream."""
        return 1 + self.tracking_passes

    @property
    def micro_batch_sizes(self) -> tuple[int, ...]:
        """Samples of each micro-batch, as equal as they divide.

        The samples of one draw of the exit step are split among its own micro-batches, so that they
        do not depend on the number of micro-batches.
        """
        draws = self.exit_draws or self.micro_batches
        parts = self.micro_batches // draws
        return tuple(
            size
            for group in split_evenly(self.batch_size, draws)
            for size in split_evenly(group, parts)
        )

    def rows(self, micro_batch: int) -> range:
        """Places of a micro-batch's samples in the batch."""
        sizes = self.micro_batch_sizes
        before = sum(sizes[:micro_batch])
        return range(before, before + sizes[micro_batch])

    def key(self, iteration: int, micro_batch: int, update: int) -> MicroBatchKey:
        """Names a micro-batch, and the draw of the exit step that it takes.

        Args:
            iteration: Generator updates made before.
            micro_batch: Index within its batch.
            update: 0 for the batch that the generator learns from, else the tracking update.
        """
        # Those of the tracking updates are counted on, so that each has draws of its own.
        before = max(0, update - 1)
        draws = self.exit_draws or self.micro_batches
        exit_draw = before * draws + micro_batch * draws // self.micro_batches
        index = before * self.micro_batches + micro_batch
        return MicroBatchKey(
            iteration,
            index,
            Purpose.TRACK if update else Purpose.GENERATE,
            self.incarnation,
            exit_draw=None if draws == self.micro_batches else exit_draw,
        )

    def calls(self, first: int, num_iterations: int = 1) -> list[Call]:
        """The calls of some iterations, in order; the last one ends with all updates made."""
        return order_calls(
            self.program,
            self.teams,
            self.micro_batches,
            self.depth,
            samples_per_micro_batch=self.micro_batch_sizes,
            iterations=range(first, first + num_iterations),
            max_staleness=self.max_staleness_iterations,
            stage_seconds=self.stage_seconds,
        )


def plan_iteration(config: DistillConfig, negative: Future[Text]) -> IterationPlan:
    """Derives the constants of all iterations from a run's settings."""
    return IterationPlan(
        program=iteration_program(IterationKind.of(config)),
        teams=config.teams,
        batch_size=config.batch.size,
        micro_batches=config.batch.micro_batches,
        depth=config.topology.depth,
        max_staleness_iterations=config.topology.max_staleness_iterations,
        timeout_s=config.topology.call_timeout_s,
        negative=negative,
        exit_draws=config.batch.exit_draws,
        stage_seconds=stage_seconds(config) if config.topology.shares_pools else {},
    )


def stage_seconds(config: DistillConfig) -> Mapping[tuple[str, str], float]:
    """Seconds by which calls are dealt: those of the recipe, or counted network passes.

    Raises:
        ConfigError: The recipe names a stage that its iterations do not have, or not all of them.
    """
    counted = stage_units(Workload.of(config))
    given = config.topology.stage_seconds
    if not given:
        return counted
    names = {".".join(name): name for name in counted}
    if set(given) != set(names):
        unknown, missing = sorted({*given} - {*names}), sorted({*names} - {*given})
        raise ConfigError(
            "reading topology.stage_seconds",
            "; ".join(
                f"{what} {', '.join(stages)}"
                for what, stages in (("no stage called", unknown), ("nothing for", missing))
                if stages
            ),
            f"seconds of {', '.join(names)}",
            "`sgmd plan --measured ... --write` writes them; {} counts network passes",
        )
    return {names[name]: seconds for name, seconds in given.items()}
