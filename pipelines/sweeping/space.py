"""Points of a space of settings: all of a grid, the corners, or one that is drawn.

    dimensions (a key may depend on others) -> {dotted key: value}, inactive keys left out

A draw asks for one value after the other, as Optuna's trials do, so random search and TPE share it.
"""

import math
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Protocol

from pipelines.config.sweep import Dimension

MAX_CORNERS = 256
"""Corners that are all checked; of larger spaces those that differ in one setting."""

PointSettings = dict[str, Any]


class Draw(Protocol):
    """Draws values by name: a trial of Optuna."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Draws a number of a range."""
        ...

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """Draws a whole number of a range, both ends included."""
        ...

    def suggest_categorical(self, name: str, choices: Any) -> Any:  # noqa: ANN401 - any YAML
        """Draws one of several values; the name is that of the dimension."""
        ...


def draw_point(dimensions: Mapping[str, Dimension], draw: Draw) -> PointSettings:
    """Draws one point.

    Args:
        dimensions: By dotted key, each after those that it depends on.
        draw: Source of the values.
    """
    point: PointSettings = {}
    for key, dimension in dimensions.items():
        if not dimension.applies(point):
            continue
        if dimension.choice is not None:
            # By its place: Optuna's categories cannot be lists or sections.
            place = draw.suggest_categorical(key, tuple(range(len(dimension.choice))))
            point[key] = dimension.choice[place]
        elif dimension.is_whole:
            low, high = (int(end) for end in dimension.ends)
            point[key] = draw.suggest_int(key, low, high, log=dimension.is_log)
        else:
            low, high = dimension.ends
            point[key] = draw.suggest_float(key, low, high, log=dimension.is_log)
    return point


def combinations(dimensions: Mapping[str, Dimension]) -> Iterator[PointSettings]:
    """Every combination of choices and ends; of a grid, every point."""
    keys = list(dimensions)

    def extend(point: PointSettings, index: int) -> Iterator[PointSettings]:
        if index == len(keys):
            yield point
            return
        dimension = dimensions[keys[index]]
        if not dimension.applies(point):
            yield from extend(point, index + 1)
            return
        for value in dimension.corners:
            yield from extend({**point, keys[index]: value}, index + 1)

    yield from extend({}, 0)


def num_combinations(dimensions: Mapping[str, Dimension], most: int = 10**6) -> int:
    """Number of `combinations`, counted up to `most`."""
    return sum(1 for _ in islice(combinations(dimensions), most))


def corners(dimensions: Mapping[str, Dimension]) -> list[PointSettings]:
    """Points to check a space at.

    All combinations of choices and ends, up to `MAX_CORNERS`; of a larger space the first and the
    last of them, and from both every value of every key alone, in the branch where it applies.
    """
    if num_combinations(dimensions, MAX_CORNERS + 1) <= MAX_CORNERS:
        return list(combinations(dimensions))
    found: list[PointSettings] = []
    for end in (0, -1):
        base = {key: each.corners[end] for key, each in dimensions.items()}
        found.append(_active(dimensions, base))
        for key, dimension in dimensions.items():
            placed = _places(dimensions, key)
            for value in dimension.corners:
                found.append(_active(dimensions, {**base, **placed, key: value}))
    return [point for index, point in enumerate(found) if point not in found[:index]]


def _places(dimensions: Mapping[str, Dimension], key: str) -> PointSettings:
    """Returns the settings under which a key applies, those of its conditions included."""
    placed: PointSettings = {}
    waiting = [key]
    while waiting:
        places = dimensions[waiting.pop()].places
        placed |= places
        waiting += places
    return placed


def _active(dimensions: Mapping[str, Dimension], values: Mapping[str, Any]) -> PointSettings:
    """Returns the values of those keys that apply."""
    point: PointSettings = {}
    for key, dimension in dimensions.items():
        if dimension.applies(point):
            point[key] = values[key]
    return point


def at_share(dimension: Dimension, share: float) -> float:
    """The value at a share of a range: 0 is its low end, 1 its high end, by its own scale."""
    low, high = dimension.ends
    share = min(1.0, max(0.0, share))
    if dimension.is_log:
        return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return low + share * (high - low)


def share_of(dimension: Dimension, value: float) -> float:
    """Share of a range at which a value lies; the inverse of `at_share`."""
    low, high = dimension.ends
    if dimension.is_log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low)
