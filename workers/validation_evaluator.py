"""Measures a generator against its teacher while it trains.

    captions, weights -> generator's clips, two seeds  -+
                         teacher's clips, two seeds    -+-> figures, ratios, intervals

    frechet        distance to the teacher's clips from other noise, as for any two sets
    frechet_floor  the same of the teacher itself: what chance makes of no difference
    NAME           mean of a figure over the generator's clips
    NAME_ratio     over that of the teacher's clips of the same captions and noise
    diversity      distance between two clips of a caption, from two seeds
    speed_distance, direction_entropy, ...   of what the clips of an embedded world do as a whole,
                   to those teacher's clips from other noise; NAME_ratio as above

The teacher's clips are sampled once and kept as numbers, in a folder that runs may share. Means
and ratios have intervals by a bootstrap over clips, distances and rank correlations by leaving
clips out: one distance a clip, 0.2 s for 64 clips.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import median

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sgmd_core.metrics.comparison import Compared, compare_sets
from sgmd_core.metrics.frechet import Features, fit_gaussian, frechet_distance
from sgmd_core.metrics.jackknife import Influence, Kept, influences, jackknife_interval
from sgmd_core.worlds.readings import motion_of
from sgmd_core.worlds.shapes import ClipReading, labels_from_captions, spearman
from workers.clip_sets import ClipRequest, ClipSet, sample_clip_set
from workers.evaluator import Evaluator
from workers.kept_clips import KeptClips
from workers.measured_clips import MeasuredClips
from workers.samplings import Sampling
from workers.set_measures import compare_motions

_RESAMPLING_SEED = 0
_MIN_CLIPS = 3
"""A distance needs two clips, and one is left out."""


@dataclass(frozen=True, slots=True)
class ValidationReport:
    """Result of a validation.

    Attributes:
        figures: By name, as the top of this file says.
        intervals: Ends of the 95 % interval of each.
        influences: Of the figures that rank, the influence of each clip
            (`sgmd_core.metrics.jackknife`), by which two generators are compared clip by clip.
        seconds_per_clip: Median over chunks, from caption to pixels.
        shown: Pixels (frames, height, width, 3) of the generator's first clips.
        teacher_shown: The teacher's, of the same captions and noise.
    """

    figures: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    influences: Mapping[str, tuple[float, ...]]
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
        scores: Figures that rank generators; their influences are reported.
        kept: The teacher's sets of other runs; None keeps them in this process alone.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        request: ClipRequest,
        reference: Sampling,
        scores: Sequence[str] = (),
        kept: KeptClips | None = None,
    ) -> None:
        self._evaluator = evaluator
        self._request = request
        self._reference_sampling = reference
        self._scores = frozenset(scores)
        self._kept = kept

    def validate(self, weights: Mapping[str, Tensor]) -> ValidationReport:
        """Samples with a generator's weights and measures the clips.

        Raises:
            CheckpointError: The weights are those of another network.
            ShapeError: The clips are too short or too small to be measured.
        """
        request = self._request
        clips = sample_clip_set(self._evaluator, request, weights=weights)
        wanted = request.twin(self._reference_sampling.seed)
        twin = sample_clip_set(self._evaluator, wanted, weights=weights).clips.features
        own = clips.clips.figures(request.captions, twin)
        partner = self._partner.clips.figures(request.captions, self._reference.features)

        of_sets = self._figures_of_sets(clips)
        figures = {name: value for name, (value, _) in of_sets.items()}
        influence_of = {name: found for name, (_, found) in of_sets.items() if found is not None}
        found = {
            name: jackknife_interval(figures[name], influence)
            for name, influence in influence_of.items()
        }
        means = compare_sets(own, partner, _RESAMPLING_SEED)
        for name, compared in (means | self._motions(clips)).items():
            found[name] = compared.value
            if compared.ratio is not None:
                found[f"{name}_ratio"] = compared.ratio
        for name in self._scores & found.keys() - influence_of.keys():
            influence_of[name] = _influence_of_mean(name, own, partner)
        return ValidationReport(
            figures | {name: interval.value for name, interval in found.items()},
            {name: (interval.low, interval.high) for name, interval in found.items()},
            {
                name: tuple(influence.tolist())
                for name, influence in influence_of.items()
                if name in self._scores
            },
            median(clips.seconds.tolist()),
            clips.shown,
            self._partner.shown,
        )

    @cached_property
    def _partner(self) -> ClipSet:
        """The teacher's clips from the generator's noise."""
        seed = self._request.sampling.seed
        sampling = replace(self._reference_sampling, seed=seed)
        return self._of_teacher(self._request.sampled(sampling))

    @cached_property
    def _reference(self) -> MeasuredClips:
        """The teacher's clips from other noise: features, and in an embedded world readings."""
        sampling, world = self._reference_sampling, self._request.world
        wanted = self._request.sampled(sampling).twin(sampling.seed)
        return self._of_teacher(replace(wanted, features_only=world is None)).clips

    @cached_property
    def _floor(self) -> tuple[float, Influence | None]:
        features = self._partner.clips.features
        return self._distance(features), self._distance_influence(features)

    def _distance(self, features: Features) -> float:
        return frechet_distance(*fit_gaussian(features), *fit_gaussian(self._reference.features))

    def _figures_of_sets(self, clips: ClipSet) -> dict[str, tuple[float, Influence | None]]:
        """Figures that are not means over clips, with the influence of each clip."""
        found = {
            "frechet": (
                self._distance(clips.clips.features),
                self._distance_influence(clips.clips.features),
            ),
            "frechet_floor": self._floor,
        }
        reading = clips.clips.reading
        if isinstance(reading, ClipReading):
            labels = labels_from_captions(self._request.captions)
            measured, asked = reading.speed_px_per_frame, labels.speed_px_per_frame
            found["speed_spearman"] = (
                spearman(measured, asked),
                self._influences(lambda kept: spearman(measured[kept], asked[kept])),
            )
        return found

    def _motions(self, clips: ClipSet) -> dict[str, Compared]:
        """Measures of what the clips do as a whole; none where they are not read, or too few."""
        readings = [each.reading for each in (clips.clips, self._reference, self._partner.clips)]
        read = [motion_of(reading) for reading in readings if reading is not None]
        if len(read) < len(readings) or len(self._request.captions) < _MIN_CLIPS:
            return {}
        own, reference, floor = read
        return compare_motions(own, reference, floor)

    def _distance_influence(self, features: Features) -> Influence | None:
        """Influences on the distance; a caption leaves both sets."""
        reference = self._reference.features
        return self._influences(
            lambda kept: frechet_distance(
                *fit_gaussian(features[kept]), *fit_gaussian(reference[kept])
            )
        )

    def _influences(self, figure: Callable[[Kept], float]) -> Influence | None:
        """Influences of the clips; None where there are too few to leave one out."""
        num_clips = len(self._request.captions)
        return influences(figure, num_clips) if num_clips >= _MIN_CLIPS else None

    def _of_teacher(self, request: ClipRequest) -> ClipSet:
        sample = partial(sample_clip_set, self._evaluator)
        return sample(request) if self._kept is None else self._kept.get(request, sample)


def _influence_of_mean(
    name: str, own: Mapping[str, Tensor], partner: Mapping[str, Tensor]
) -> Influence:
    """Influence of each clip on a mean, or, to first order, on a ratio of means."""
    if name in own:
        values = own[name].double()
        return values - values.mean()
    measure = name.removesuffix("_ratio")
    values, below = own[measure].double(), partner[measure].double()
    return (values - below * (values.mean() / below.mean())) / below.mean()
