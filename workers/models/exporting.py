"""Write what training has not changed, and narrow what it has.

copy_components     text encoder, autoencoder, tokenizer: linked or copied from the base folder
place_scheduler     a scheduler of our own, or the base's
narrowed            weights in the type of a file, except for those that stay in float32
kept_in_fp32        those, as a network's own classes name them
"""

import errno
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from workers.models.configs import CONFIG_FILE
from workers.models.folder import FolderLayout
from workers.models.weights import find_weights, lacks_weights

SCHEDULER = "scheduler"
"""Component that steps over the noise levels."""

Components = Literal["link", "copy", "none"]
DTYPES: Mapping[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
"""Types of weights in exports, by the words of `ExportSettings`."""

# Another disk, or one without hard links; the kernel may also forbid links to foreign files.
_NO_HARD_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EMLINK)


def copy_components(
    base: Path,
    dst: Path,
    layout: FolderLayout,
    names: Sequence[str],
    components: Components = "copy",
    new_names: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Copy components of a base folder, without weight files that nothing loads.

    Args:
        base: Model folder.
        dst: New folder.
        layout: Components of both.
        names: Components to copy.
        components: `link` makes hard links of the weight files, or symbolic links where the base
            lies on another disk, and copies the small files; `none` leaves components with weights
            out. A text encoder that the base lacks is left out, and of an autoencoder without
            weights its configuration is copied.
        new_names: Names of components in the new folder, where they change.

    Raises:
        ModelFolderError: A component has no weight files.
    """
    for name in names:
        stem = layout.weights.get(name)
        if stem is not None and components == "none":
            continue
        if name in layout.dispensable and lacks_weights(base / name):
            if name == layout.autoencoder:
                copy_config(base / name, dst / new_names.get(name, name))
            continue
        # Pickles among them have no place in an export.
        unused = find_weights(base / name, stem).unused if stem is not None else ()
        left_out = [path.name for path in unused]
        copy = _link if stem is not None and components == "link" else shutil.copy2
        shutil.copytree(
            base / name,
            dst / new_names.get(name, name),
            ignore=lambda _, __, names=left_out: names,
            copy_function=copy,
        )


def copy_config(part: Path, dst: Path) -> None:
    """Copy the configuration of an autoencoder alone, if it has one: it sizes clips."""
    if (part / CONFIG_FILE).is_file() and not dst.exists():
        dst.mkdir(parents=True)
        shutil.copy2(part / CONFIG_FILE, dst / CONFIG_FILE)


def place_scheduler(
    base: Path,
    dst: Path,
    layout: FolderLayout,
    own: Any | None,  # noqa: ANN401  (a class for each model)
) -> dict[str, list[str]]:
    """Write a scheduler of diffusers, or copy that of the base folder.

    Args:
        base: Model folder.
        dst: New folder.
        layout: Components of both.
        own: The scheduler; None: the base's.

    Returns:
        What changes in the folder's index.
    """
    if own is None:
        copy_components(base, dst, layout, (SCHEDULER,))
        return {}
    own.save_pretrained(dst / SCHEDULER)
    return {SCHEDULER: ["diffusers", type(own).__name__]}


def narrowed(
    weights: Mapping[str, Tensor], dtype: torch.dtype, kept: Collection[str] = ()
) -> dict[str, Tensor]:
    """Weights in a narrower type.

    Args:
        weights: By name.
        dtype: Type of the result.
        kept: Parts of names, between dots, of weights that stay as they are.
    """
    return {name: narrowed_one(name, value, dtype, kept) for name, value in weights.items()}


def narrowed_one(name: str, value: Tensor, dtype: torch.dtype, kept: Collection[str]) -> Tensor:
    """One of these weights; arguments as `narrowed`."""
    return value if set(kept).intersection(name.split(".")) else value.to(dtype)


def kept_in_fp32(network: nn.Module) -> frozenset[str]:
    """Parts of names, between dots, of weights that diffusers keeps in float32 in any network."""
    return frozenset(
        part
        for module in network.modules()
        for part in getattr(module, "_keep_in_fp32_modules", None) or ()
    )


def _link(source: str, target: str) -> str:
    """Links weights, and copies every other file: `copytree`'s copy function."""
    if Path(source).suffix != ".safetensors":
        return shutil.copy2(source, target)
    # Of a link, what it leads to: the hub's cache keeps links to files elsewhere.
    real = Path(source).resolve()
    try:
        os.link(real, target)
    except OSError as error:
        if error.errno not in _NO_HARD_LINK:
            raise
        Path(target).symlink_to(real)
    return target
