"""Places of a sweep: its folder, which may be an address, and what lies in it.

    NAME-sweep/  recipe.yaml  trials.json  sweep.csv  best.yaml  report.html    the sweep's own
                 start/       the state that all trials go on from
                 tune/        what Ray Tune knows, written by it
                 trials/      a run each, written by its own process

At an address the first line is a working copy of the sweep's process; the others are not in it.
"""

from pathlib import Path

from pipelines.config.recipe import DistillConfig
from pipelines.run.folder import TEACHER_CLIPS
from pipelines.run.places import shared_place

TRIALS, TUNE, START = "trials", "tune", "start"
ELSEWHERE = (TRIALS, TUNE, TEACHER_CLIPS)
"""Folders that are not in a working copy of a sweep."""


def sweep_place(config: DistillConfig) -> str:
    """The address of a sweep, or its path."""
    return shared_place(Path(f"{config.run_folder}-sweep"))
