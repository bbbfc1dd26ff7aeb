"""Keeps measured sets of clips in files.

Sampling a teacher in many steps is the expensive part of validations and evaluations and gives the
same clips every time. So what was measured is kept, under a name that is made of everything it
depends on: all values of the model, the captions, the way of sampling, and the code that measures.
"""

import hashlib
import io
import json
import logging
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.files import whole_file
from cluster.folders import files_at
from cluster.lease import hold_if_free
from cluster.storage_errors import storage_errors
from cluster.stores import open_store, store_address
from sgmd_core.errors import SgmdError
from sgmd_core.metrics import appearance, distributions, frechet, motion
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.worlds import open_shapes, shapes
from sgmd_core.worlds.readings import READINGS, WorldReading
from workers import measure, measures, optical_flow
from workers.clip_sets import ClipRequest, ClipSet
from workers.clip_settings import VideoSettings
from workers.measured_clips import MeasuredClips
from workers.settings import ModelSettings

_AGAIN_S = 1.0
# Whoever samples holds a lease that ends with its process, so only one that hangs is given up; a
# large teacher may take hours, and those that wait would all begin at once.
_GIVE_UP_S = 24 * 3600.0
_MEASURING = (
    frechet,
    shapes,
    open_shapes,
    motion,
    distributions,
    appearance,
    measure,
    measures,
    optical_flow,
)
_log = logging.getLogger(__name__)


def set_name(model_digest: str, request: ClipRequest, facts: Sequence[object]) -> str:
    """Names a set by all that decides its figures.

    Args:
        model_digest: Of the content of the model folder.
        request: What is sampled.
        facts: Everything else that decides the clips and their features, such as their size, the
            flow shift, and the network that describes them.
    """
    own = [Path(str(module.__file__)) for module in _MEASURING]
    # Measures of other packages: the version of a package stands for its other modules.
    functions = measures.CLIP_MEASURES.values()
    others = {path for each in functions if (path := measures.measure_source(each)) is not None}
    sources = [path.read_bytes() for path in (*own, *sorted(others.difference(own)))]
    everything = {
        "model": model_digest,
        "request": asdict(request),
        "facts": [str(fact) for fact in facts],
        "measure": [hashlib.sha256(source).hexdigest() for source in sources],
        "measures": sorted(measures.CLIP_MEASURES),
        "packages": sorted(measures.OUTSIDE_ORIGINS),
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:20]


def clip_facts(
    model: ModelSettings, video: VideoSettings, schedule: FlowMatchSchedule
) -> tuple[object, ...]:
    """Settings that decide a model's clips besides its files and the way of sampling."""
    levels = (schedule.shift, schedule.steps, schedule.warp_steps)
    renoise = ("renoise",) if schedule.renoise else ()
    return (
        replace(model, folder=""),
        video,
        levels if schedule.steps else schedule.shift,
        *renoise,
    )


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
        prefix = _prefix(type(measured.reading))
        for each in fields(measured.reading):
            arrays[f"{prefix}{each.name}"] = getattr(measured.reading, each.name).numpy()
    # Evaluations that share a cache may write the same set at the same time.
    with whole_file(path) as draft, draft.open("wb") as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]


def load_clip_set(
    path: Path | str, warn: Callable[[str], None] = lambda words: _log.warning("%s", words)
) -> ClipSet | None:
    """Reads a set back; None where there is none, or where the file is broken, with a warning.

    Args:
        path: A path or an address.
        warn: Takes the warning.
    """
    try:
        return _read(_content(path))
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile, zlib.error) as error:
        warn(f"{path} is broken ({error}): its clips are sampled again")
        return None


