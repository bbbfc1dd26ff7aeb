"""What the clips of a study are measured by: one set of the teacher's, for all runs.

    reference   guided teacher, many steps
    floor       the same with other seeds: what chance makes of no difference
    few, few_guided   the teacher in as few steps as the generators, without and with guidance

The reference is sampled once and remembered in the study's folder, under a name that is made of all
that decides it.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cluster.storage import read_json, write_json
from pipelines.clip_sets import folder_digest
from pipelines.config import DistillConfig
from pipelines.data.inspect import first_captions
from pipelines.preflight import check
from pipelines.validation import reads_shapes
from sgmd_core.metrics.diversity import seed_diversity
from sgmd_core.metrics.frechet import Features, clip_features, fit_gaussian, frechet_distance
from sgmd_core.metrics.shapes import (
    ClipReading,
    labels_from_captions,
    measure_clips,
    score_clips,
)
from workers.build import build_evaluator
from workers.clip_measures import measure_clip_figures
from workers.evaluator import Evaluator, Sampling
from workers.role_state import load_role

REFERENCE = "reference"
FLOOR = "floor"
FEW = "few"
FEW_GUIDED = "few_guided"

Figures = Mapping[str, float]
OnProgress = Callable[[str], None]

_CHUNK_CLIPS = 16
_READING_FIELDS = tuple(ClipReading.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class _Clips:
    """What remains of a set of clips: a row of features each, and means over all of them."""

    features: Features
    figures: Figures


class Judge:
    """Samples and measures, always with the same captions and the same noise.

    Args:
        config: The study's recipe, with what all its runs have in common.
        folder: Where the teacher's figures are remembered.
        on_progress: Hears what is sampled.
    """

    def __init__(self, config: DistillConfig, folder: Path, on_progress: OnProgress) -> None:
        self._config = config
        self._folder = folder
        self._tell = on_progress
        self.captions = first_captions(
            config.data.validation, config.data.s3, config.seed, config.study.num_captions
        )
        self._reads_shapes = reads_shapes(self.captions)

    @property
    def num_measurements(self) -> int:
        """Points of a run that are measured."""
        return self._config.study.measurements

    @cached_property
    def key(self) -> str:
        """Names all that decides the figures of a generator but its weights."""
        config = self._config
        everything = {
            "teacher": folder_digest(config.model_folder),
            "captions": self.captions,
            "settings": config.model_dump(
                mode="json", include={"seed", "model", "video", "schedule", "teacher", "generator"}
            ),
            "teacher_steps": config.validation.teacher_steps,
        }
        return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def teacher(self) -> dict[str, Figures]:
        """Figures of the teacher, sampled in four ways."""
        path = self._folder / f"teacher-{self.key}.json"
        if path.exists() and self._reference_file.exists():
            return read_json(str(path))
        found = {FLOOR: self._figures(self._sample(self._samplings[FLOOR], "teacher, other seeds"))}
        found[REFERENCE] = self._reference.figures
        for name, label in ((FEW, "teacher, few steps"), (FEW_GUIDED, "teacher, few guided steps")):
            found[name] = self._figures(self._sample(self._samplings[name], label))
        write_json(str(path), found)
        return found

    def generator(self, checkpoint: str, role: str, label: str) -> Figures:
        """Figures of a generator.

        Args:
            checkpoint: Folder of a committed checkpoint.
            role: Which part of it holds the weights: `ema` or `generator`.
            label: What is sampled, for whoever waits.
        """
        weights = load_role(checkpoint, role).weights
        return self._figures(self._sample(self._samplings[FEW], label, weights))

    @property
    def _samplings(self) -> dict[str, Sampling]:
        config = self._config
        guidance = config.teacher.guidance_scale
        reference = Sampling(config.validation.teacher_steps, guidance, config.seed)
        # Another seed than the reference's: the distance must not profit from shared noise.
        few = Sampling(config.generator.num_steps, 1.0, config.seed + 1)
        return {
            REFERENCE: reference,
            FLOOR: replace(reference, seed=few.seed),
            FEW: few,
            FEW_GUIDED: replace(few, guidance_scale=guidance),
        }

    @cached_property
    def _evaluator(self) -> Evaluator:
        config = self._config
        return build_evaluator(
            replace(config.model, folder=str(check(config).model.path.absolute())),
            config.video,
            config.schedule,
            config.topology.threads_per_rank,
            _CHUNK_CLIPS,
        )

    @property
    def _reference_file(self) -> Path:
        return self._folder / f"teacher-{self.key}.npz"

    @cached_property
    def _reference(self) -> _Clips:
        path = self._reference_file
        if path.exists():
            with np.load(path, allow_pickle=False) as arrays:
                figures = json.loads(str(arrays["figures"]))
                return _Clips(torch.from_numpy(arrays["features"]), figures)
        clips = self._sample(self._samplings[REFERENCE], "teacher, the reference")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".writing")
        with temporary.open("wb") as file:
            figures = np.array(json.dumps(dict(clips.figures)))
            np.savez_compressed(file, features=clips.features.numpy(), figures=figures)
        temporary.replace(path)
        return clips

    @cached_property
    def _target(self) -> tuple[Tensor, Tensor]:
        return fit_gaussian(self._reference.features)

    def _figures(self, clips: _Clips) -> Figures:
        distance = frechet_distance(*fit_gaussian(clips.features), *self._target)
        return {"frechet": distance, **clips.figures}

    def _sample(
        self, how: Sampling, label: str, weights: Mapping[str, Tensor] | None = None
    ) -> _Clips:
        """Samples and measures a chunk at a time, so that few clips are in memory."""
        self._tell(f"sampling {len(self.captions)} clips: {label}")
        features: list[Tensor] = []
        measures: list[dict[str, Tensor]] = []
        readings: list[ClipReading] = []
        for start in range(0, len(self.captions), _CHUNK_CLIPS):
            captions = self.captions[start : start + _CHUNK_CLIPS]
            video = self._evaluator.sample(
                captions, start, how.seed, how.num_steps, how.guidance_scale, weights
            )
            features.append(clip_features(video))
            measures.append(measure_clip_figures(video, self._config.video.fps))
            if self._reads_shapes:
                readings.append(measure_clips(video))
        return _Clips(
            torch.cat(features), self._means(torch.cat(features), measures, _joined(readings))
        )

    def _means(
        self,
        features: Features,
        measures: Sequence[Mapping[str, Tensor]],
        reading: ClipReading | None,
    ) -> Figures:
        figures = {
            name: float(torch.cat([part[name] for part in measures]).double().mean())
            for name in measures[0]
        }
        diversity = seed_diversity(features, self.captions)
        if len(diversity):
            figures["diversity"] = float(diversity.mean())
        if reading is not None:
            scores = score_clips(reading, labels_from_captions(self.captions))
            figures |= {
                "colour": scores.colour,
                "shape": scores.shape,
                "direction": scores.direction,
                "speed": scores.mean_speed_px_per_frame,
            }
        return figures


def _joined(readings: Sequence[ClipReading]) -> ClipReading | None:
    if not readings:
        return None
    return ClipReading(
        **{name: torch.cat([getattr(part, name) for part in readings]) for name in _READING_FIELDS}
    )
