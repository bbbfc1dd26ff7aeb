"""Network passes of each stage of an iteration: the one table behind planner and study.

    units(stage) = f forwards + i (to_input + tangents) + w to_weights    [f (forwards + backwards)]

A pass takes one sample once through the role's network; f, i and w are the costs of a forward pass
and of the two kinds of backward pass in forward passes of the teacher, `PassCosts`. A derivative in
forward mode makes the products of a pass to the input. With activation checkpointing (in brackets)
each forward pass with a graph is made again before its backward pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from pipelines.config.lag import LagSettings
from pipelines.config.recipe import DistillConfig
from pipelines.stages.algorithm import (
    ANCHOR,
    COMPARE_DATA,
    COMPARE_STEPS,
    COMPLETE,
    DENOISE,
    DENOISE_DATA,
    DIVERSIFY,
    EXTRA_TRACK,
    HELD_LOSS,
    LEARN,
    LEARN_CONSISTENCY,
    LEARN_FLOW,
    NOISE_DATA,
    PREDICT,
    PULLBACK,
    ROLLOUT,
    SAMPLE,
    SIGNAL,
    TRACK,
    StageSpec,
)
from pipelines.stages.kind import IterationKind
from sgmd_core.metrics.lag import settling_updates
from sgmd_core.objectives import ComparedStates, GradientPath
from sgmd_core.types import Purpose
from workers.models.shape import PassFlops


@dataclass(frozen=True, slots=True)
class PassCosts:
    """Operations of a network's passes over those of a forward pass of the teacher.

    Matrix products with weights cost a backward pass one product for the input and one for the
    weights; products of two activations, inside attention, cost two for the input and none for the
    weights. So a pass to the input costs 1 and attention's share of the forward pass: 1.70 at Wan
    1.3B, 480x832, 81 frames. A pass to the weights goes through the activations as well: about 2.
    A network of another size than the teacher's has other costs in proportion.

    Attributes:
        to_input: Of a backward pass that ends at the samples.
        to_weights: Of a backward pass that ends at the parameters.
        forward: Of a forward pass: 1 for networks of the teacher's size.
    """

    to_input: float
    to_weights: float
    forward: float = 1.0

    @classmethod
    def of(cls, flops: PassFlops, unit: int | None = None) -> Self:
        """Returns the costs of a network.

        Args:
            flops: Operations of its passes.
            unit: Operations of the forward pass that is counted as one; None: its own.
        """
        one = flops.forward if unit is None else unit
        return cls(flops.to_input / one, flops.to_parameters / one, flops.forward / one)


@dataclass(frozen=True, slots=True)
class Passes:
    """Passes of one stage.

    Attributes:
        forwards: Forward passes, with or without a graph.
        to_input: Backward passes that end at the samples.
        to_weights: Backward passes that end at the parameters.
        tangents: Derivatives that forward passes carry along.
        joint: Backward passes that make a pass to the samples and one to the parameters together.
    """

    forwards: float = 0.0
    to_input: float = 0.0
    to_weights: float = 0.0
    tangents: float = 0.0
    joint: float = 0.0

    @property
    def backwards(self) -> float:
        """Backward passes; checkpointing adds a forward pass to each."""
        return self.to_input + self.to_weights - self.joint

    def units(self, costs: PassCosts, *, checkpointed: float = 0.0) -> float:
        """Cost in forward passes of the network that costs are counted by.

        Args:
            costs: Of one pass of each kind.
            checkpointed: Part of a forward pass that is made again for each backward pass.
        """
        forwards = self.forwards + checkpointed * self.backwards
        along = costs.to_input * (self.to_input + self.tangents)
        return costs.forward * forwards + along + costs.to_weights * self.to_weights

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(
            self.forwards + other.forwards,
            self.to_input + other.to_input,
            self.to_weights + other.to_weights,
            self.tangents + other.tangents,
            self.joint + other.joint,
        )

    def times(self, count: float) -> "Passes":
        """These passes, `count` times."""
        counts = (self.forwards, self.to_input, self.to_weights, self.tangents, self.joint)
        return Passes(*(count * each for each in counts))


def mean_rollout(num_steps: float, *, first_exit: int = 0) -> float:
    """Mean forward passes of a rollout whose exit step is drawn uniformly.

    Args:
        num_steps: Steps of the generator, or their mean.
        first_exit: First step that may be drawn, counted from 0.
    """
    return (first_exit + 1 + num_steps) / 2


def mean_rollouts(config: DistillConfig) -> tuple[float, float]:
    """Mean forward passes of a rollout of a run: of the generator's batches, and of tracking's."""
    generator, phases = config.generator, config.phases
    if phases is not None:
        generate, track = (
            phases.mean_length(purpose, config.iterations, config.first_exit(purpose))
            for purpose in (Purpose.GENERATE, Purpose.TRACK)
        )
        return generate, track
    generate, track = (
        mean_rollout(generator.mean_steps, first_exit=config.first_exit(purpose))
        for purpose in (Purpose.GENERATE, Purpose.TRACK)
    )
    return generate, track


def stage_passes(
    kind: IterationKind, *, rollout: float, sample: float, guided: bool, anchor_steps: int = 0
) -> Mapping[StageSpec, Passes]:
    """Passes of one sample by stage, for one call of each.

    The heads of a discriminator are not counted: of a large network they are less than a hundredth
    of a pass. A flow head is asked three times, once with a graph, which is counted as one pass of
    all inner steps.

    Args:
        kind: Kind of the iteration.
        rollout: Forward passes of a rollout of the generator's batch.
        sample: Forward passes of a rollout of a tracking batch.
        guided: The teacher predicts with and without the caption.
        anchor_steps: Steps of the teacher for a diversity loss; 0 without one.
    """
    predictions = 2 if guided else 1
    # With shared tracking the forward pass is the signal's.
    track = Passes(forwards=int(not kind.shared), to_weights=1)
    found = {TRACK: track}
    if kind.matching:
        found = _matching_passes(kind, rollout, predictions, track)
    if kind.joint:
        found[SIGNAL] += replace(found[TRACK], joint=1)
        found[TRACK] = Passes()
    if kind.consistency:
        found[NOISE_DATA] = Passes()
        found[DENOISE_DATA] = Passes(forwards=predictions)
        found[LEARN_CONSISTENCY] = Passes(forwards=2, to_weights=1, tangents=1)
    if kind.flow:
        found[LEARN_FLOW] = Passes(forwards=1 + int(kind.guided_flow), to_weights=1)
    if not kind.shared:
        found[SAMPLE] = Passes(forwards=sample)
    if anchor_steps:
        found[ANCHOR] = Passes(forwards=predictions * anchor_steps)
        found[DIVERSIFY] = Passes(forwards=1, to_weights=1)
    return found


def _matching_passes(
    kind: IterationKind, rollout: float, predictions: int, track: Passes
) -> dict[StageSpec, Passes]:
    """Passes from a generator's samples to what it learns from them, and of tracking."""
    off, direct = int(kind.looks.off_trajectory), kind.path is GradientPath.SAMPLE
    found = {
        ROLLOUT: Passes(forwards=rollout + off),
        DENOISE: Passes(forwards=predictions + off + int(kind.looks.splits_guidance)),
        SIGNAL: Passes(forwards=1 + off, to_input=0 if direct else 1 + off),
        TRACK: track,
        LEARN: Passes(to_weights=1 + off),
    }
    comparing = Passes(forwards=kind.compared_states, to_input=1)
    if kind.compared is ComparedStates.STEPS:
        del found[SIGNAL]
        found |= {
            PREDICT: Passes(forwards=1),
            COMPARE_STEPS: comparing,
            COMPLETE: Passes(to_input=1),
        }
    elif kind.compared is ComparedStates.DATA:
        found[COMPARE_DATA] = comparing
    if kind.through_teacher:
        found[PULLBACK] = Passes(forwards=predictions, to_input=predictions)
    return found


def lag_passes(
    settings: LagSettings, held: float, extra: float, settling: float
) -> Mapping[StageSpec, Passes]:
    """Passes of one measurement of the lag, for each sample of a batch.

    Held batches are made again for the loss before and for that of each copy, the settled one
    included.

    Args:
        settings: Its batches and updates.
        held: Forward passes of a rollout of a held batch.
        extra: Of a rollout of an extra update.
        settling: Of a rollout of an update of the copy that settles.
    """
    copies, few = len(settings.rates), settling_updates(settings.updates)
    looks, updates = settings.batches * (2 + copies), settings.updates * copies
    return {
        SAMPLE: Passes(forwards=looks * held + updates * extra + few * settling),
        HELD_LOSS: Passes(forwards=looks),
        EXTRA_TRACK: Passes(forwards=1, to_weights=1).times(updates + few),
    }
