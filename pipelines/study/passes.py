"""How often an iteration runs its networks: counted from the settings, exactly, without running it.

    units(stage) = forwards + to_input + 2 to_weights         [+ backwards, where checkpointed]

A pass takes one sample, or one whole batch, once through a network of the teacher's size. Going
back to the input alone costs about as much as going forward; going back to the weights costs twice
that, since it goes through the activations as well. With activation checkpointing, generator and
fake score make each forward pass again before they go back.

Only the rollouts vary: one that leaves at step e takes e + 1 passes. Exit steps are drawn by
counter, so the passes of a run are known before it starts; on average a rollout of k steps takes
(k + 1) / 2.

Source of the costs: the usual estimate for transformers, a backward pass to the weights is two
forward passes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from pipelines.config.recipe import DistillConfig
from sgmd_core.objectives import GradientPath
from sgmd_core.seeds import exit_step
from sgmd_core.types import MicroBatchKey, Purpose

_NEVER_CHECKPOINTED = "teacher"


@dataclass(frozen=True, slots=True)
class Passes:
    """Passes of one stage, each over a whole batch.

    Attributes:
        forwards: Forward passes, with or without a graph.
        to_input: Backward passes that end at the samples.
        to_weights: Backward passes that end at the parameters.
    """

    forwards: float = 0.0
    to_input: float = 0.0
    to_weights: float = 0.0

    @property
    def units(self) -> float:
        """What they cost, in forward passes."""
        return self.forwards + self.to_input + 2 * self.to_weights

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(
            self.forwards + other.forwards,
            self.to_input + other.to_input,
            self.to_weights + other.to_weights,
        )

    def times(self, count: float) -> "Passes":
        """So many of them."""
        return Passes(count * self.forwards, count * self.to_input, count * self.to_weights)


PassTable = Mapping[str, Passes]
"""Passes by `role.stage`, as metrics.jsonl names stages."""


def expected_passes(config: DistillConfig) -> dict[str, Passes]:
    """Passes of one iteration, rollouts at their mean length."""
    mean = (_first_exit(config) + 1 + config.generator.num_steps) / 2
    return _passes(config, mean, mean)


def iteration_passes(config: DistillConfig, iteration: int) -> dict[str, Passes]:
    """Passes of one particular iteration: its exit steps are those that the run will draw."""
    parts, updates = config.batch.micro_batches, config.fresh_updates
    rollout = _rollout_length(config, iteration, Purpose.GENERATE, parts)
    sample = _rollout_length(config, iteration, Purpose.TRACK, updates * parts) if updates else 0.0
    return _passes(config, rollout, sample)


def run_passes(config: DistillConfig, num_iterations: int) -> dict[str, Passes]:
    """Passes of the first iterations of a run, all together."""
    total: dict[str, Passes] = {}
    for iteration in range(num_iterations):
        for stage, passes in iteration_passes(config, iteration).items():
            total[stage] = total.get(stage, Passes()) + passes
    return total


def total_units(table: PassTable, *, checkpointed: bool = False) -> float:
    """What all stages cost together, in forward passes.

    Args:
        table: The passes.
        checkpointed: Generator and fake score keep no activations and make them again.
    """
    units = sum(passes.units for passes in table.values())
    if not checkpointed:
        return units
    return units + sum(
        passes.to_input + passes.to_weights
        for stage, passes in table.items()
        if role_of(stage) != _NEVER_CHECKPOINTED
    )


def units_by_role(table: PassTable) -> dict[str, float]:
    """What each role's stages cost, in forward passes."""
    found: dict[str, float] = {}
    for stage, passes in table.items():
        found[role_of(stage)] = found.get(role_of(stage), 0.0) + passes.units
    return found


def role_of(stage: str) -> str:
    """The role of a `role.stage`."""
    return stage.partition(".")[0]


def _passes(config: DistillConfig, rollout: float, sample: float) -> dict[str, Passes]:
    """Passes of an iteration whose rollouts take so many passes each, on average."""
    path, updates = config.objective.path, config.fresh_updates
    guided = 1 if config.teacher.guidance_scale == 1 else 2
    through_fake = 0 if path is GradientPath.SAMPLE else 1
    found = {
        "generator.rollout": Passes(forwards=rollout),
        "teacher.denoise": Passes(forwards=guided),
        "fake_score.signal": Passes(forwards=1, to_input=through_fake),
        "generator.learn": Passes(to_weights=1),
        # With shared tracking the forward pass is the signal's.
        "fake_score.track": Passes(to_weights=1),
    }
    if path is GradientPath.BOTH_SCORES:
        found["teacher.pullback"] = Passes(forwards=guided, to_input=guided)
    if updates:
        found["generator.sample"] = Passes(forwards=sample).times(updates)
        found["fake_score.track"] = Passes(forwards=1, to_weights=1).times(updates)
    if config.generator.diversity.enabled:
        anchor = config.generator.diversity.anchor_step
        found["teacher.anchor"] = Passes(forwards=guided * anchor)
        found["generator.diversify"] = Passes(forwards=1, to_weights=1)
    return found


def _rollout_length(config: DistillConfig, iteration: int, purpose: Purpose, count: int) -> float:
    """Mean passes of an iteration's rollouts; its micro-batches are all of one size."""
    return 1 + fmean(
        exit_step(
            config.seed,
            MicroBatchKey(iteration, micro_batch, purpose),
            config.generator.num_steps,
            _first_exit(config),
        )
        for micro_batch in range(count)
    )


def _first_exit(config: DistillConfig) -> int:
    """The diversity loss has the first step to itself."""
    return int(config.generator.diversity.enabled)