class _Warnings:
    """Warnings of one request, which tries again and again: one of each kind."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def warn(self, kind: str, words: object) -> None:
        """Logs the first warning of a kind."""
        if kind not in self._told:
            self._told.add(kind)
            _log.warning("%s: %s", kind, words)


def _content(path: Path | str) -> io.BytesIO:
    if not (address := store_address(path)):
        return io.BytesIO(Path(path).read_bytes())
    files: Any
    files, inside = open_store(address)
    return io.BytesIO(files.cat_file(inside))


def _read(content: io.BytesIO) -> ClipSet:
    with np.load(content, allow_pickle=False) as arrays:
        readings = {kind: _group(arrays, _prefix(kind)) for kind in READINGS.values()}
        return ClipSet(
            clips=MeasuredClips(
                features=torch.from_numpy(arrays["features"]),
                measures=_group(arrays, "measure."),
                reading=next((kind(**kept) for kind, kept in readings.items() if kept), None),
            ),
            shown=tuple(arrays[name] for name in sorted(arrays) if name.startswith("shown.")),
            seconds=torch.from_numpy(arrays["seconds"]),
            remembered=True,
        )


def _prefix(kind: type[WorldReading]) -> str:
    return f"{kind.__name__}."


def _group(arrays: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): torch.from_numpy(arrays[name])
        for name in arrays
        if name.startswith(prefix)
    }


@dataclass(frozen=True, slots=True)
class KeptClips:
    """Measured sets of a model's clips in a folder, which runs may share.

    Attributes:
        folder: A path or an address; it is made with the first set.
        digest: Digest of the model's content.
        facts: As in `set_name`.
        patience_s: Seconds for which an object store that fails is tried again.
    """

    folder: str
    digest: str
    facts: tuple[object, ...]
    patience_s: float = 0.0

    def get(self, request: ClipRequest, sample: Callable[[ClipRequest], ClipSet]) -> ClipSet:
        """Returns a set, sampled unless it is kept.

        One that another process is sampling is waited for, with one warning that names the process:
        whoever samples holds a lease, which ends with it. A folder that cannot be read or written
        costs a warning and the time to sample again.

        Args:
            request: The set.
            sample: Makes it.
        """
        name = f"{set_name(self.digest, request, self.facts)}.npz"
        deadline_s = time.monotonic() + _GIVE_UP_S
        warnings = _Warnings()
        while (kept := self._load(name, warnings)) is None:
            with ExitStack() as stack:
                if self._is_mine(name, stack, warnings, deadline_s):
                    # Another process may have brought them just before it released the lease.
                    kept = self._load(name, warnings)
                    return kept if kept is not None else self._make(name, sample(request))
            time.sleep(_AGAIN_S)
        return kept

    def _is_mine(self, name: str, stack: ExitStack, warnings: _Warnings, deadline_s: float) -> bool:
        """Returns True if nobody else samples a set, nobody can say, or it takes too long."""
        lease = hold_if_free(f"{self.folder}/{name}.lease", "sampling a teacher's clips")
        try:
            holder = stack.enter_context(lease)
        except SgmdError as error:
            warnings.warn("other processes may sample the same clips", error)
            return True
        if holder and time.monotonic() < deadline_s:
            warnings.warn("the clips that another process samples are waited for", holder)
            return False
        if holder:
            warnings.warn("the clips that another process samples are waited for no longer", holder)
        return True

    def _load(self, name: str, warnings: _Warnings) -> ClipSet | None:
        place = f"{self.folder}/{name}"
        try:
            with storage_errors(f"reading {place}"):
                return load_clip_set(place, partial(warnings.warn, "kept clips are of no use"))
        except SgmdError as error:
            warnings.warn("the clips are sampled again", error)
            return None

    def _make(self, name: str, clips: ClipSet) -> ClipSet:
        """Keeps a set that has been sampled; returns it."""
        try:
            with (
                storage_errors(f"writing {self.folder}/{name}"),
                files_at(self.folder, self.patience_s) as folder,
            ):
                save_clip_set(folder / name, clips)
        except SgmdError as error:
            _log.warning("the clips will be sampled again: %s", error)
        return clips
