"""The methods that a recipe can choose from: the section `objective:` and what goes with each.

    objective: {method: dmd2}      the other settings of the section are that method's own

A method is one file in `sgmd_core/objectives/` and a place in `METHODS`. A method from another
package comes in by the entry point group `sgmd.objectives`, whose values are objective classes:

    [project.entry-points."sgmd.objectives"]
    pseudo_huber = "my_package.pseudo_huber:PseudoHuberObjective"

One that cannot be used costs a warning, and is an error where a recipe names it.

The recipe's section, the table of docs/methods.md, the leading losses of progress and report, and
the tests that run over all methods are made from `METHODS`.
"""

import functools
import inspect
import operator
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Tag, TypeAdapter

from sgmd_core.extensions import Extension, load_extensions
from sgmd_core.objectives import GradientPath, Objective
from sgmd_core.objectives.adm import AdmObjective
from sgmd_core.objectives.cdm import CdmObjective
from sgmd_core.objectives.consistency import learns_from_samples
from sgmd_core.objectives.dmd import DmdObjective
from sgmd_core.objectives.dmd2 import Dmd2Objective
from sgmd_core.objectives.pdmd import PdmdObjective
from sgmd_core.objectives.phased import PhasedObjective
from sgmd_core.objectives.rcm import RcmObjective
from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.objectives.sid import SidObjective
from sgmd_core.objectives.tmd import TmdObjective
from sgmd_core.objectives.tsg_fisher import TsgFisherObjective
from sgmd_core.objectives.tsg_sim import TsgSimObjective
from workers.settings import FakeScoreSettings

ENTRY_POINTS = "sgmd.objectives"

_OWN: tuple[type[Objective], ...] = (
    SgmdObjective,
    TsgFisherObjective,
    TsgSimObjective,
    DmdObjective,
    Dmd2Objective,
    PdmdObjective,
    CdmObjective,
    PhasedObjective,
    SidObjective,
    AdmObjective,
    RcmObjective,
    TmdObjective,
)
_REQUIRED = ("path", "about", "gradient", "leading_losses", "fake_updates", "method")
_LOSSES = {"generator_loss": 3, "tracking_loss": 2}
"""Numbers of arguments that the losses are called with, beside self."""
_THROUGH = {
    GradientPath.SAMPLE: "nothing: directly",
    GradientPath.FAKE_SCORE: "fake score",
    GradientPath.BOTH_SCORES: "fake score and teacher",
}


def method_name(objective: type[Objective]) -> str:
    """Name of a method in recipes: the default of its field `method`."""
    return str(objective.__dataclass_fields__["method"].default)  # pyright: ignore


def load_method(point: EntryPoint, others: Sequence[type[Objective]] = _OWN) -> type[Objective]:
    """Loads an objective of another package.

    Args:
        point: Its entry point.
        others: Methods whose names are taken.

    Raises:
        ConfigError: It cannot be imported, is not a dataclass with what `Objective` asks for, has
            a loss that takes other arguments, has a field that no recipe can hold, or takes the
            name of a method that there is.
    """
    extension = Extension("method", point)
    objective = extension.load("an objective class")
    fields = getattr(objective, "__dataclass_fields__", {})
    missing = [name for name in _REQUIRED if name not in fields and not hasattr(objective, name)]
    if missing or "method" not in fields:
        raise extension.refusal(
            f"{objective!r} without {', '.join(missing) or 'a field method'}",
            "a frozen dataclass as in sgmd_core/objectives/sgmd.py",
        )
    if not isinstance(fields["method"].default, str):
        found = "a field method without its name as default"
        raise extension.refusal(found, 'for example method: Literal["own"] = "own"')
    if method_name(objective) in {method_name(other) for other in others}:
        raise extension.refusal(f"a second {method_name(objective)}", "a name of its own")
    for name, count in _LOSSES.items():
        if (found := _uncallable(objective, name, count)) is not None:
            raise extension.refusal(found, f"{name} as in sgmd.Objective")
    try:
        TypeAdapter(objective).rebuild(raise_errors=True)
    except Exception as error:
        found = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise extension.refusal(found, "fields that a recipe can hold") from error
    return objective


