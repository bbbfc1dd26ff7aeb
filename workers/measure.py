"""A measure of clips, and the clip that it is taken of; `measures` lists all measures."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from sgmd_core.metrics.distributions import ClipMotion
from sgmd_core.metrics.motion import dynamic_interval


@dataclass(frozen=True)
class ClipView:
    """One clip with what several measures need of it; optical flow is computed once.

    Attributes:
        clip: Pixels (1, 3, f, h, w) in [0, 1], float32 on the CPU.
        fps: Frames a second.
    """

    clip: Tensor
    fps: int

    @cached_property
    def flow(self) -> Tensor:
        """Optical flow between successive frames, pixels."""
        from workers.optical_flow import optical_flow

        return optical_flow(self.clip)

    @cached_property
    def thinned_flow(self) -> Tensor:
        """Optical flow at the frame rate of the dynamic rule.

        A clip that is too short to be thinned is taken as it is.
        """
        from workers.optical_flow import optical_flow

        interval = dynamic_interval(self.fps)
        if self.clip.shape[2] <= interval or interval == 1:
            return self.flow
        return optical_flow(self.clip[:, :, ::interval])


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure that a validation or an evaluation may give.

    Attributes:
        name: Key in validation.jsonl, evaluation.json, W&B and recipes.
        title: Name for readers.
        about: Meaning, one line.
        unit: Unit, empty for shares, ratios and dimensionless figures.
        known: Known answer that the tests hold it to.
        function: Value of each clip, (1,); None for figures of sets, pairs or captions.
        of_motion: Value of a set of clips of an embedded world beside the reference set.
        has_ratio: `NAME_ratio` is the ratio to the teacher's, on the same captions and noise.
        needs_shapes: Read from captions of the world `shapes` only.
        leads: Shown on progress lines; `ratio` shows the ratio in its place.
        ranks: May rank checkpoints and trials.
    """

    name: str
    title: str
    about: str
    unit: str = ""
    known: str = ""
    function: Callable[[ClipView], Tensor] | None = field(default=None, repr=False)
    of_motion: Callable[[ClipMotion, ClipMotion], float] | None = field(default=None, repr=False)
    has_ratio: bool = True
    needs_shapes: bool = False
    leads: bool | str = False
    ranks: bool = True
