"""Tensors that go from process to process past the object store: Ray Direct Transport.

    object store    numpy arrays in shared memory, sent by the raylets between machines
    direct          the reference carries a description; the receiver fetches the tensors from where
                    they are, GPU to GPU

A group knows by which transport the results of each method go. With NIXL every receiver reads
for itself and no communicator is needed; that is the one to use. All of it is alpha in Ray, hence
off by default. Ray's limits: tensors of one result lie on one kind of device and are contiguous,
one result a call, and references go as arguments of their own.

Results that the controller fetches must not go this way.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from cluster.errors import TransferError
from cluster.transfer import parts_of, require_constants

NIXL = "nixl"


@dataclass(frozen=True, slots=True)
class Direct:
    """A value that bypasses the object store.

    Attributes:
        transport: Ray's name of the way.
        methods: Methods whose results hold tensors for other groups.
    """

    transport: str
    methods: frozenset[str]


def require_transport(transport: str, who: str) -> None:
    """Refuses a transport that cannot work in this process.

    Args:
        transport: Ray's name of it.
        who: Group and rank of the process, for the error.

    Raises:
        TransferError: Says what is missing.
    """
    if transport != NIXL:
        return
    if find_spec("nixl") is None:
        raise _refused(who, "the package nixl is not installed there")
    from ray.experimental.rdt.util import get_tensor_transport_manager

    try:
        manager: Any = get_tensor_transport_manager(transport.upper())
        manager.get_nixl_agent()
    except Exception as error:
        raise _refused(who, f"NIXL does not start: {type(error).__name__}: {error}") from error


def ready_to_hand_over(value: object, where: str = "value") -> Any:  # noqa: ANN401 - mirrors its input
    """The value with tensors as a direct transport can read them.

    Args:
        value: Plain values and tensors in tuples, lists, dicts and dataclasses.
        where: Name of the value, for errors.

    Returns:
        The same tree; tensors contiguous and on one device, a GPU if any of them is on one.

    Raises:
        TransferError: A tensor is part of an autograd graph.
    """
    devices = {tensor.device for tensor in _tensors(value)}
    gpus = sorted((one for one in devices if one.type != "cpu"), key=str)
    return _placed(value, gpus[0] if gpus else torch.device("cpu"), where)


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for _, part in parts_of(value) for tensor in _tensors(part)]


def _placed(value: Any, device: torch.device, where: str) -> Any:  # noqa: ANN401
    if isinstance(value, Tensor):
        require_constants(value, where)
        return value.to(device).contiguous()
    parts = [_placed(part, device, where + name) for name, part in parts_of(value)]
    if type(value) is tuple or type(value) is list:
        return type(value)(parts)
    if isinstance(value, Mapping):
        return dict(zip(value, parts, strict=True))
    if is_dataclass(value) and not isinstance(value, type):
        names = [one.name for one in fields(value) if one.init]
        return replace(value, **dict(zip(names, parts, strict=True)))
    return value


def _refused(who: str, found: str) -> TransferError:
    return TransferError(
        f"preparing {who} to send tensors with NIXL",
        found,
        "NIXL on every machine of the roles (`pip install nixl`), and GPUs that it can reach",
        "Set topology.transport=object_store, which works everywhere",
    )
