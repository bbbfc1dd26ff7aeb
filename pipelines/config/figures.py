"""Names of the figures of a validation, by which states are ranked and runs are compared."""

from typing import Literal

from workers.measures import MEASURES

Mode = Literal["min", "max"]
"""Whether the smaller or the larger value of a figure is the better one."""

FIGURES = tuple(
    name
    for measure in MEASURES
    if measure.ranks
    for name in (measure.name, *([f"{measure.name}_ratio"] if measure.has_ratio else ()))
)
"""Names of the figures of a validation that may rank states."""

SHAPE_FIGURES = tuple(
    name
    for measure in MEASURES
    if measure.needs_shapes
    for name in (measure.name, *([f"{measure.name}_ratio"] if measure.has_ratio else ()))
)
"""Figures that are read from captions of the world `shapes` only."""

HEADLINE_FIGURES = tuple(
    f"{measure.name}_ratio" if measure.leads == "ratio" else measure.name
    for measure in MEASURES
    if measure.leads
)
"""Figures of a progress line."""
