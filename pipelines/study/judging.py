"""Measures the clips of a study against one set of the teacher's, for all runs.

The teacher's sets are those of an evaluation (`pipelines.evaluation.teacher_sets`). Each set is
also sampled from the other seed, for `diversity`. They are sampled once and remembered in the
study's folder.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from pipelines.config.recipe import DistillConfig
from pipelines.data.stream.inspect import first_captions
from pipelines.distillation.preflight import run_preflight
from pipelines.evaluation.teacher_sets import TEACHER_SETS, TeacherSets
from sgmd_core.metrics.frechet import Features, Gaussian, fit_gaussian, frechet_distance
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.worlds.readings import motion_of, world_of
from workers.build import build_evaluator
from workers.clip_sets import ClipRequest, ClipSet, sample_clip_set
from workers.evaluator import CHUNK_CLIPS, Evaluator
from workers.kept_clips import clip_facts
from workers.models.content import fingerprint
from workers.models.families import family_of
from workers.models.folder import require_encoders
from workers.role_state import load_role
from workers.samplings import REFERENCE, TEACHER_FEW, teacher_samplings
from workers.set_measures import motion_figures

Figures = Mapping[str, float]
"""By name: `frechet`, means of `MeasuredClips.figures`, and `workers.set_measures`."""

_CACHE_FOLDER = "teacher"


def require_measurable(config: DistillConfig) -> None:
    """Checks that clips of a run and of its teacher can be sampled and measured.

    Raises:
        ModelFolderError: A folder has no text encoder or no autoencoder.
    """
    for folder in dict.fromkeys((config.model_folder, config.teacher_folder)):
        require_encoders(family_of(folder).inspect(folder), f"measuring clips of {folder}")


def study_captions(config: DistillConfig) -> tuple[str, ...]:
    """Held-out captions that all variants of a study are measured with.

    Raises:
        DataError: They cannot be read.
        ConfigError: There are fewer than `study.num_captions`.
    """
    data = config.data
    names = data.validation_columns or data.columns
    wanted, setting = config.study.num_captions, "study.num_captions={}"
    return first_captions(data.validation, data.s3, config.seed, wanted, names, setting=setting)


class StudyEvaluator:
    """Samples and measures, always with the same captions and the same noise.

    Args:
        config: The study's recipe, with what all its runs have in common.
        folder: The study's folder.
        tell: Called with what is sampled.
    """

    def __init__(self, config: DistillConfig, folder: Path, tell: Callable[[str], None]) -> None:
        self._config = config
        self._cache = folder / _CACHE_FOLDER
        self._tell = tell
        self.captions = study_captions(config)

    @property
    def num_measurements(self) -> int:
        """Points of a run that are measured."""
        return self._config.study.measurements

    def key(self, schedule: FlowMatchSchedule) -> str:
        """Names all that decides the figures of a generator but its weights.

        Args:
            schedule: Of its run.
        """
        sets = self._sets
        few, twin = (sets.request_of(TEACHER_FEW, is_twin=is_twin) for is_twin in (False, True))
        names = [sets.key(each) for each in (sets.request_of(REFERENCE), few, twin)]
        own = clip_facts(self._config.model, self._config.video, schedule)
        others = [] if own == sets.facts else [hashlib.sha256(str(own).encode()).hexdigest()[:8]]
        return "-".join([*names, *others])

    @cached_property
    def teacher(self) -> dict[str, Figures]:
        """Figures of the teacher's sets, by name."""
        sets = self._sets
        return {
            name: self._figures(sets.set(name), sets.twin(name).clips.features)
            for name in TEACHER_SETS
        }

    def generator(
        self, schedule: FlowMatchSchedule, checkpoint: str, role: str, label: str
    ) -> Figures:
        """Figures of a generator.

        Args:
            schedule: Of its run; it is sampled as it was trained.
            checkpoint: Folder of a committed checkpoint.
            role: Which part of it holds the weights: `ema` or `generator`.
            label: What is sampled, for progress.
        """
        weights = load_role(checkpoint, role).weights
        # The generator is sampled as the teacher's few steps are: the same noise, unguided.
        own, twin = (
            self._sample(
                self._sets.request_of(TEACHER_FEW, is_twin=is_twin), words, weights, schedule
            )
            for is_twin, words in ((False, label), (True, f"{label}, the other seed"))
        )
        return self._figures(own, twin.clips.features)

    @cached_property
    def _evaluator(self) -> Evaluator:
        config = self._config
        return build_evaluator(
            replace(config.model, folder=str(run_preflight(config).model.path.absolute())),
            config.video,
            config.schedule,
            config.topology.threads_per_rank,
            CHUNK_CLIPS,
            teacher=str(config.teacher_folder.absolute()) if config.teacher.model else None,
        )

    @cached_property
    def _sets(self) -> TeacherSets:
        config = self._config
        samplings = teacher_samplings(
            config.validation.teacher_steps,
            config.teacher.guidance_scale,
            config.generator.num_steps,
            config.seed,
        )
        return TeacherSets(
            cache=self._cache,
            digest=fingerprint(config.teacher_folder),
            facts=clip_facts(config.model, config.video, config.schedule),
            samplings=samplings,
            request=ClipRequest(
                captions=self.captions,
                sampling=samplings[REFERENCE],
                batch_size=CHUNK_CLIPS,
                fps=config.video.fps,
                world=world_of(self.captions),
            ),
            open_evaluator=lambda: self._evaluator,
            on_progress=self._report,
        )

    @cached_property
    def _target(self) -> Gaussian:
        return fit_gaussian(self._sets.set(REFERENCE).clips.features)

    def _report(self, name: str, is_twin: bool, done: int, total: int) -> None:
        other = ", the other seed" if is_twin else ""
        self._tell(f"sampling the teacher's set {name}{other}: {done} of {total} clips")

    def _sample(
        self,
        request: ClipRequest,
        label: str,
        weights: Mapping[str, Tensor],
        schedule: FlowMatchSchedule,
    ) -> ClipSet:
        self._tell(f"sampling {len(self.captions)} clips: {label}")
        return sample_clip_set(
            self._evaluator.scheduled(schedule),
            request,
            lambda done, total: self._tell(f"{label}: {done} of {total} clips"),
            weights=weights,
        )

    def _figures(self, clips: ClipSet, other_seed: Features) -> Figures:
        found = clips.clips.figures(self.captions, other_seed)
        return {
            "frechet": frechet_distance(*fit_gaussian(clips.clips.features), *self._target),
            **{name: float(values.double().mean()) for name, values in found.items()},
            **self._distributions(clips),
        }

    def _distributions(self, clips: ClipSet) -> Figures:
        """Distances of what the clips of an embedded world do as a whole to the reference's."""
        own, reference = (each.clips.reading for each in (clips, self._sets.set(REFERENCE)))
        if own is None or reference is None:
            return {}
        return motion_figures(motion_of(own), motion_of(reference))
