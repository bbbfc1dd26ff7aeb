"""Sets of sampled clips, reduced to what an evaluation needs, and remembered.

    captions -> clips -> features, readings, seconds, a few clips to show

Sampling a teacher in many steps is the dear part of an evaluation and gives the same clips every
time. So what was measured is kept, under a name that is made of everything it depends on: all
files of the model, the captions, the way of sampling, and the code that measures.
"""

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from pipelines.video import Pixels
from sgmd_core.metrics import frechet, shapes
from sgmd_core.metrics.frechet import Features, clip_features
from sgmd_core.metrics.shapes import ClipReading, measure_clips
from workers.evaluator import Evaluator, Sampling, to_pixels

_READING_FIELDS = tuple(ClipReading.__dataclass_fields__)
_CHUNK_BYTES = 2**22


@dataclass(frozen=True, slots=True)
class ClipSet:
    """What remains of a set of clips.

    Attributes:
        features: One row a clip, for distances between sets.
        reading: What the clips show, where they are of the world `shapes`.
        shown: Pixels of the clips that were asked for (frames, height, width, 3).
        seconds_per_clip: Median over the batches; from caption to pixels, loading excluded.
        remembered: Whether it was read from an earlier evaluation.
    """

    features: Features
    reading: ClipReading | None
    shown: tuple[Pixels, ...]
    seconds_per_clip: float
    remembered: bool = False


@dataclass(frozen=True, slots=True)
class ClipRequest:
    """What to sample.

    Attributes:
        captions: One clip each.
        sampling: Steps, guidance and seed.
        batch_size: Clips that are sampled side by side.
        reads_shapes: Whether to read colour, shape, direction and speed from the pixels.
        shown: Indices of the clips to keep.
    """

    captions: tuple[str, ...]
    sampling: Sampling
    batch_size: int
    reads_shapes: bool
    shown: tuple[int, ...]


def sample_clip_set(
    evaluator: Evaluator,
    request: ClipRequest,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ClipSet:
    """Samples and measures a set of clips.

    Args:
        evaluator: Samples with the weights it was built with.
        request: What to sample.
        on_progress: Called after every batch with (clips done, clips in all).
    """
    features: list[Features] = []
    readings: list[ClipReading] = []
    seconds: list[float] = []
    shown: dict[int, Pixels] = {}
    total, how = len(request.captions), request.sampling
    for start in range(0, total, request.batch_size):
        captions = request.captions[start : start + request.batch_size]
        began = time.perf_counter()
        video = evaluator.sample(captions, start, how.seed, how.num_steps, how.guidance_scale)
        seconds.append((time.perf_counter() - began) / len(captions))
        features.append(clip_features(video))
        if request.reads_shapes:
            readings.append(measure_clips(video))
        for index in request.shown:
            if start <= index < start + len(captions):
                shown[index] = to_pixels(video[index - start : index - start + 1])[0]
        on_progress(start + len(captions), total)
    return ClipSet(
        features=torch.cat(features),
        reading=_joined(readings) if readings else None,
        shown=tuple(shown[index] for index in request.shown),
        seconds_per_clip=statistics.median(seconds),
    )


def set_name(model_digest: str, request: ClipRequest, facts: Sequence[object]) -> str:
    """Names a set by all that decides its figures.

    Args:
        model_digest: Of the model folder's files.
        request: What is sampled.
        facts: Everything else that decides the clips, such as their size and the flow shift.
    """
    measure = [Path(str(module.__file__)).read_bytes() for module in (frechet, shapes)]
    everything = {
        "model": model_digest,
        "request": asdict(request),
        "facts": [str(fact) for fact in facts],
        "measure": [hashlib.sha256(source).hexdigest() for source in measure],
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:20]


def folder_digest(folder: Path) -> str:
    """Digest of the names and contents of all files of a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\n{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def save_clip_set(path: Path, clips: ClipSet) -> None:
    """Writes a set as one file, whole or not at all."""
    arrays = {
        "features": clips.features.numpy(),
        "shown": np.stack(clips.shown),
        "seconds_per_clip": np.array(clips.seconds_per_clip),
    }
    if clips.reading is not None:
        for name in _READING_FIELDS:
            arrays[f"reading.{name}"] = getattr(clips.reading, name).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".writing")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    temporary.replace(path)


def load_clip_set(path: Path) -> ClipSet:
    """Reads a set back."""
    with np.load(path, allow_pickle=False) as arrays:
        reading = None
        if f"reading.{_READING_FIELDS[0]}" in arrays:
            reading = ClipReading(
                **{name: torch.from_numpy(arrays[f"reading.{name}"]) for name in _READING_FIELDS}
            )
        return ClipSet(
            features=torch.from_numpy(arrays["features"]),
            reading=reading,
            shown=tuple(arrays["shown"]),
            seconds_per_clip=float(arrays["seconds_per_clip"]),
            remembered=True,
        )


def _joined(readings: Sequence[ClipReading]) -> ClipReading:
    return ClipReading(
        **{name: torch.cat([getattr(part, name) for part in readings]) for name in _READING_FIELDS}
    )
