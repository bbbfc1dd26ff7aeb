"""Measures the clips of a study against one set of the teacher's, for all runs.

    reference           guided teacher, many steps
    floor               the same with other seeds: what chance makes of no difference
    teacher_few         the teacher in as few steps as the generators; what they start from
    teacher_few_guided  the same, guided

Each set is also sampled from the other seed, for `diversity`, as an evaluation does it. The
teacher's sets are sampled once and remembered in the study's folder, under names that are made
of all that decides them.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from pipelines.config.recipe import DistillConfig
from pipelines.data.stream.inspect import first_captions
from pipelines.distillation.preflight import run_preflight
from pipelines.distillation.validation import reads_shapes
from pipelines.evaluation.clip_sets import (
    ClipRequest,
    ClipSet,
    load_clip_set,
    sample_clip_set,
    save_clip_set,
    set_name,
)
from pipelines.evaluation.result import FLOOR, REFERENCE, TEACHER_FEW, TEACHER_FEW_GUIDED
from sgmd_core.metrics.frechet import Features, Gaussian, fit_gaussian, frechet_distance
from workers.build import build_evaluator
from workers.evaluator import Evaluator, Sampling
from workers.models.content import fingerprint
from workers.role_state import load_role

Figures = Mapping[str, float]
"""By name: `frechet`, and means of `MeasuredClips.figures` over the clips."""

_CHUNK_CLIPS = 16
_CACHE_FOLDER = "teacher"


class StudyEvaluator:
    """Samples and measures, always with the same captions and the same noise.

    Args:
        config: The study's recipe, with what all its runs have in common.
        folder: The study's folder.
        tell: Hears what is sampled.
    """

    def __init__(self, config: DistillConfig, folder: Path, tell: Callable[[str], None]) -> None:
        self._config = config
        self._cache = folder / _CACHE_FOLDER
        self._tell = tell
        self.captions = first_captions(
            config.data.validation, config.data.s3, config.seed, config.study.num_captions
        )
        guidance = config.teacher.guidance_scale
        reference = Sampling(config.validation.teacher_steps, guidance, config.seed)
        # Another seed than the reference's: the distance must not profit from shared noise.
        few = Sampling(config.generator.num_steps, 1.0, config.seed + 1)
        self._samplings = {
            REFERENCE: reference,
            FLOOR: replace(reference, seed=few.seed),
            TEACHER_FEW: few,
            TEACHER_FEW_GUIDED: replace(few, guidance_scale=guidance),
        }

    @property
    def num_measurements(self) -> int:
        """Points of a run that are measured."""
        return self._config.study.measurements

    @cached_property
    def key(self) -> str:
        """Names all that decides the figures of a generator but its weights."""
        sets = (self._request(REFERENCE), self._request(TEACHER_FEW), self._twin(TEACHER_FEW))
        return "-".join(self._name(request) for request in sets)

    @cached_property
    def teacher(self) -> dict[str, Figures]:
        """Figures of the teacher's sets, by name."""
        return {
            name: self._figures(
                self._teacher_set(self._request(name), name),
                self._teacher_twin(name).clips.features,
            )
            for name in self._samplings
        }

    def generator(self, checkpoint: str, role: str, label: str) -> Figures:
        """Figures of a generator.

        Args:
            checkpoint: Folder of a committed checkpoint.
            role: Which part of it holds the weights: `ema` or `generator`.
            label: What is sampled, for whoever waits.
        """
        weights = load_role(checkpoint, role).weights
        clips = self._sample(self._request(TEACHER_FEW), label, weights)
        twin = self._sample(self._twin(TEACHER_FEW), f"{label}, the other seed", weights)
        return self._figures(clips, twin.clips.features)

    @cached_property
    def _evaluator(self) -> Evaluator:
        config = self._config
        return build_evaluator(
            replace(config.model, folder=str(run_preflight(config).model.path.absolute())),
            config.video,
            config.schedule,
            config.topology.threads_per_rank,
            _CHUNK_CLIPS,
        )

    @cached_property
    def _digest(self) -> str:
        return fingerprint(self._config.model_folder)

    @cached_property
    def _target(self) -> Gaussian:
        reference = self._teacher_set(self._request(REFERENCE), REFERENCE)
        return fit_gaussian(reference.clips.features)

    def _name(self, request: ClipRequest) -> str:
        config = self._config
        model = (config.model.text_length, config.model.negative_prompt)
        facts = (*model, config.video, config.schedule.shift)
        return set_name(self._digest, request, facts)

    def _request(self, name: str) -> ClipRequest:
        return ClipRequest(
            captions=self.captions,
            sampling=self._samplings[name],
            batch_size=_CHUNK_CLIPS,
            fps=self._config.video.fps,
            reads_shapes=reads_shapes(self.captions),
            shown=(),
        )

    def _twin(self, name: str) -> ClipRequest:
        """The same clips from the other seed, of which only the features are wanted."""
        request = self._request(name)
        seeds = {sampling.seed for sampling in self._samplings.values()}
        (other,) = seeds - {request.sampling.seed}
        sampling = replace(request.sampling, seed=other)
        return replace(request, sampling=sampling, features_only=True)

    def _teacher_set(self, request: ClipRequest, label: str) -> ClipSet:
        path = self._cache / f"{self._name(request)}.npz"
        if (remembered := load_clip_set(path)) is not None:
            return remembered
        clips = self._sample(request, f"the teacher's set {label}")
        save_clip_set(path, clips)
        return clips

    def _teacher_twin(self, name: str) -> ClipSet:
        """The teacher's clips from the other seed; reference and floor are each other's."""
        if known := {REFERENCE: FLOOR, FLOOR: REFERENCE}.get(name):
            return self._teacher_set(self._request(known), known)
        return self._teacher_set(self._twin(name), f"{name}, the other seed")

    def _sample(
        self, request: ClipRequest, label: str, weights: Mapping[str, Tensor] | None = None
    ) -> ClipSet:
        self._tell(f"sampling {len(self.captions)} clips: {label}")
        return sample_clip_set(self._evaluator, request, weights=weights)

    def _figures(self, clips: ClipSet, other_seed: Features) -> Figures:
        found = clips.clips.figures(self.captions, other_seed)
        return {
            "frechet": frechet_distance(*fit_gaussian(clips.clips.features), *self._target),
            **{name: float(values.double().mean()) for name, values in found.items()},
        }
