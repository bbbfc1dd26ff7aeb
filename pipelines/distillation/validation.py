"""Validation during training: clips of the averaged generator beside the teacher's.

Losses of this family do not say how good the clips are, so the figures are measured on decoded
clips, and the alarms, the ranking of checkpoints and the report read them. What they mean stands in
`workers.validation_evaluator`; `sgmd evaluate` measures the same on more clips.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cluster.folders import files_at
from pipelines.media.contact_sheet import SheetGroup, write_contact_sheet
from pipelines.run.records import ValidationRecord
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.worlds.readings import world_of
from workers.build import build_evaluator
from workers.clip_sets import ClipRequest
from workers.clip_settings import VideoSettings
from workers.evaluator import CHUNK_CLIPS, Evaluator
from workers.kept_clips import KeptClips
from workers.samplings import Sampling
from workers.settings import GeneratorSettings, ModelSettings
from workers.validation_evaluator import ValidationEvaluator, ValidationReport

NUM_SHEET_ROWS = 8


@dataclass(frozen=True, slots=True)
class ValidationPlan:
    """Samples of a validation.

    Attributes:
        captions: Held-out captions, one clip each.
        generator: How the generator is sampled.
        teacher: How the teacher is sampled for the reference, from another seed; made once.
        fps: Frames a second of the sheets.
        samples: Folder for the contact sheets: a path or an address.
        scores: Figures that rank generators.
        outage_s: How long a sheet waits for the object store of an address.
        kept: The teacher's measured clips, which runs may share; None keeps them in memory.
    """

    captions: tuple[str, ...]
    generator: Sampling
    teacher: Sampling
    fps: int
    samples: str
    scores: tuple[str, ...] = ()
    outage_s: float = 0.0
    kept: KeptClips | None = None


class Validator:
    """Samples, measures, and draws a contact sheet.

    Args:
        evaluator: Samples from given weights, or from the teacher's.
        plan: What to sample.
    """

    def __init__(self, evaluator: Evaluator, plan: ValidationPlan) -> None:
        self._plan = plan
        self._evaluator = ValidationEvaluator(
            evaluator,
            ClipRequest(
                captions=plan.captions,
                sampling=plan.generator,
                batch_size=CHUNK_CLIPS,
                fps=plan.fps,
                world=world_of(plan.captions),
                shown=tuple(range(min(NUM_SHEET_ROWS, len(plan.captions)))),
            ),
            plan.teacher,
            plan.scores,
            plan.kept,
        )

    def validate(self, iteration: int, weights: dict[str, Tensor]) -> ValidationRecord:
        """Measures the generator that has these weights.

        Args:
            iteration: Updates that the weights have seen; names the sheet.
            weights: The generator's averaged weights.
        """
        began = time.perf_counter()
        report = self._evaluator.validate(weights)
        name = f"validation-{iteration:06d}"
        self._draw(name, report)
        return ValidationRecord(
            iteration=iteration,
            figures=dict(report.figures),
            seconds=time.perf_counter() - began,
            sheet=f"{name}.png",
            intervals=dict(report.intervals),
            influences=dict(report.influences),
            seconds_per_clip=report.seconds_per_clip,
        )

    def _draw(self, name: str, report: ValidationReport) -> None:
        """The sheet: row by row the same caption and the same initial noise."""
        plan = self._plan
        groups = [
            SheetGroup(
                f"teacher, {plan.teacher.num_steps} steps",
                f"guidance {plan.teacher.guidance_scale:g}",
                report.teacher_shown,
            ),
            SheetGroup(
                f"generator, {plan.generator.num_steps} steps", "averaged weights", report.shown
            ),
        ]
        captions = plan.captions[:NUM_SHEET_ROWS]
        with files_at(plan.samples, plan.outage_s) as folder:
            png, gif = folder / f"{name}.png", folder / f"{name}.gif"
            write_contact_sheet(png, gif, groups, captions, plan.fps)


def build_validator(
    model: ModelSettings,
    video: VideoSettings,
    schedule: FlowMatchSchedule,
    plan: ValidationPlan,
    generator: GeneratorSettings,
    num_threads: int,
    teacher: str | None = None,
    stored: Mapping[str, NDArray[np.float32]] | None = None,
) -> Validator:
    """Factory for a worker group; `teacher` and `stored` as in `build_evaluator`."""
    evaluator = build_evaluator(
        model,
        video,
        schedule,
        num_threads,
        weights=generator,
        teacher=teacher,
        stored=stored,
    )
    return Validator(evaluator, plan)
