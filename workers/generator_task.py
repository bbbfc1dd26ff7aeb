"""Task of the generator: the parts of a method that it computes beside the rollout itself."""

from dataclasses import dataclass, field

from sgmd_core.objectives.consistency import ConsistencyTerm
from sgmd_core.objectives.meanflow import MeanFlowTerm
from sgmd_core.phases import Phases
from sgmd_core.types import Looks


@dataclass(frozen=True, slots=True)
class GeneratorTask:
    """Parts of a method that the generator computes; the defaults are those of Algorithm 1.

    Attributes:
        looks: Score queries beside the one at its samples.
        phases: Steps that each iteration trains; None: all of them in every one.
        consistency: Term on latents of the data; None without one.
        flow: Term on the strides of a flow head; None without one.
        first_tracked: First step that rollouts for the fake score may leave at; None: as those for
            the generator.
    """

    looks: Looks = field(default_factory=Looks)
    phases: Phases | None = None
    consistency: ConsistencyTerm | None = None
    flow: MeanFlowTerm | None = None
    first_tracked: int | None = None
