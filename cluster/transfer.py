"""Values that travel between groups: records, containers, numbers, and tensors as numpy arrays.

    tensor  --to_wire-->  WireTensor(numpy array)  --object store-->  --from_wire-->  tensor

Ray hands numpy arrays over without copying and read-only. That is why tensors travel as arrays: a
receiver that writes into a shared tensor would silently change what the other receivers read,
whereas here each gets its own copy. Values keep their bits, not their strides: tensors arrive
contiguous. numpy has no bfloat16, so such a tensor travels as the uint16 array of the same bits.

A record arrives by calling its class with its fields, so checks in its `__post_init__` hold on both
sides. Tensors arrive on the CPU; the receiver moves them to its device.

A value with few bytes of arrays is pickled here, as bytes, which Ray passes on as they are: its own
pickler runs in Python and costs several times as much. Values with larger arrays are left to it, so
that these are not copied.

A record may name tensors that can travel narrower than they are, each under a kind; a group's
settings say which kinds do. Such a tensor is rounded to bfloat16, which halves a float32 one, and
arrives in its own dtype again: with 8 bits of precision, off by 2^-8 of each value at most.
Everything else, and every tensor outside of such records, keeps its bits.
"""

import pickle
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import PurePath
from typing import Any, ClassVar, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.errors import TransferError

_PLAIN = (type(None), int, float, complex, str, bytes, Enum, PurePath, np.generic, np.ndarray)
_WITHOUT_PARTS = frozenset((type(None), bool, int, float, complex, str, bytes))
"""The usual types of leaves, found without asking for each class that a value might belong to."""

# Ray sends results of up to 100 KiB with the answer, and puts larger ones into the object store.
_MOST_PACKED_BYTES = 96 * 1024
# Of a program that is run as a script: other processes do not have its classes by name.
_SCRIPT = b"__main__"


@runtime_checkable
class SelfPacked(Protocol):
    """A record that travels as it is, because it says itself how it is pickled.

    It holds no tensor and no array, so the controller may fetch it.
    """

    PACKS_ITSELF: ClassVar[bool]


@runtime_checkable
class HasWireKinds(Protocol):
    """A record with tensors that need not keep all their bits on the way.

    Attributes:
        WIRE_KINDS: Kind of each such field, by its name; the kinds are the caller's words.
    """

    WIRE_KINDS: ClassVar[Mapping[str, str]]


class WireTensor(NamedTuple):
    """A tensor on its way; a named tuple, which pickle takes apart faster than a dataclass.

    Attributes:
        array: Its values, or for bfloat16 its bits as uint16.
        is_bfloat16: Whether the array holds bits rather than values.
        arrives_as: Name of the dtype of a tensor that was rounded for the way; None: as it is.
    """

    array: NDArray[Any]
    is_bfloat16: bool
    arrives_as: str | None = None


class WireRecord(NamedTuple):
    """A dataclass instance on its way.

    Attributes:
        record_type: Its class.
        values: Its fields by name, those that its constructor takes.
    """

    record_type: type
    values: Mapping[str, object]


def to_wire(value: object, where: str = "value", bf16_kinds: AbstractSet[str] = frozenset()) -> Any:  # noqa: ANN401 - mirrors its input
    """Takes a value apart into what pickles without torch; tensors become numpy arrays.

    Args:
        value: Plain values, tensors and numpy arrays in tuples, lists, dicts and dataclasses.
        where: Name of the value, for errors.
        bf16_kinds: Kinds of `HasWireKinds` fields that travel in bfloat16.

    Returns:
        The same tree. CPU tensors share their memory with it.

    Raises:
        TransferError: Something in the tree has no form on the wire; the error names the place.
    """
    if type(value) in _WITHOUT_PARTS:
        return value
    if isinstance(value, Tensor):
        return _tensor_to_wire(value, where)
    if isinstance(value, _PLAIN) or _declares(type(value), SelfPacked):
        return value
    if type(value) is tuple or type(value) is list:
        return type(value)(
            to_wire(item, f"{where}[{i}]", bf16_kinds) for i, item in enumerate(value)
        )
    if isinstance(value, Mapping):
        return {key: to_wire(item, f"{where}[{key!r}]", bf16_kinds) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        kinds: Mapping[str, str] = (
            cast(Any, value).WIRE_KINDS if _declares(type(value), HasWireKinds) else {}
        )
        values: dict[str, object] = {}
        for name in _names_of(type(value)):
            own = getattr(value, name)
            if (
                kinds.get(name) in bf16_kinds
                and isinstance(own, Tensor)
                and own.is_floating_point()
            ):
                values[name] = _in_bf16(own, f"{where}.{name}")
            else:
                values[name] = to_wire(own, f"{where}.{name}", bf16_kinds)
        return WireRecord(type(value), values)
    raise TransferError(
        "sending a value to another group",
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}",
        "numbers, strings, tensors, numpy arrays, and tuples, lists, dicts and dataclasses of them",
    )


