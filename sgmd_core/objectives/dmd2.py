"""DMD2: the losses of DMD, a fake score that moves faster, and a GAN term where it is asked for.

    one update of the generator, then `fake_updates` updates of the fake score, each on new samples

The fake score sees the generator's present samples often enough to follow it, which replaces DMD's
regression on pairs. Both losses are those of `dmd.py`.

    adversary   + weight * L(D((1 - sigma) x0 + sigma noise))     D refuses samples, accepts data

The GAN term needs latents of data, so it is off unless a recipe sets `adversary`: video recipes go
without it. Its discriminator is that of ADM, heads on the frozen teacher's features; the paper has
its heads on the fake score's.

Source: DMD2 (arXiv:2405.14867), two time scales; ratio 5 of the released SGMD trainer's video DMD.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from sgmd_core.objectives import ComparedStates
from sgmd_core.objectives.adversarial import AdversarialTerm
from sgmd_core.objectives.dmd import DmdObjective


@dataclass(frozen=True, slots=True)
class Dmd2Objective(DmdObjective):
    """DMD2 (`dmd2`): `DmdObjective` with five updates of the fake score, and a GAN term if set.

    The fields are the recipe keys below `objective:`. Source: DMD2 (arXiv:2405.14867).

    Attributes:
        adversary: The GAN term, which needs latents of data; null leaves it out.
    """

    compared: ClassVar[ComparedStates] = ComparedStates.DATA
    about: ClassVar[str] = "distribution matching with two time scales; its GAN term is an option"

    method: Literal["dmd2"] = "dmd2"  # pyright: ignore[reportIncompatibleVariableOverride]
    fake_updates: int = 5
    adversary: AdversarialTerm | None = None
