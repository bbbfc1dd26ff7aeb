"""The methods that a recipe can choose from: the section `objective:` and what goes with each.

    objective: {method: dmd2}      the other settings of the section are that method's own

A new method is a file in `sgmd_core/objectives/` and a line here.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Tag

from sgmd_core.objectives.dmd import DmdObjective
from sgmd_core.objectives.dmd2 import Dmd2Objective
from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.objectives.sid import SidObjective
from sgmd_core.objectives.tsg_fisher import TsgFisherObjective
from sgmd_core.objectives.tsg_sim import TsgSimObjective
from workers.settings import FakeScoreSettings


def _method(section: Any) -> str | None:  # noqa: ANN401  (whatever a recipe holds)
    """Which objective a section is of; recipes that name none are SGMD's."""
    if isinstance(section, Mapping):
        return str(section.get("method", "sgmd"))
    return getattr(section, "method", None)


ObjectiveSettings = Annotated[
    Annotated[SgmdObjective, Tag("sgmd")]
    | Annotated[DmdObjective, Tag("dmd")]
    | Annotated[Dmd2Objective, Tag("dmd2")]
    | Annotated[TsgFisherObjective, Tag("tsg_fisher")]
    | Annotated[TsgSimObjective, Tag("tsg_sim")]
    | Annotated[SidObjective, Tag("sid")],
    Discriminator(_method),
]
"""The section `objective:`; its `method` says which of these it is."""


def method_contradictions(objective: ObjectiveSettings, fake_score: FakeScoreSettings) -> list[str]:
    """What a method cannot do with a fake score of these settings, as sentences."""
    problems: list[str] = []
    if objective.fake_updates > 1 and fake_score.tracking == "shared":
        problems.append(
            f"objective.fake_updates is {objective.fake_updates} ({objective.method}), but shared "
            "tracking has one graph for one update; set fake_score.tracking=fresh"
        )
    if fake_score.ida_decay < 1 and fake_score.tracking == "shared":
        problems.append(
            f"fake_score.ida_decay {fake_score.ida_decay} changes weights that shared tracking has "
            "a gradient of; set fake_score.tracking=fresh"
        )
    if fake_score.ida_decay < 1 and objective.method == "sgmd":
        problems.append(
            f"fake_score.ida_decay {fake_score.ida_decay} takes the residual away that SGMD's "
            "potentials work on; leave it at 1 for objective.method sgmd"
        )
    return problems
