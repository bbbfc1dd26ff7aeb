"""Results of a cell, as its file holds them.

All variants saw the same draws and the same truth, so they are compared seed by seed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from pipelines.study.gaussians.measuring import ENERGY


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """All seeds of a cell at one place.

    Attributes:
        iteration: Updates of the generators.
        forwards: Passes until then.
        figures: By name, one value a seed; NaN for a seed that is not finite any more.
    """

    iteration: int
    forwards: float
    figures: Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class CellResult:
    """One variant in one world.

    Attributes:
        world: Name of the world.
        variant: Name of the variant.
        rates: Learning rates of generator and fake score that the search found.
        search: Mean energy distance by `generator rate/fake rate`; infinite where a seed broke.
        points: Measured points, the end last.
        seconds: Of the comparison's training and measuring.
        samples: Some samples of the first seed at the end, where they have two dimensions.
    """

    world: str
    variant: str
    rates: tuple[float, float]
    search: Mapping[str, float]
    points: tuple[MeasuredPoint, ...]
    seconds: float
    samples: Sequence[Sequence[float]] = field(default_factory=list)

    @property
    def end(self) -> MeasuredPoint:
        """Point measured at the end of the budget."""
        return self.points[-1]

    @property
    def num_broken(self) -> int:
        """Seeds whose samples are not finite at the end."""
        return sum(not math.isfinite(value) for value in self.end.figures[ENERGY])

    def to_json(self) -> dict[str, Any]:
        """As its file holds it; what is not finite is null."""
        return _without_infinities(asdict(self))

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """Reads what `to_json` made."""
        points = tuple(
            MeasuredPoint(
                point["iteration"],
                point["forwards"],
                {name: _numbers(values) for name, values in point["figures"].items()},
            )
            for point in stored["points"]
        )
        search = {
            name: math.inf if value is None else value for name, value in stored["search"].items()
        }
        rates = tuple(stored["rates"])
        return cls(**{**stored, "points": points, "search": search, "rates": rates})


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _without_infinities(value: Any) -> Any:  # noqa: ANN401 - any JSON
    if isinstance(value, Mapping):
        return {name: _without_infinities(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
