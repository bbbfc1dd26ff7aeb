"""Digests of the weight files of a model folder, kept in its `sgmd.json`.

    write_model_settings(draft, settings)   sgmd.json: settings, and SHA-256 of every weight file
    require_same_weights(folder)               reads every byte again and compares

A folder that another program has written has no digests, and neither has one of an older version:
both load. The check streams the files and keeps nothing: it costs about 1200 MB/s a core, up to
four files at once, where the disk can keep up (14 GB, a Wan of 1.3B with its text encoder: 12 s on
one core).
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from cluster.files import sha256_of, write_whole
from sgmd_core.errors import ModelFolderError
from workers.models.configs import read_model_json

SETTINGS_FILE = "sgmd.json"
_DIGESTS = "sha256"
_WEIGHTS = "*.safetensors"
_MAX_FILES_AT_ONCE = 4
_REMEDY = (
    "Copy the folder again, or export it again; if the weights were changed on purpose, delete "
    f'"{_DIGESTS}" from {SETTINGS_FILE}'
)
_log = logging.getLogger(__name__)


def write_model_settings(folder: str | Path, settings: Mapping[str, Any]) -> None:
    """Write `sgmd.json`: settings, and the digest of every weight file below the folder.

    Args:
        folder: Model folder, complete except for this file; the draft of a folder that is exchanged
            whole, so that weights and digests never come apart.
        settings: JSON object that says how the folder is sampled.
    """
    root = Path(folder)
    names = sorted(str(path.relative_to(root)) for path in root.rglob(_WEIGHTS))
    content = {**settings, _DIGESTS: dict(zip(names, _digests(root, names), strict=True))}
    write_whole(root / SETTINGS_FILE, (json.dumps(content, indent=2) + "\n").encode())


def require_same_weights(folder: str | Path) -> None:
    """Compare the weight files of a folder with the digests that were written with them.

    Raises:
        ModelFolderError: A file is missing or has other bytes, or `sgmd.json` cannot be used; names
            the file.
    """
    root = Path(folder)
    settings = root / SETTINGS_FILE
    if not os.path.lexists(settings):
        return
    content = read_model_json(settings)
    if _DIGESTS not in content:
        _say_unchecked(str(root.absolute()))
        return
    stored = content[_DIGESTS]
    if not isinstance(stored, dict) or not all(_is_entry(*item) for item in stored.items()):
        raise ModelFolderError(
            f"reading {settings}",
            f"{_DIGESTS} is not a table of weight files of this folder and their digests",
            "what `sgmd` wrote",
            _REMEDY,
        )
    names = sorted(stored)
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise _changed(root, f"{missing[0]} is missing")
    try:
        now = _digests(root, names)
    except OSError as error:
        raise _changed(root, f"a file cannot be read ({error})") from error
    other = [
        f"{name} has SHA-256 {digest[:16]}..., and was written with {stored[name][:16]}..."
        for name, digest in zip(names, now, strict=True)
        if digest != stored[name]
    ]
    if other:
        raise _changed(root, "; ".join(other))


@cache
def _say_unchecked(folder: str) -> None:
    """Says once a folder that its weights could not be checked."""
    _log.warning(
        "%s was written by an older version, without digests: its weights are not checked for "
        "damage",
        folder,
    )


def _is_entry(name: object, digest: object) -> bool:
    """Returns True for a relative path that stays in the folder, and hexadecimal digits."""
    if not isinstance(name, str) or not isinstance(digest, str):
        return False
    path = Path(name)
    return path.match(_WEIGHTS) and not path.is_absolute() and ".." not in path.parts


def _digests(root: Path, names: Sequence[str]) -> list[str]:
    with ThreadPoolExecutor(min(_MAX_FILES_AT_ONCE, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda name: sha256_of(root / name), names))


def _changed(root: Path, found: str) -> ModelFolderError:
    return ModelFolderError(
        f"checking the weights of {root}", found, "the bytes that were exported", _REMEDY
    )
