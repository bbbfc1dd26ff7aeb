"""Sets of sampled clips, reduced to what an evaluation needs, and remembered.

    captions -> clips -> features, readings, seconds, a few clips to show

Sampling a teacher in many steps is the dear part of an evaluation and gives the same clips every
time. So what was measured is kept, under a name that is made of everything it depends on: all
values of the model, the captions, the way of sampling, and the code that measures.
"""

import hashlib
import json
import logging
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.files import whole_file
from pipelines.media.video import Pixels
from sgmd_core.metrics import appearance, frechet, motion
from sgmd_core.metrics.frechet import clip_features
from sgmd_core.worlds import shapes
from sgmd_core.worlds.shapes import ClipReading
from workers import measures, optical_flow
from workers.evaluator import Evaluator, Sampling, to_pixels
from workers.feature_network import FeatureExtractor
from workers.measured_clips import READING_FIELDS, MeasuredClips, Measurer, concatenate_clips

_MEASURING = (frechet, shapes, motion, appearance, measures, optical_flow)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClipSet:
    """A set of clips, measured.

    Attributes:
        clips: What was measured of each.
        shown: Pixels of the clips that were asked for (frames, height, width, 3).
        seconds: One entry a batch: seconds a clip, from caption to pixels, loading excluded.
        remembered: Whether it was read from an earlier evaluation.
    """

    clips: MeasuredClips
    shown: tuple[Pixels, ...]
    seconds: Tensor
    remembered: bool = False


@dataclass(frozen=True, slots=True)
class ClipRequest:
    """A set of clips to sample.

    Attributes:
        captions: One clip each.
        sampling: Steps, guidance and seed.
        batch_size: Clips that are sampled side by side.
        fps: Frames a second.
        reads_shapes: Whether to read colour, shape, direction and speed from the pixels.
        shown: Indices of the clips to keep.
        features_only: Leaves out all other measures.
    """

    captions: tuple[str, ...]
    sampling: Sampling
    batch_size: int
    fps: int
    reads_shapes: bool
    shown: tuple[int, ...]
    features_only: bool = False


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
        request: What to sample.
        on_progress: Called after every batch with (clips done, clips in all).
        extract: Gives the features.
        weights: Parameters by name to sample with instead.
    """
    measurer = Measurer(request.fps, request.reads_shapes, request.features_only, extract)
    parts: list[MeasuredClips] = []
    seconds: list[float] = []
    shown: dict[int, Pixels] = {}
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


def set_name(model_digest: str, request: ClipRequest, facts: Sequence[object]) -> str:
    """Names a set by all that decides its figures.

    Args:
        model_digest: Of the content of the model folder.
        request: What is sampled.
        facts: Everything else that decides the clips and their features, such as their size, the
            flow shift, and the network that describes them.
    """
    measure = [Path(str(module.__file__)).read_bytes() for module in _MEASURING]
    everything = {
        "model": model_digest,
        "request": asdict(request),
        "facts": [str(fact) for fact in facts],
        "measure": [hashlib.sha256(source).hexdigest() for source in measure],
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:20]


def file_digest(path: Path) -> str:
    """Digest of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_clip_set(path: Path, clips: ClipSet) -> None:
    """Writes a set as one file, whole or not at all."""
    measured = clips.clips
    arrays = {
        "features": measured.features.numpy(),
        "seconds": clips.seconds.numpy(),
        **{f"measure.{name}": values.numpy() for name, values in measured.measures.items()},
        **{f"shown.{index:03d}": pixels for index, pixels in enumerate(clips.shown)},
    }
    if measured.reading is not None:
        for name in READING_FIELDS:
            arrays[f"reading.{name}"] = getattr(measured.reading, name).numpy()
    # Evaluations that share a cache may write the same set at the same time.
    with whole_file(path) as draft, draft.open("wb") as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]


def load_clip_set(path: Path) -> ClipSet | None:
    """Reads a set back; None where there is none, or where the file is broken, with a warning."""
    if not path.exists():
        return None
    try:
        return _read(path)
    except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile, zlib.error) as error:
        _log.warning("%s is broken (%s): its clips are sampled again", path, error)
        return None


def _read(path: Path) -> ClipSet:
    with np.load(path, allow_pickle=False) as arrays:
        reading = _group(arrays, "reading.")
        return ClipSet(
            clips=MeasuredClips(
                features=torch.from_numpy(arrays["features"]),
                measures=_group(arrays, "measure."),
                reading=ClipReading(**reading) if reading else None,
            ),
            shown=tuple(arrays[name] for name in sorted(arrays) if name.startswith("shown.")),
            seconds=torch.from_numpy(arrays["seconds"]),
            remembered=True,
        )


def _group(arrays: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): torch.from_numpy(arrays[name])
        for name in arrays
        if name.startswith(prefix)
    }
