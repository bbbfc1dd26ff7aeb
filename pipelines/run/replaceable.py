"""Folders that are written whole, and what must not be lost by it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from cluster.stores import opened_store, store_address
from sgmd_core.errors import ConfigError
from workers.models.configs import INDEX_FILE

_MAX_NAMED = 4


def require_replaceable(
    dst: str, setting: str, kept: Mapping[str, str], marks: Sequence[str] = (INDEX_FILE,)
) -> None:
    """Checks that a folder may be replaced whole: nothing but what is written there is in it.

    Args:
        dst: The folder.
        setting: Setting that gave it.
        kept: Addresses that must not lie in it, by setting.
        marks: Files by one of which an earlier result is known.

    Raises:
        ConfigError: One of them does, or it holds other files.
    """
    attempted = f"writing a model to {dst} ({setting}), which is replaced whole"
    remedy = f"Set {setting}=... to a folder of its own"
    path = _whole_path(dst)
    for name, address in kept.items():
        if _whole_path(address).is_relative_to(path):
            found = f"{name} ({address}) is in it"
            raise ConfigError(attempted, found, "a folder for the model alone", remedy)
    with opened_store(dst, f"looking at {dst} ({setting})") as (files, root):
        there = files.ls(root, detail=False) if files.isdir(root) else []
    names = sorted(PurePosixPath(each).name for each in there)
    if names and not set(names) & set(marks):
        found = f"a folder with {', '.join(names[:_MAX_NAMED])}, and no {' or '.join(marks)}"
        expected = "a free name, an empty folder, or an earlier model"
        raise ConfigError(attempted, found, expected, remedy)


def _whole_path(place: str) -> Path:
    return Path(place if store_address(place) else os.path.realpath(place))
