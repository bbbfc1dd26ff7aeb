"""Names of the figures of a validation, by which states are ranked and runs are compared."""

import difflib
from collections.abc import Callable, Sequence
from typing import Literal

from workers.measures import MEASURES, Measure

Mode = Literal["min", "max"]
"""Direction of the better value of a figure: the smaller or the larger one."""


def _with_ratios(holds: Callable[[Measure], bool]) -> tuple[str, ...]:
    found = (measure for measure in MEASURES if holds(measure))
    ratios = {True: ("", "_ratio"), False: ("",)}
    return tuple(each.name + end for each in found for end in ratios[each.has_ratio])


FIGURES = _with_ratios(lambda measure: measure.ranks)
"""Names of the figures of a validation that may rank states."""

SHAPE_FIGURES = _with_ratios(lambda measure: measure.needs_shapes)
"""Figures that are read from captions of the world `shapes` only."""

HEADLINE_FIGURES = tuple(
    f"{measure.name}_ratio" if measure.leads == "ratio" else measure.name
    for measure in MEASURES
    if measure.leads
)
"""Figures of a progress line."""


def known_figure(known: Sequence[str], of: str, name: str) -> str:
    """Checks the name of a figure: as a validator, with the first two arguments given.

    Raises:
        ValueError: It is not among those that are known `of` a validation, or of a study.
    """
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; the nearest one is {close[0]}" if close else f": {', '.join(known)}"
    raise ValueError(f"{name!r} is not a figure of a {of}{hint}")
