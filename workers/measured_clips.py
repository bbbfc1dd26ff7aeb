"""Measured clips: a few numbers each, and no pixels.

    video -> features (for distances between sets), measures, and readings of an embedded world

A set is measured part by part, as it is sampled, so that a whole set of large videos never has to
be in memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sgmd_core.metrics.diversity import seed_diversity
from sgmd_core.metrics.frechet import Features, clip_features
from sgmd_core.worlds import WorldName
from sgmd_core.worlds.readings import WorldReading, read_clips, reading_answers
from sgmd_core.worlds.records import join_records
from workers.feature_network import FeatureExtractor
from workers.measures import measure_clip_figures


@dataclass(frozen=True, slots=True)
class MeasuredClips:
    """Numbers of a set of clips.

    Attributes:
        features: One row a clip, for distances between sets and between clips.
        measures: `measures.CLIP_MEASURES` by name, one value a clip; empty where not asked for.
        reading: What the clips show, where they are of an embedded world.
    """

    features: Features
    measures: Mapping[str, Tensor]
    reading: WorldReading | None

    def figures(
        self, captions: Sequence[str], other_seed: Features | None = None
    ) -> dict[str, Tensor]:
        """All figures that are means over clips, one value a clip.

        Args:
            captions: What the clips should show.
            other_seed: Features of clips of the same captions, made in the same way from other
                noise; with them there is `diversity`: how far the two clips of a caption are apart.
        """
        found = dict(self.measures)
        if self.reading is not None:
            found |= reading_answers(self.reading, captions)
        if other_seed is not None:
            found["diversity"] = seed_diversity(self.features, other_seed)
        return found


@dataclass(frozen=True, slots=True)
class Measurer:
    """Measures that are taken of clips.

    Attributes:
        fps: Frames a second.
        world: The world by whose rules the pixels are read, if any.
        features_only: Leaves all out but the features.
        extract: Gives the features.
    """

    fps: int
    world: WorldName | None
    features_only: bool = False
    extract: FeatureExtractor = clip_features

    def measure(self, video: Tensor) -> MeasuredClips:
        """Measures clips (b, 3, t, h, w) in [0, 1].

        Raises:
            ShapeError: The clips are too short or too small.
        """
        features = self.extract(video)
        if self.features_only:
            return MeasuredClips(features, {}, None)
        reading = read_clips(self.world, video) if self.world is not None else None
        return MeasuredClips(features, measure_clip_figures(video, self.fps), reading)


def concatenate_clips(parts: Sequence[MeasuredClips]) -> MeasuredClips:
    """One set of several parts, in their order."""
    readings = [part.reading for part in parts if part.reading is not None]
    return MeasuredClips(
        features=torch.cat([part.features for part in parts]),
        measures={
            name: torch.cat([part.measures[name] for part in parts]) for name in parts[0].measures
        },
        reading=join_records(readings) if readings else None,
    )
