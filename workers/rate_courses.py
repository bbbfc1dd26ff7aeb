"""Courses of a learning rate after its warm-up.

A new course is one entry of `COURSES`: recipes name it, and settings check it.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

CONSTANT = "constant"
COURSES: Mapping[str, Callable[[float], float]] = {
    CONSTANT: lambda t: 1.0,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
}
"""Courses after the warm-up by name: factor from 1 to 0 over t from 0 to 1."""

if TYPE_CHECKING:
    Course = Literal["constant", "linear", "cosine"]
else:
    Course = Literal[tuple(COURSES)]
    """The setting `optimizer.decay`."""
