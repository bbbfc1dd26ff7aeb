"""Sampling settings of a model folder: the file `sgmd.json` beside `model_index.json`.

A few-step generator is only right with its own number of steps and without guidance, and a
diffusers folder has no place to say so. What the file does not say, or where there is none, the
defaults of the model's family hold: those of diffusers' WanPipeline for Wan.
"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from sgmd_core.errors import ModelFolderError
from sgmd_core.schedule import MAX_STEPS, FlowMatchSchedule
from workers.models.configs import read_model_json
from workers.models.families import family_of
from workers.models.weight_digests import SETTINGS_FILE, write_model_settings

_SIZES = "trained_sizes"
_SCHEDULER_FILE = Path("scheduler") / "scheduler_config.json"


class InferenceSettings(BaseModel):
    """Sampling settings of a folder.

    Attributes:
        num_steps: Denoising steps.
        guidance_scale: s in `uncond + s * (cond - uncond)`; 1 is the conditional prediction alone.
        flow_shift: Shift of the noise levels; the folder's scheduler has it too.
        text_length: Text positions that the denoiser sees.
        negative_prompt: What guidance leads away from.
        num_frames: Video frames a clip.
        height: Pixels.
        width: Pixels.
        fps: Frames a second.
        steps: Raw levels of the steps in thousandths, where they are not equally spaced; they hold
            for as many steps without guidance.
        warp_steps: Whether the shift moves these levels.
        renoise: Whether each step without guidance goes to x0 and renoises it.
        trained_sizes: Frames, height, width of several sizes that were trained; empty: the one.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    num_steps: int = Field(ge=1, le=MAX_STEPS)
    guidance_scale: float = Field(ge=1)
    flow_shift: PositiveFloat
    text_length: PositiveInt
    negative_prompt: str = ""
    num_frames: PositiveInt
    height: PositiveInt
    width: PositiveInt
    fps: PositiveInt
    steps: tuple[int, ...] | None = None
    warp_steps: bool = True
    renoise: bool = False
    trained_sizes: tuple[tuple[PositiveInt, PositiveInt, PositiveInt], ...] = ()

    @property
    def written(self) -> dict[str, Any]:
        """As `sgmd.json` holds them: several sizes only where there are several."""
        return self.model_dump(mode="json", exclude=None if self.trained_sizes else {_SIZES})

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height, width."""
        return self.num_frames, self.height, self.width

    @property
    def schedule(self) -> FlowMatchSchedule:
        """Noise levels of the folder's sampler."""
        return FlowMatchSchedule(
            shift=self.flow_shift,
            steps=self.steps,
            warp_steps=self.warp_steps,
            renoise=self.renoise,
        )


def read_inference_settings(folder: Path) -> InferenceSettings:
    """Reads how a diffusers folder wants to be sampled.

    Raises:
        ModelFolderError: The folder is of no known family, or a settings file is there but cannot
            be used.
    """
    rules = family_of(folder).traits.sampling
    found: dict[str, Any] = asdict(rules)
    scheduler = _read_if_there(folder / _SCHEDULER_FILE)
    for name in ("shift", "flow_shift"):
        if name in scheduler:
            found["flow_shift"] = scheduler[name]
    found |= _read_if_there(folder / SETTINGS_FILE)
    try:
        return InferenceSettings.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelFolderError(
            f"reading {folder / SETTINGS_FILE}",
            f"{'.'.join(str(part) for part in first['loc'])} = {first['input']!r}",
            first["msg"],
            f"Correct the file, or delete it to use {rules.source}'s defaults "
            f"({error.error_count()} value(s) to correct)",
        ) from error


def scheduler_of(folder: Path) -> str | None:
    """Class of the scheduler that a diffusers folder has, or None if it has none.

    Raises:
        ModelFolderError: Its file cannot be read.
    """
    scheduler = _read_if_there(folder / _SCHEDULER_FILE)
    return str(scheduler.get("_class_name", "")) if scheduler else None


def write_inference_settings(folder: Path, settings: InferenceSettings) -> None:
    """Writes `sgmd.json` into a diffusers folder, with the digests of its weights."""
    write_model_settings(folder, settings.written)


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_model_json(path) if os.path.lexists(path) else {}
