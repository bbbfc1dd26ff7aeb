"""Learning rate of an update: warm-up, and a course after it.

A new course is one entry of `COURSES`: recipes name it, and settings check it.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from workers.network_settings import OptimizerSettings

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


def learning_rate(settings: "OptimizerSettings", updates: int) -> float:
    """Rate of the update that follows `updates` earlier ones.

        warm-up     lr * (updates + 1) / warmup_iterations
        afterwards  lr * (final + (1 - final) * course(t)),   final = final_lr_ratio
                    t = (updates - warmup) / (decay_iterations - warmup), at most 1

    A function of the count alone, so a resumed run needs no state of a scheduler.
    """
    warmup = settings.warmup_iterations
    if updates < warmup:
        return settings.lr * (updates + 1) / warmup
    if settings.decay == CONSTANT:
        return settings.lr
    t = min(1.0, (updates - warmup) / (settings.decay_iterations - warmup))
    left = COURSES[settings.decay](t)
    return settings.lr * (settings.final_lr_ratio + (1 - settings.final_lr_ratio) * left)
