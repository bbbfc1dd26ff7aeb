"""Settings of alarms: the limits of a run, and which of them end it."""

from typing import Literal

from pydantic import Field

from pipelines.config.section import Section

AlarmName = Literal[
    "over_saturation",
    "motion_collapse",
    "diversity_collapse",
    "tracking_growth",
    "residual_dominance",
    "tracking_lag",
    "silent_discriminator",
]


OF_VALIDATIONS: frozenset[AlarmName] = frozenset(
    ("over_saturation", "motion_collapse", "diversity_collapse")
)
"""Alarms that are read from validations."""


class AlarmSettings(Section):
    """Limits at which a run warns, and the alarms that stop it."""

    saturation_above: float = Field(default=1.3, gt=1)
    """Limit of the saturation of the clips, as a ratio to the teacher's."""
    motion_below: float = Field(default=0.6, gt=0, lt=1)
    """Limit of the optical flow of the fastest 5 % of a frame, as a ratio to the teacher's."""
    diversity_below: float = Field(default=0.5, gt=0, lt=1)
    """Limit of the distance between clips of one caption, as a ratio to the teacher's."""
    tracking_growth: float = Field(default=2.0, gt=1)
    """Limit of the tracking loss, as a ratio to the lowest it has been."""
    residual_over_fisher: float = Field(default=1.0, gt=0)
    """Limit of the negative residual's norm, as a ratio to the Fisher term's."""
    window: int = Field(default=25, ge=1)
    """Iterations that the means of the losses run over."""
    stop: tuple[AlarmName, ...] = ()
    """Alarms that end the run, after its state has been saved."""
    lag_above: float = Field(default=0.1, gt=0, lt=1)
    """Limit of the lag of the fake score, where it is measured: `lag.every`."""
    logit_gap_below: float = Field(default=0.05, gt=0)
    """Limit of the mean logit of what a discriminator should accept, minus that of what it should
    refuse; from the second window on, because heads start at 0."""
