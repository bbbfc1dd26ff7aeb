"""Copy the components of a model folder that training has not changed."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from workers.models.folder import FolderLayout
from workers.models.weights import find_weights


def copy_components(base: Path, dst: Path, layout: FolderLayout, names: Sequence[str]) -> None:
    """Copy components of a base folder, without weight files that nothing loads.

    Args:
        base: Model folder.
        dst: New folder.
        layout: Components of both.
        names: Components to copy.

    Raises:
        ModelFolderError: A component has no weight files.
    """
    for name in names:
        stem = layout.weights.get(name)
        # Pickles among them have no place in an export.
        unused = find_weights(base / name, stem).unused if stem is not None else ()
        left_out = [path.name for path in unused]
        shutil.copytree(base / name, dst / name, ignore=lambda _, __, names=left_out: names)
