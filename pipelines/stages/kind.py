"""Properties of a run that decide the stages of its iterations, and the passes of each stage.

    recipe or objective -> IterationKind -> program (`algorithm`), passes (`costs`)

Run, planner and studies derive both from this record, so they mean the same iteration.
"""

from dataclasses import dataclass, field, replace
from typing import Self

from pipelines.config.recipe import DistillConfig
from sgmd_core.objectives import (
    ComparedStates,
    GradientPath,
    Objective,
    adversary_of,
    compared_by,
)
from sgmd_core.objectives.consistency import consistency_of, learns_from_samples
from sgmd_core.objectives.meanflow import flow_is_guided, flow_of
from sgmd_core.types import Looks


@dataclass(frozen=True, slots=True)
class IterationKind:
    """Kind of an iteration.

    Attributes:
        fresh_updates: Updates of the fake score, each on new samples of the updated generator; 0
            tracks the samples that the generator learns from, in the same forward pass.
        path: Ways by which the generator's loss depends on its samples.
        looks: Score queries beside the one at the generator's samples.
        compared: States that a discriminator compares; None without one.
        compared_states: States of a sample that it looks at: 2, and one more for a penalty.
        consistency: The generator also learns from noised data.
        flow: The generator learns the strides of its flow head from noised data.
        guided_flow: It does so along guided velocities, which takes one more pass.
        matching: The generator learns from its own samples.
        diversity: The generator also learns where the teacher goes from its initial noise.
        joint: One backward pass of the fake score makes both gradients: `fake_score.walk`.
        mixes_weights: With fresh updates, the fake score first takes in the generator's weights.
    """

    fresh_updates: int = 0
    path: GradientPath = GradientPath.FAKE_SCORE
    looks: Looks = field(default_factory=Looks)
    compared: ComparedStates | None = None
    compared_states: int = 2
    consistency: bool = False
    flow: bool = False
    guided_flow: bool = False
    matching: bool = True
    diversity: bool = False
    joint: bool = False
    mixes_weights: bool = False

    @classmethod
    def of_objective(cls, objective: Objective, fresh_updates: int) -> Self:
        """Kind of the iterations of an objective, without the options beside it.

        Args:
            objective: The objective.
            fresh_updates: See `IterationKind`.
        """
        adversary = adversary_of(objective)
        return cls(
            fresh_updates,
            objective.path,
            compared=compared_by(objective),
            compared_states=2 if adversary is None else adversary.num_states,
            consistency=consistency_of(objective) is not None,
            flow=flow_of(objective) is not None,
            guided_flow=flow_is_guided(objective),
            matching=learns_from_samples(objective),
        )

    @classmethod
    def of(cls, config: DistillConfig) -> Self:
        """Kind of the iterations of a run."""
        return replace(
            cls.of_objective(config.objective, config.fresh_updates),
            looks=config.looks,
            diversity=config.generator.diversity.enabled,
            joint=config.fake_score.walk == "joint",
            mixes_weights=config.fake_score.ida_decay < 1,
        )

    @property
    def shared(self) -> bool:
        """True if the fake score tracks the samples that the generator learns from."""
        return self.fresh_updates == 0

    @property
    def tracking_updates(self) -> int:
        """Times that an iteration tracks samples."""
        return max(1, self.fresh_updates)

    @property
    def through_teacher(self) -> bool:
        """True if each signal also passes through the teacher on its way back."""
        return self.path is GradientPath.BOTH_SCORES


ALGORITHM_1 = IterationKind()
"""Iteration of the SGMD paper's Algorithm 1."""
