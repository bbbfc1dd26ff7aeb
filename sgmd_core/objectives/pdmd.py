"""Projected distribution matching: the direction without its part along the fake residual.

    d    = x0_fake - x0_teacher                 DMD's gap
    r    = x0_fake - x0                         the fake score's residual at this very query
    d'   = d - <d, r> / <r, r> * r              a sample at a time, over all of its elements
    q    = sg[ d' / mean |x0 - x0_teacher| ]    DMD's denominator, that of d
    L_G  = 0.5 * mean (x0 - sg[x0 - q])^2

    fake score  as DMD's, one update an iteration

The noise in it apart, r is the fake score's error where it is asked, so the part of d along r is
the one that an inaccurate fake score makes up. In velocities the noise level cancels: d is along
velocity_teacher - velocity_fake and r along (noise - x0) - velocity_fake.

With an exact fake score r is noise, and the projection takes one dimension of as many as a sample
has elements: half of the step in two dimensions, 0.4 % in 256, nothing in a video. So in a small
world PDMD is also a DMD with shorter steps, and `removed: random`, which takes out a direction that
has nothing to do with r, tells the two apart.

Source: PDMD (arXiv:2609.35768), update ratio 1:1.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from sgmd_core.errors import ConfigError
from sgmd_core.objectives.dmd import DmdObjective, distribution_matching_loss, matching_direction
from sgmd_core.seeds import derived_noise
from sgmd_core.types import Latents, Loss, NoisedBatch, float32

Removed = Literal["residual", "random"]


def query_residual(query: NoisedBatch, velocity_fake: Latents) -> Latents:
    """Fake score's residual in velocities: (noise - x0) - velocity_fake = (x0_fake - x0) / sigma.

    Args:
        query: Where the fake score looked.
        velocity_fake: Its prediction.

    Returns:
        The residual in float32 or wider, without a graph.
    """
    return query.chord.detach() - float32(velocity_fake).detach()


def random_direction(query: NoisedBatch) -> Latents:
    """Standard normal numbers that depend on a query and have nothing to do with its residual.

    Each sample's are drawn from a hash of its score noise, so they do not depend on how a batch is
    split, where it is computed or what was drawn before.

    Args:
        query: A query; its noise names the draw of each sample.
    """
    return derived_noise(query.noise).to(query.x0)


@dataclass(frozen=True, slots=True)
class PdmdObjective(DmdObjective):
    """Projected distribution matching (`pdmd`): `DmdObjective` along a projected direction.

    The part of the gap along the fake score's residual is removed before the gap is divided. The
    fields are the recipe keys below `objective:`. Source: PDMD (arXiv:2609.35768).

    Attributes:
        removed: What is projected out: the fake score's `residual`, or a `random` direction, which
            is the control of a study.
    """

    about: ClassVar[str] = "distribution matching without the part along the fake score's residual"
    gradient: ClassVar[str] = "(gap without its part along residual) / n"

    method: Literal["pdmd"] = "pdmd"  # pyright: ignore[reportIncompatibleVariableOverride]
    removed: Removed = "residual"

    def __post_init__(self) -> None:
        # Not `super()`: a dataclass with slots is a second class of the same name.
        DmdObjective.__post_init__(self)
        if self.removed not in ("residual", "random"):
            raise ConfigError(
                "reading the objective", f"removed is {self.removed!r}", "'residual' or 'random'"
            )

    def generator_loss(
        self, query: NoisedBatch, velocity_fake: Latents, velocity_teacher: Latents
    ) -> Loss:
        """Loss of the generator: DMD's, along the projected direction."""
        removed = (
            query_residual(query, velocity_fake)
            if self.removed == "residual"
            else random_direction(query)
        )
        direction = matching_direction(
            query,
            velocity_fake,
            velocity_teacher,
            normalizer_min=self.normalizer_min,
            removed=removed,
        )
        return distribution_matching_loss(query, direction)
