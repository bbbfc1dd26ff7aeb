"""Measures a generator against its teacher while it trains.

    captions, weights -> generator's clips, two seeds  -+
                         teacher's clips, two seeds    -+-> figures, ratios, intervals

    frechet        distance to the teacher's clips from other noise, as for any two sets
    frechet_floor  the same of the teacher itself: what chance makes of no difference
    NAME           mean of a figure over the generator's clips
    NAME_ratio     over that of the teacher's clips of the same captions and noise
    diversity      distance between two clips of a caption, from two seeds

The teacher's clips are sampled once and remembered as numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sgmd_core.metrics.comparison import compare_sets
from sgmd_core.metrics.frechet import Features, fit_gaussian, frechet_distance
from sgmd_core.worlds.shapes import labels_from_captions, score_clips
from workers.clip_sets import ClipRequest, ClipSet, sample_clip_set
from workers.evaluator import Evaluator, Sampling

_RESAMPLING_SEED = 0


@dataclass(frozen=True, slots=True)
class ValidationReport:
    """Result of a validation.

    Attributes:
        figures: By name, as the top of this file says.
        intervals: Ends of the 95 % interval of those that are means or ratios of means.
        seconds_per_clip: Median over chunks, from caption to pixels.
        shown: Pixels (frames, height, width, 3) of the generator's first clips.
        teacher_shown: The teacher's, of the same captions and noise.
    """

    figures: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    seconds_per_clip: float
    shown: tuple[NDArray[np.uint8], ...]
    teacher_shown: tuple[NDArray[np.uint8], ...]


class ValidationEvaluator:
    """Validates one generator after another on the same captions.

    Args:
        evaluator: Its base weights are the teacher's.
        request: The generator's clips.
        reference: How the teacher is sampled for the clips that the distance is taken to. Its seed
            is another one, or the distance would profit from common noise; the teacher's clips
            that ratios are taken to have the generator's seed.
    """

    def __init__(self, evaluator: Evaluator, request: ClipRequest, reference: Sampling) -> None:
        self._evaluator = evaluator
        self._request = request
        self._reference_sampling = reference

    def validate(self, weights: Mapping[str, Tensor]) -> ValidationReport:
        """Samples with a generator's weights and measures the clips.

        Raises:
            CheckpointError: The weights are those of another network.
            ShapeError: The clips are too short or too small to be measured.
        """
        request = self._request
        clips = sample_clip_set(self._evaluator, request, weights=weights)
        twin = self._features(request.twin(self._reference_sampling.seed), weights)
        own = clips.clips.figures(request.captions, twin)
        partner = self._partner.clips.figures(request.captions, self._reference)

        figures = {
            "frechet": self._distance(clips.clips.features),
            "frechet_floor": self._distance(self._partner.clips.features),
        }
        intervals: dict[str, tuple[float, float]] = {}
        for name, found in compare_sets(own, partner, _RESAMPLING_SEED).items():
            for key, interval in ((name, found.value), (f"{name}_ratio", found.ratio)):
                if interval is not None:
                    figures[key] = interval.value
                    intervals[key] = (interval.low, interval.high)
        if clips.clips.reading is not None:
            labels = labels_from_captions(request.captions)
            figures["speed_spearman"] = score_clips(clips.clips.reading, labels).speed_spearman
        return ValidationReport(
            figures,
            intervals,
            median(clips.seconds.tolist()),
            clips.shown,
            self._partner.shown,
        )

    @cached_property
    def _partner(self) -> ClipSet:
        """The teacher's clips from the generator's noise."""
        seed = self._request.sampling.seed
        sampling = replace(self._reference_sampling, seed=seed)
        return sample_clip_set(self._evaluator, self._request.sampled(sampling))

    @cached_property
    def _reference(self) -> Features:
        """Features of the teacher's clips from other noise."""
        sampling = self._reference_sampling
        return self._features(self._request.sampled(sampling).twin(sampling.seed), None)

    def _distance(self, features: Features) -> float:
        return frechet_distance(*fit_gaussian(features), *fit_gaussian(self._reference))

    def _features(self, request: ClipRequest, weights: Mapping[str, Tensor] | None) -> Features:
        return sample_clip_set(self._evaluator, request, weights=weights).clips.features
