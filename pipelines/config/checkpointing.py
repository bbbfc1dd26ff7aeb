"""Settings of saving, validating and keeping the states of a run."""

from functools import partial
from typing import Annotated

from pydantic import AfterValidator, Field

from pipelines.config.figures import FIGURES, Mode, known_figure
from pipelines.config.section import Section
from sgmd_core.schedule import MAX_STEPS

Figure = Annotated[str, AfterValidator(partial(known_figure, FIGURES, "validation"))]
"""Name of something that a validation measures."""


class CheckpointSettings(Section):
    """Iterations after which the state of the run is saved; always at its end."""

    every: int = Field(default=100, ge=0)
    """Iterations between two checkpoints; 0 saves at the end only."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""
    keep_best: int = Field(default=0, ge=0)
    """Best checkpoints that are kept besides; above 0 every validated state becomes one."""
    score: Figure = "frechet"
    """The validation figure that ranks them."""
    mode: Mode = "min"
    """Direction of a good score: `min`, a small one, or `max`."""
    background: bool = True
    """Continue training while a copy of the state is written; the copy takes main memory."""
    stop_after_s: float = Field(default=300.0, gt=0)
    """Seconds that a stop (Ctrl-C, SIGTERM) waits for the iteration under way."""


class ValidationSettings(Section):
    """Sampling and measuring of the averaged generator, beside the training."""

    every: int = Field(default=0, ge=0)
    """Iterations between two validations; 0 does none."""
    num_captions: int = Field(default=64, ge=2)
    """Held-out captions, one clip each."""
    teacher_steps: int = Field(default=30, ge=1, le=MAX_STEPS)
    """Steps of the teacher's clips, which the generator's are compared with."""
    timeout_s: float = Field(default=7200.0, gt=0)
    """Seconds that the run waits at its end for each validation that is still under way."""
    teacher_clips: str | None = None
    """Folder of what was measured of the teacher's clips, a path or an address, which runs may
    share; null: `teacher-clips` in the run folder. The trials of a sweep share one."""
