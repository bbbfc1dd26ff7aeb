"""TMD: a generator whose last layers are a flow head, first taught strides, then distributions.

    stage meanflow   the term of `meanflow` on latents of the data; nothing else moves the generator
    stage matching   the losses of `dmd2`, through every inner step of the head at the exit step

Both stages are settings of runs over a folder that `sgmd transition` has made: the second starts
from what the first one exports, or from the folder itself.

    x0 = x_t - sigma y     y the head's sample of the velocity at x_t

In the second stage x_t are states of the generator's own rollouts, and need no data. The paper has
noised data there and x0 = noise - y, whose noise does not belong to the sample y: with exact
samples it has the mean of the data and more than their spread, which the tests show.

The direction of matching is divided by n = mean |x0 - x0_teacher|, as in the same authors' code of
DMD2. The paper prints another divisor, mean |x0_fake - x0_teacher| (`normalizer: gap`): with it the
step is as long where both scores agree as anywhere, so it does not end there.

Source: TMD (arXiv:2601.09881), printed divisor: its appendix A.3.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from sgmd_core.errors import ConfigError
from sgmd_core.objectives.dmd import distribution_matching_loss, matching_direction
from sgmd_core.objectives.dmd2 import Dmd2Objective
from sgmd_core.objectives.meanflow import MeanFlowTerm
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.types import Latents, Loss, NoisedBatch


@dataclass(frozen=True, slots=True)
class TmdObjective(Dmd2Objective):
    """Transition matching distillation (`tmd`): a flow head samples the velocity of each step.

    Stage `meanflow` teaches the head strides on latents of data, stage `matching` matches
    distributions as DMD2 does. The fields are the recipe keys below `objective:`.
    Source: TMD (arXiv:2601.09881).

    Attributes:
        stage: `meanflow` or `matching`.
        meanflow: The term of the first stage.
        normalizer: What the direction of matching is divided by: the teacher's `residual` of the
            sample, or the `gap` of the two scores itself, as printed in the paper.
    """

    about: ClassVar[str] = "steps whose velocity a flow head samples: MeanFlow, then matching"
    gradient: ClassVar[str] = "gap / n; before, by MeanFlow on data, to the weights"
    leading_losses: ClassVar[tuple[str, ...]] = (
        "meanflow",
        "distribution_matching",
        "residual_contraction",
    )

    method: Literal["tmd"] = "tmd"  # pyright: ignore[reportIncompatibleVariableOverride]
    stage: Literal["meanflow", "matching"] = "matching"
    meanflow: MeanFlowTerm = field(default_factory=MeanFlowTerm)
    normalizer: Literal["residual", "gap"] = "residual"

    def __post_init__(self) -> None:
        # Not `super()`: a dataclass with slots is a second class of the same name.
        Dmd2Objective.__post_init__(self)
        if self.stage not in ("meanflow", "matching"):
            raise ConfigError(
                "reading the objective", f"stage is {self.stage!r}", "'meanflow' or 'matching'"
            )
        if self.normalizer not in ("residual", "gap"):
            raise ConfigError(
                "reading the objective", f"normalizer is {self.normalizer!r}", "'residual' or 'gap'"
            )
        if self.stage == "meanflow" and self.adversary is not None:
            raise ConfigError(
                "reading the objective",
                "an adversary in stage meanflow, which makes no samples to judge",
                "an adversary in stage matching alone",
            )

    @property
    def flow(self) -> MeanFlowTerm | None:
        """The term on latents of the data; None in stage matching."""
        return self.meanflow if self.stage == "meanflow" else None

    @property
    def matches(self) -> bool:
        """True if the generator also learns from its own samples."""
        return self.stage == "matching"

    def cautions(self, schedule: FlowMatchSchedule) -> Iterator[str]:
        """A sentence where the score levels are those of samples that collapsed."""
        shift = schedule.shift if schedule.score_shift is None else schedule.score_shift
        if self.matches and shift <= 1:
            yield (
                f"schedule.score_shift {shift:g} looks at all noise levels alike: in the paper of "
                "tmd samples then collapse to one composition, which its quality score does not "
                "show; the paper has 5. Watch diversity_ratio"
            )

    def generator_loss(
        self, query: NoisedBatch, velocity_fake: Latents, velocity_teacher: Latents
    ) -> Loss:
        """Loss of the generator on its own samples: DMD's, by the chosen divisor."""
        direction = matching_direction(
            query,
            velocity_fake,
            velocity_teacher,
            normalizer_min=self.normalizer_min,
            by_own_length=self.normalizer == "gap",
        )
        return distribution_matching_loss(query, direction)