def _uncallable(objective: type[Objective], name: str, count: int) -> str | None:
    """Returns words on a loss that does not take as many arguments as it is called with."""
    function = getattr(objective, name, None)
    if not callable(function):
        return f"{objective.__name__} without {name}"
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a function that C has written; its call will tell
        return None
    try:
        signature.bind(objective, *range(count))
    except TypeError:
        return f"{objective.__name__}.{name}{signature}"
    return None


_FROM_OUTSIDE = load_extensions(ENTRY_POINTS, "an objective", load_method, _OWN)

METHODS: tuple[type[Objective], ...] = (*_OWN, *_FROM_OUTSIDE.usable.values())
"""Every method, ours first."""


def unknown_method(name: str) -> str:
    """Words on a method that a recipe names and there is not.

    Args:
        name: The method, as the recipe has it.

    Returns:
        A clause that follows the name: the error of the package that has it, or the methods.
    """
    error = _FROM_OUTSIDE.faulty.get(name)
    if error is not None:
        return f"which its package cannot provide. {error}"
    known = ", ".join(repr(method_name(method)) for method in METHODS)
    return f"expected one of {known}{_FROM_OUTSIDE.words()}"


def _method(section: Any) -> str | None:  # noqa: ANN401  (whatever a recipe holds)
    """Returns the objective that a section configures; recipes that name none are SGMD's."""
    if isinstance(section, Mapping):
        return str(section.get("method", "sgmd"))
    return getattr(section, "method", None)


if TYPE_CHECKING:
    ObjectiveSettings = SgmdObjective | TsgFisherObjective | TsgSimObjective | DmdObjective
else:
    _TAGGED = [Annotated[method, Tag(method_name(method))] for method in METHODS]
    ObjectiveSettings = Annotated[functools.reduce(operator.or_, _TAGGED), Discriminator(_method)]
    """The section `objective:`; its `method` says which of these it is."""


def leading_losses() -> tuple[str, ...]:
    """Loss terms that come first in progress and report, of all methods."""
    terms = dict.fromkeys(name for method in METHODS for name in method.leading_losses)
    # The diversity loss is an option beside every method.
    return (*terms, "diversity")


def methods_table() -> str:
    """The table of docs/methods.md."""
    rows = [
        f"| `{method_name(method)}` | {method.about} | {method.gradient} | {_THROUGH[method.path]} "
        f"| {method.__dataclass_fields__['fake_updates'].default} |"  # pyright: ignore
        for method in METHODS
    ]
    heads = "| method | | gradient at `x0` | through the input of | fake-score updates |"
    return "\n".join([heads, "|---|---|---|---|---|", *rows])


def method_contradictions(objective: ObjectiveSettings, fake_score: FakeScoreSettings) -> list[str]:
    """Returns what a method cannot do with a fake score of these settings, as sentences."""
    problems: list[str] = []
    if objective.fake_updates > 1 and fake_score.tracking == "shared":
        problems.append(
            f"objective.fake_updates is {objective.fake_updates} ({objective.method}), but shared "
            "tracking has one graph for one update; set fake_score.tracking=fresh"
        )
    if not learns_from_samples(objective) and fake_score.tracking == "shared":
        problems.append(
            f"this {objective.method} learns from data alone and makes no samples for shared "
            "tracking to learn from; set fake_score.tracking=fresh"
        )
    in_turns = isinstance(objective, PhasedObjective) and objective.order == "alternate"
    if in_turns and fake_score.tracking == "shared":
        problems.append(
            "objective.order alternate tracks the low phase at other score levels than it matches, "
            "and shared tracking has one query for both; set fake_score.tracking=fresh"
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
