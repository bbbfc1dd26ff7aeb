"""Load a denoiser so that a process reads and holds its own part of the weights alone.

    configuration -> network on the meta device -> `prepare` (shards it) -> empty memory for what is
    left to this process -> its slices of each tensor, straight from the files

No process ever holds the whole network beside its part, nor the weights in two types: rows are read
from the mapped file into their place and converted on the way. Buffers that no file holds, such as
tables of rotary positions, are computed by the constructor and never leave main memory as `meta`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn

from workers.models.architecture import CheckedComponent
from workers.models.configs import CONFIG_FILE, read_model_json
from workers.models.family import Denoiser
from workers.models.loading import require_all_loaded, require_finite_weights, unreadable
from workers.sharding import local_rows
from workers.tensor_files import RowReader

D = TypeVar("D", bound=Denoiser)
Slot = tuple[nn.Module, str]
"""A module and the name of its tensor, which stay when the module is wrapped or sharded."""


def load_sharded(
    network: Any,  # noqa: ANN401  (a class of diffusers)
    part: CheckedComponent,
    wrap: Callable[[Any], D],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    prepare: Callable[[D], object] | None = None,
) -> D:
    """Load a denoiser in evaluation mode, every tensor of it from the files.

    Args:
        network: Class of diffusers, made by `from_config`.
        part: The component, as `check_network` returns it.
        wrap: Makes the velocity model of the network.
        dtype: Of the weights, except for those that the class keeps in float32.
        device: Device of the weights.
        prepare: Called with the velocity model while its weights are on the meta device. It may
            change modules in place, put them into others, and shard them over the ranks.

    Raises:
        ModelFolderError: A file cannot be read, does not hold every tensor, or holds NaN.
    """
    return load_sharded_parts([network], [part], wrap, [dtype], device, prepare)


def load_sharded_parts(
    networks: Sequence[Any],
    parts: Sequence[CheckedComponent],
    wrap: Callable[..., D],
    dtypes: Sequence[torch.dtype],
    device: torch.device | str = "cpu",
    prepare: Callable[[D], object] | None = None,
) -> D:
    """Load a denoiser of several networks; see `load_sharded`.

    Args:
        networks: Class of each, made by `from_config`.
        parts: The components.
        wrap: Makes the velocity model of the networks, in the order of `parts`.
        dtypes: Of the weights of each, except for those that a class keeps in float32.
        device: Device of the weights.
        prepare: Called once, with the whole velocity model.

    Raises:
        ModelFolderError: As `load_sharded`.
    """
    part = parts[0]
    try:
        bare: list[nn.Module] = []
        for network, part, dtype in zip(networks, parts, dtypes, strict=True):
            bare.append(_on_meta(network, part, dtype))
        slots = [dict(_slots(each)) for each in bare]
        denoiser = wrap(*bare).eval()
        if prepare is not None:
            prepare(denoiser)
        _allocate(denoiser, torch.device(device))
        for part, own in zip(parts, slots, strict=True):
            missing = set(own) - _fill(part, own)
            require_all_loaded(part, {"missing_keys": missing})
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise unreadable(part.path, error) from error
    return denoiser


def _on_meta(network: Any, part: CheckedComponent, dtype: torch.dtype) -> nn.Module:  # noqa: ANN401
    """Build the network with parameters on the meta device and buffers in main memory."""
    before = torch.get_default_dtype()
    # As `from_pretrained` does it: a buffer has the type that weights have by default.
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights(include_buffers=False):
            made: nn.Module = network.from_config(read_model_json(part.path / CONFIG_FILE))
    finally:
        torch.set_default_dtype(before)
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    for name, value in made.named_parameters():
        own = torch.float32 if kept.intersection(name.split(".")) else dtype
        value.data = value.data.to(own)
    return made


def _slots(network: nn.Module) -> Iterator[tuple[str, Slot]]:
    """Places of the tensors that files hold, by their names there."""
    stored = network.state_dict(keep_vars=True)
    modules = dict(network.named_modules())
    for name in stored:
        owner, _, own = name.rpartition(".")
        yield name, (modules[owner], own)


def _allocate(network: nn.Module, device: torch.device) -> None:
    """Give memory to this process's part of each parameter, and move buffers beside it."""
    # `to_empty` would lose the buffers; FSDP2 replaces `_apply` as it does for `to_empty`.
    network._apply(  # pyright: ignore[reportPrivateUsage]
        lambda value: torch.empty_like(value, device=device) if value.is_meta else value.to(device)
    )


@torch.no_grad()
def _fill(part: CheckedComponent, slots: dict[str, Slot]) -> set[str]:
    """Read this process's rows of every tensor; returns the names that were found."""
    found: set[str] = set()
    for file in part.weights.used:
        with safe_open(file, framework="pt") as weights:
            names = [name for name in weights.keys() if name in slots]  # noqa: SIM118
        reader = RowReader(file)
        for name in names:
            module, own = slots[name]
            target = getattr(module, own).detach()
            local, first = local_rows(target)
            reader.read(name, local, first)
            require_finite_weights(part, name, local)
            found.add(name)
    return found
