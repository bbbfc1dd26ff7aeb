"""What a run looks at while it trains: clips of the averaged generator beside the teacher's.

Losses of this family do not say how good the clips are, so the figures are measured on decoded
clips. They serve to follow one run; `sgmd evaluate` gives figures with their floor and their error.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from pipelines.contact_sheet import SheetGroup, write_contact_sheet
from pipelines.records import ValidationRecord
from pipelines.video import Pixels
from sgmd_core.errors import ShapeError
from sgmd_core.metrics.shapes import labels_from_captions
from sgmd_core.schedule import FlowMatchSchedule
from workers.build import build_evaluator
from workers.evaluator import Evaluator, Sampling, ValidationRequest, to_pixels
from workers.settings import ModelSettings, VideoSettings

NUM_SHEET_ROWS = 8


@dataclass(frozen=True, slots=True)
class ValidationPlan:
    """What to sample, and how.

    Attributes:
        captions: Held-out captions, one clip each.
        generator: How the generator is sampled.
        teacher: How the teacher is sampled; its clips are the reference, made once.
        fps: Frames a second of the sheets.
        samples: Folder for the contact sheets.
    """

    captions: tuple[str, ...]
    generator: Sampling
    teacher: Sampling
    fps: int
    samples: str


class Validator:
    """Samples, measures, and draws a contact sheet.

    Args:
        evaluator: Samples from given weights, or from the teacher's.
        plan: What to sample.
    """

    def __init__(self, evaluator: Evaluator, plan: ValidationPlan) -> None:
        self._evaluator = evaluator
        self._plan = plan
        self._request = ValidationRequest(
            captions=plan.captions,
            sampling=plan.generator,
            reference=plan.teacher,
            reads_shapes=reads_shapes(plan.captions),
            num_shown=NUM_SHEET_ROWS,
        )

    def validate(self, iteration: int, weights: dict[str, Tensor]) -> ValidationRecord:
        """Measures the generator that has these weights.

        Args:
            iteration: Updates that the weights have seen; names the sheet.
            weights: The generator's averaged weights.
        """
        began = time.perf_counter()
        report = self._evaluator.validate(weights, self._request)
        name = f"validation-{iteration:06d}"
        self._draw(name, report.shown)
        seconds = time.perf_counter() - began
        return ValidationRecord(iteration, dict(report.figures), seconds, f"{name}.png")

    @cached_property
    def _teacher_clips(self) -> list[Pixels]:
        how = self._plan.teacher
        captions = self._plan.captions[:NUM_SHEET_ROWS]
        clips = self._evaluator.sample(captions, 0, how.seed, how.num_steps, how.guidance_scale)
        return to_pixels(clips)

    def _draw(self, name: str, clips: Sequence[Pixels]) -> None:
        plan, folder = self._plan, Path(self._plan.samples)
        folder.mkdir(parents=True, exist_ok=True)
        groups = [
            SheetGroup(
                f"teacher, {plan.teacher.num_steps} steps",
                f"guidance {plan.teacher.guidance_scale:g}",
                self._teacher_clips,
            ),
            SheetGroup(f"generator, {plan.generator.num_steps} steps", "averaged weights", clips),
        ]
        captions = plan.captions[:NUM_SHEET_ROWS]
        png, gif = folder / f"{name}.png", folder / f"{name}.gif"
        write_contact_sheet(png, gif, groups, captions, plan.fps)


def build_validator(
    model: ModelSettings,
    video: VideoSettings,
    schedule: FlowMatchSchedule,
    plan: ValidationPlan,
    num_threads: int,
) -> Validator:
    """Factory for a worker group."""
    return Validator(build_evaluator(model, video, schedule, num_threads), plan)


def reads_shapes(captions: Sequence[str]) -> bool:
    """Whether all captions are of the world `shapes`, so that pixels can be read exactly."""
    try:
        labels_from_captions(captions)
    except ShapeError:
        return False
    return True
