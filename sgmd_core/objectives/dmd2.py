"""DMD2 without its GAN term: the losses of DMD, and a fake score that moves faster.

    one update of the generator, then `fake_updates` updates of the fake score, each on new samples

The fake score sees the generator's present samples often enough to follow it, which replaces DMD's
regression on pairs. Both losses are those of `dmd.py`. The GAN term needs real videos and is left
out, as video recipes do.

Source: DMD2 (arXiv:2405.14867), two time scales; ratio 5 of the released SGMD trainer's video DMD.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from sgmd_core.objectives.dmd import DmdObjective


@dataclass(frozen=True, slots=True)
class Dmd2Objective(DmdObjective):
    """The losses of `DmdObjective` with more fake-score updates. Also a section `objective:`."""

    about: ClassVar[str] = "distribution matching with two time scales, without its GAN term"

    method: Literal["dmd2"] = "dmd2"  # pyright: ignore[reportIncompatibleVariableOverride]
    fake_updates: int = 5