def from_wire(wire: object) -> Any:  # noqa: ANN401 - mirrors its input
    """Puts a value together again; every tensor gets its own writable memory."""
    if isinstance(wire, WireTensor):
        tensor = torch.from_numpy(np.array(wire.array, copy=True))
        tensor = tensor.view(torch.bfloat16) if wire.is_bfloat16 else tensor
        return tensor if wire.arrives_as is None else tensor.to(getattr(torch, wire.arrives_as))
    if isinstance(wire, WireRecord):
        return wire.record_type(**{name: from_wire(item) for name, item in wire.values.items()})
    if isinstance(wire, tuple | list):
        return type(wire)(from_wire(item) for item in wire)
    if isinstance(wire, dict):
        return {key: from_wire(item) for key, item in wire.items()}
    return wire


def pack(wire: object) -> object:
    """A wire value with few bytes of arrays as the bytes of its pickle; any other one as it is.

    Args:
        wire: What `to_wire` has made, or plain records.

    Returns:
        Bytes, which always are a pickle; or the value itself, which then is no bytes: it has many
        bytes of arrays, or a class that pickle cannot name for another process.
    """
    if array_bytes(wire) > _MOST_PACKED_BYTES:
        return wire
    try:
        packed = pickle.dumps(wire, pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError):
        # Such as a class within a function, which Ray sends along.
        return wire
    names_script = _SCRIPT in packed and type(wire) is not bytes
    return wire if names_script else packed


def unpack(sent: object) -> Any:  # noqa: ANN401 - mirrors what was packed
    """The value that `pack` was given; `sent` is of this run's own processes."""
    return pickle.loads(sent) if type(sent) is bytes else sent


def array_in(value: object, where: str = "result") -> str | None:
    """The place of the first tensor or array in a tree, as it is or as `to_wire` made it."""
    if isinstance(value, Tensor | WireTensor | np.ndarray):
        return where
    parts = parts_of(value)
    return next((found for at, part in parts if (found := array_in(part, where + at))), None)


def array_bytes(value: object) -> int:
    """Bytes of all arrays in a tree that `to_wire` made."""
    if type(value) in _WITHOUT_PARTS:
        return 0
    if isinstance(value, WireTensor):
        return value.array.nbytes
    if isinstance(value, np.ndarray):
        return value.nbytes
    return sum(array_bytes(part) for _, part in parts_of(value))


def require_constants(value: object, where: str = "value") -> None:
    """Refuses a tree that leads into an autograd graph, without looking at any number.

    Raises:
        TransferError: A tensor is part of a graph; the error names the place.
    """
    if isinstance(value, Tensor) and value.requires_grad:
        raise TransferError(
            "sending a tensor to another group",
            f"{where} is part of an autograd graph",
            "a constant: a graph ends where its process ends",
            "Return it detached and keep the graph in the worker",
        )
    for at, part in parts_of(value):
        require_constants(part, where + at)


def parts_of(value: object) -> list[tuple[str, object]]:
    """Returns the parts of a container or record, each with its place; of other values, nothing."""
    if type(value) in _WITHOUT_PARTS:
        return []
    if isinstance(value, WireRecord):
        return [(f".{name}", part) for name, part in value.values.items()]
    if isinstance(value, tuple | list):
        return [(f"[{number}]", part) for number, part in enumerate(value)]
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    if is_dataclass(value) and not isinstance(value, type):
        return [(f".{name}", getattr(value, name)) for name in _names_of(type(value))]
    return []


@cache
def _declares(kind: type, protocol: type) -> bool:
    """Returns True if the instances of a class are of a protocol of class variables."""
    # Asked once a class: `isinstance` would look for the variables in every value.
    return all(hasattr(kind, name) for name in protocol.__annotations__)


@cache
def _names_of(record: type) -> tuple[str, ...]:
    """Names of the fields that a dataclass is called with."""
    return tuple(field.name for field in fields(record) if field.init)


def _in_bf16(tensor: Tensor, where: str) -> WireTensor:
    """The tensor rounded to bfloat16, which becomes what it was on arrival."""
    rounded = _tensor_to_wire(tensor.to(torch.bfloat16), where)
    return rounded._replace(arrives_as=str(tensor.dtype).removeprefix("torch."))


def _tensor_to_wire(tensor: Tensor, where: str) -> WireTensor:
    require_constants(tensor, where)
    is_bfloat16 = tensor.dtype is torch.bfloat16
    try:
        # Contiguous arrays leave the process without a copy through pickle.
        values = tensor.contiguous().cpu()
        array = (values.view(torch.uint16) if is_bfloat16 else values).numpy()
    except (TypeError, RuntimeError) as error:
        raise TransferError(
            "sending a tensor to another group",
            f"{where} has dtype {tensor.dtype} and layout {tensor.layout}: {error}",
            "a dense tensor of bfloat16 or of a dtype that numpy has",
        ) from error
    return WireTensor(array, is_bfloat16)
