"""Frozen base networks of a process: one for all roles that use the same folder and type.

    shared_base(folder, type)  ->  base          read once, kept while a role has a view of it
    joined_bases(high, low)    ->  base          of two experts, each a base that others may share
    view_of(base)              ->  view          modules of its own, the base's tensors

A view keeps its base alive, and the registry does not: with the last role of a process its base is
freed.
"""

import copy
from pathlib import Path
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn

from sgmd_core.phases import Expert
from workers.models.experts import ExpertDenoiser
from workers.models.families import family_of_expert
from workers.models.family import Denoiser

_KEPT_BY = "_base"

_bases: "WeakValueDictionary[tuple[object, ...], Denoiser]" = WeakValueDictionary()
_parts: "WeakKeyDictionary[Denoiser, tuple[Denoiser, ...]]" = WeakKeyDictionary()
"""Bases that another one consists of, which it keeps alive."""


def shared_base(
    folder: Path, dtype: torch.dtype, device: torch.device, expert: Expert | None = None
) -> Denoiser:
    """The frozen denoiser of a folder, read if no role of this process has it yet.

    Args:
        folder: Model folder.
        dtype: Type of its weights.
        device: Where they are.
        expert: The one of two experts that it is; None: all of the model.

    Raises:
        ModelFolderError: The model folder is missing, torn or of another family.
    """
    family = family_of_expert(folder, expert)
    parts = family.traits.layout.denoisers
    files = sorted(file for part in parts for file in (folder / part).iterdir())
    stats = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    key = (str(folder.resolve()), stats, dtype, str(device), expert)
    base = _bases.get(key)
    if base is None:
        base = family.load_denoiser(folder, dtype, device=device).eval().requires_grad_(False)
        _bases[key] = base
    return base


def joined_bases(high: Denoiser, low: Denoiser) -> ExpertDenoiser:
    """The frozen denoiser of two experts, each of which is a shared base of its own."""
    assert isinstance(high, ExpertDenoiser)
    assert isinstance(low, ExpertDenoiser)
    joined = ExpertDenoiser(high.high, low.low, high.boundary).eval().requires_grad_(False)
    _parts[joined] = (high, low)
    return joined


def view_of(base: Denoiser) -> Denoiser:
    """A network of the same tensors in modules of its own, to be prepared as a role wants it."""
    tensors = (*base.parameters(), *base.buffers())
    # To a copy that has seen them, these tensors are their own copies.
    view = copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})
    # Past `nn.Module`, which would make it a part of the view.
    object.__setattr__(view, _KEPT_BY, base)
    return view


def base_parameters(view: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the base that a view was made of, by their names in the base.

    Of a part that the view never trains there are none: it is written as its folder has it.
    """
    base: Denoiser = view.__dict__[_KEPT_BY]
    frozen = view.frozen_part if isinstance(view, Denoiser) else ""
    return {
        name: value
        for name, value in base.named_parameters()
        if not frozen or not name.startswith(frozen)
    }
