"""Digest the content of a model folder, and find weights that are not finite, in one pass.

Where a folder lies, how its weights are cut into shards and which program wrote them does not
count; every value does. Digests of large files are remembered in the user's cache under path,
inode, size and times: SHA-256 takes about 20 s for 28 GB on one core (1.5 GB/s measured), and the
disk may take longer.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cluster.files import cache_folder, write_whole
from sgmd_core.errors import ModelFolderError
from workers.models.configs import CONFIG_FILE, REMEDY, read_model_json
from workers.models.families import family_of
from workers.models.makers import combined_digest
from workers.models.weights import find_weights, lacks_weights

# Values of a tensor that are looked at together: bounds the memory that a large embedding takes.
_PART_VALUES = 2**24
# Smaller files are read faster than they could be looked up with care.
_MIN_REMEMBERED_BYTES = 2**26
# A file that has just been written may be written again within the resolution of its times.
_SETTLED_S = 2.0
# Keys of configurations that say who wrote the file, not what it holds.
_NOTES = ("_diffusers_version", "_name_or_path", "transformers_version")
_MAX_FILES_AT_ONCE = 4
# One may be a projection that begins at 0.
_MOST_ZERO = 1


@dataclass(frozen=True, slots=True)
class FileContent:
    """Content of one safetensors file.

    Attributes:
        tensors: Digest of dtype, shape and every value, by name.
        not_finite: Names of the tensors that hold a NaN or an infinity.
        zero: Names of the matrices of which every value is 0.
    """

    tensors: dict[str, str]
    not_finite: list[str]
    zero: list[str]


def fingerprint(folder: str | Path, components: Sequence[str] | None = None) -> str:
    """Name the content of some components of a folder, so that what they made can be recognised.

    Args:
        folder: Model folder.
        components: Names of sub-folders, for example ["vae"]; None takes all that decide what the
            model makes.

    Raises:
        ModelFolderError: The folder is of no known family, or a component has no files or weights
            that are not finite.
    """
    layout = family_of(folder).traits.layout
    names = layout.components if components is None else components
    digests = [component_digest(Path(folder) / name, layout.weights.get(name)) for name in names]
    return combined_digest(digests)


def model_digests(folder: str | Path) -> dict[str, str]:
    """Digest of each component that decides what the model makes.

    A text encoder or an autoencoder whose weights were left out has none.

    Raises:
        ModelFolderError: As `fingerprint`.
    """
    layout = family_of(folder).traits.layout
    return {
        name: component_digest(Path(folder) / name, layout.weights.get(name))
        for name in layout.components
        if name not in layout.dispensable or not lacks_weights(Path(folder) / name)
    }


def component_digest(part: Path, stem: str | None) -> str:
    """Digest of one component: 16 hexadecimal digits.

    Args:
        part: Folder of the component.
        stem: Name of its weight files without suffix; None: it has no weights.

    Raises:
        ModelFolderError: There are no files, or weights that are not finite or 0 throughout.
    """
    digest = hashlib.sha256(f"{part.name}\n".encode())
    if stem is not None:
        digest.update(_without_notes(part / CONFIG_FILE))
        for name, value in sorted(_tensors(part, stem).items()):
            digest.update(f"{name} {value}\n".encode())
        return digest.hexdigest()[:16]
    files = sorted(path for path in part.rglob("*") if path.is_file())
    if not files:
        raise ModelFolderError(
            f"looking for {part}", "no files there", "a diffusers folder", REMEDY
        )
    for path in files:
        digest.update(f"{path.relative_to(part)}\n".encode())
        is_config = path.name.endswith("config.json")
        digest.update(_without_notes(path) if is_config else path.read_bytes())
    return digest.hexdigest()[:16]


def read_content(file: Path) -> FileContent:
    """Read every value of a safetensors file, or remember what an earlier reading found.

    Raises:
        ModelFolderError: The file is missing or torn.
    """
    try:
        before = _stamp(file)
        remembered = _recall(file, before)
        if remembered is not None:
            return remembered
        content = _read(file)
        if before == _stamp(file):
            _remember(file, before, content)
        return content
    except (OSError, SafetensorError) as error:
        raise ModelFolderError(
            f"reading the weights of {file}",
            f"{type(error).__name__}: {error}",
            "a complete safetensors file",
            "Copy the file again",
        ) from error


def _tensors(part: Path, stem: str) -> dict[str, str]:
    files = find_weights(part, stem).used
    workers = min(_MAX_FILES_AT_ONCE, os.cpu_count() or 1, len(files))
    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            contents = dict(zip(files, pool.map(read_content, files), strict=True))
    else:
        contents = {file: read_content(file) for file in files}
    for file, content in contents.items():
        if content.not_finite:
            raise ModelFolderError(
                f"reading the weights of {file}",
                f"NaN or infinity in {len(content.not_finite)} tensors, first in "
                f"{content.not_finite[0]}",
                "finite weights",
                "Copy the file again, or go back to a state before the training diverged",
            )
        if len(content.zero) > _MOST_ZERO:
            raise ModelFolderError(
                f"reading the weights of {file}",
                f"{len(content.zero)} matrices in which every value is 0, first {content.zero[0]}",
                "weights of a trained network",
                "Copy the file again: a download that broke off leaves zeros where nothing came",
            )
    return {name: value for content in contents.values() for name, value in content.tensors.items()}


def _read(file: Path) -> FileContent:
    tensors: dict[str, str] = {}
    not_finite: list[str] = []
    zero: list[str] = []
    with safe_open(file, framework="pt") as weights:
        for name in sorted(weights.keys()):
            tensor = weights.get_tensor(name)
            tensors[name], is_finite = _digest(tensor)
            if not is_finite:
                not_finite.append(name)
            if tensor.ndim > 1 and tensor.numel() and not tensor.any():
                zero.append(name)
    return FileContent(tensors, not_finite, zero)


def _digest(tensor: Tensor) -> tuple[str, bool]:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    is_finite = True
    for part in tensor.contiguous().flatten().split(_PART_VALUES):
        if part.numel():
            digest.update(memoryview(part.view(torch.uint8).numpy()))  # pyright: ignore[reportArgumentType]
            is_finite = is_finite and bool(torch.isfinite(part).all())
    return digest.hexdigest(), is_finite


def _without_notes(path: Path) -> bytes:
    content = {key: value for key, value in read_model_json(path).items() if key not in _NOTES}
    return json.dumps(content, sort_keys=True).encode()


def _stamp(file: Path) -> list[int]:
    """Changes whenever a file does: times in nanoseconds, of content and of attributes."""
    facts = file.stat()
    return [facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]


def _entry(file: Path) -> Path:
    name = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:32]
    return cache_folder("weights") / f"{name}.json"


def _recall(file: Path, stamp: list[int]) -> FileContent | None:
    if stamp[1] < _MIN_REMEMBERED_BYTES:
        return None
    try:
        entry = json.loads(_entry(file).read_text(encoding="utf-8"))
        if entry["stamp"] == stamp:
            return FileContent(
                dict(entry["tensors"]), list(entry["not_finite"]), list(entry["zero"])
            )
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        pass  # Nothing that can be used: read the file.
    return None


def _remember(file: Path, stamp: list[int], content: FileContent) -> None:
    is_settled = time.time_ns() - max(stamp[2:]) > _SETTLED_S * 1e9
    if stamp[1] < _MIN_REMEMBERED_BYTES or not is_settled:
        return
    try:
        entry = _entry(file)
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_whole(entry, json.dumps({"stamp": stamp, **asdict(content)}).encode())
    except (OSError, RuntimeError):
        pass  # Costs time alone: the file is read again the next time.
