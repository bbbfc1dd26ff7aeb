"""Samples a set of clips and measures it: one request, one sampler, for all who compare sets.

    ClipRequest -> clips, part by part -> features, measures, readings, seconds, a few to show

Validation, `sgmd evaluate` and `sgmd study` sample by it, so a figure means the same in all.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sgmd_core.metrics.frechet import clip_features
from sgmd_core.worlds import WorldName
from workers.evaluator import Evaluator, to_pixels
from workers.feature_network import FeatureExtractor
from workers.measured_clips import MeasuredClips, Measurer, concatenate_clips
from workers.samplings import Sampling


@dataclass(frozen=True, slots=True)
class ClipRequest:
    """A set of clips to sample.

    Attributes:
        captions: One clip each.
        sampling: Steps, guidance and seed.
        batch_size: Clips that are sampled side by side.
        fps: Frames a second.
        world: The embedded world that the captions are of, whose pixels are read, if any.
        shown: Indices of the clips whose pixels are kept.
        features_only: True to leave out all other measures.
    """

    captions: tuple[str, ...]
    sampling: Sampling
    batch_size: int
    fps: int
    world: WorldName | None
    shown: tuple[int, ...] = ()
    features_only: bool = False

    def sampled(self, sampling: Sampling) -> "ClipRequest":
        """Returns the request of the same captions, sampled in another way."""
        return replace(self, sampling=sampling)

    def twin(self, seed: int) -> "ClipRequest":
        """Returns the request of the same clips from another seed, of which features are wanted.

        Clip by clip, the distance between the two is their `diversity`.
        """
        sampling = replace(self.sampling, seed=seed)
        return replace(self, sampling=sampling, shown=(), features_only=True)


@dataclass(frozen=True, slots=True)
class ClipSet:
    """A set of clips, measured.

    Attributes:
        clips: Numbers of each clip.
        shown: Pixels of the requested clips (frames, height, width, 3).
        seconds: One entry a batch: seconds a clip, from caption to pixels, loading excluded.
        remembered: True if it was read from an earlier evaluation.
    """

    clips: MeasuredClips
    shown: tuple[NDArray[np.uint8], ...]
    seconds: Tensor
    remembered: bool = False


def sample_clip_set(
    evaluator: Evaluator,
    request: ClipRequest,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    extract: FeatureExtractor = clip_features,
    weights: Mapping[str, Tensor] | None = None,
) -> ClipSet:
    """Samples and measures a set of clips.

    Args:
        evaluator: Samples with the weights it was built with.
        request: The set.
        on_progress: Called after every batch with (clips done, clips in all).
        extract: Computes the features.
        weights: Parameters by name to sample with instead.

    Raises:
        CheckpointError: The weights are those of another network.
        ShapeError: The clips are too short or too small to be measured.
    """
    measurer = Measurer(request.fps, request.world, request.features_only, extract)
    parts: list[MeasuredClips] = []
    seconds: list[float] = []
    shown: dict[int, NDArray[np.uint8]] = {}
    total, how = len(request.captions), request.sampling
    for start in range(0, total, request.batch_size):
        captions = request.captions[start : start + request.batch_size]
        began = time.perf_counter()
        video = evaluator.sample(
            captions, start, how.seed, how.num_steps, how.guidance_scale, weights
        )
        seconds.append((time.perf_counter() - began) / len(captions))
        parts.append(measurer.measure(video))
        for index in request.shown:
            if start <= index < start + len(captions):
                shown[index] = to_pixels(video[index - start : index - start + 1])[0]
        on_progress(start + len(captions), total)
    return ClipSet(
        clips=concatenate_clips(parts),
        shown=tuple(shown[index] for index in request.shown),
        seconds=torch.tensor(seconds),
    )
