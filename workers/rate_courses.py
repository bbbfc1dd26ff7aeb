"""Courses of a learning rate after its warm-up.

A new course is one entry of `COURSES` and its name in `Course`, the type that recipes are checked
with.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

Course = Literal["constant", "linear", "cosine"]
"""The setting `optimizer.decay`."""

CONSTANT = "constant"
"""The course that does not fall; an optimizer asks for no factor of it."""

COURSES: Mapping[Course, Callable[[float], float]] = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
}
"""Courses that fall, by name: factor from 1 to 0 over t from 0 to 1."""
