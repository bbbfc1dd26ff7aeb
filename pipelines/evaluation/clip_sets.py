"""Keeps measured sets of clips in files.

Sampling a teacher in many steps is the expensive part of an evaluation and gives the same clips
every time. So what was measured is kept, under a name that is made of everything it depends on: all
values of the model, the captions, the way of sampling, and the code that measures.
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.files import whole_file
from sgmd_core.metrics import appearance, frechet, motion
from sgmd_core.worlds import shapes
from sgmd_core.worlds.shapes import ClipReading
from workers import measures, optical_flow
from workers.clip_sets import ClipRequest, ClipSet
from workers.measured_clips import READING_FIELDS, MeasuredClips

_MEASURING = (frechet, shapes, motion, appearance, measures, optical_flow)
_log = logging.getLogger(__name__)


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
