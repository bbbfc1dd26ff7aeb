"""Workers without any meaning, importable from every process of a test cluster."""

import ctypes
import hashlib
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from enum import StrEnum
from types import ModuleType
from typing import ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sgmd_core.errors import NonFiniteError

WAIT_S = 240.0
"""Long enough for a machine that does much else; nothing waits so long."""


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True, slots=True)
class Parcel:
    colour: Colour
    sizes: tuple[int, ...]
    payload: Tensor
    notes: Mapping[str, float]
    label: str | None = None
    volume: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "volume", self.payload.numel())


@dataclass(frozen=True, slots=True)
class Scales:
    WIRE_KINDS: ClassVar[Mapping[str, str]] = {"coarse": "value"}

    coarse: Tensor
    fine: Tensor


class Stubborn:
    """Fails where it is pickled, in words of its own."""

    def __reduce__(self) -> str:
        raise ValueError("it does not want to travel")


class UnpicklableError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


class BareError(Exception):
    """Loses its notes as it travels."""

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return BareError, self.args


class Toy:
    """Keeps a list of what it was told, in order."""

    def __init__(self, start: int = 0) -> None:
        self.seen: list[int] = [start]

    def note(self, number: int) -> int:
        self.seen.append(number)
        return len(self.seen)

    def history(self) -> tuple[int, ...]:
        return tuple(self.seen)

    def parcel(self, dtype_name: str, size: int) -> Parcel:
        dtype = getattr(torch, dtype_name)
        bits = torch.arange(size * 8, dtype=torch.int64).mul(2654435761).view(torch.uint8)
        payload = bits[: size * dtype.itemsize].clone().view(dtype)
        return Parcel(Colour.RED, (1, size), payload, {"loss": 0.1}, None)

    def tensor(self, size: int) -> Tensor:
        return torch.zeros(size)

    def elsewhere(self) -> Tensor:
        """On a device from which nothing can be copied."""
        return torch.empty(3, device="meta")

    def size_of(self, tensor: Tensor) -> int:
        return tensor.numel()

    def graph(self) -> Tensor:
        return torch.ones(2, requires_grad=True) * 2

    def unsendable(self) -> object:
        return object()

    def unpackable(self, is_locked: bool) -> object:
        """What goes onto the wire, and cannot be pickled: by pickle alone, or by Ray neither."""
        return np.array([threading.Lock() if is_locked else Stubborn()], dtype=object)

    def overwrite(self, tensor: Tensor) -> float:
        return float(tensor.add_(1).sum())

    def describe(self, parcel: Parcel, extra: int = 0) -> str:
        bits = parcel.payload.contiguous().view(torch.uint8).numpy().tobytes()
        digest = hashlib.sha256(bits).hexdigest()
        rest = (parcel.colour, parcel.sizes, parcel.payload.dtype, dict(parcel.notes))
        return f"{digest} {rest} {parcel.label} {parcel.volume} {extra}"

    def scales(self, weight: float) -> "Scales":
        return Scales(torch.tensor([weight]), torch.tensor([weight]))

    def weigh(self, scales: "Scales") -> tuple[str, float, float]:
        return str(scales.coarse.dtype), float(scales.coarse), float(scales.fine)

    def explode(self) -> int:
        raise NonFiniteError("training", "a loss of nan", "a finite loss", "lower the rate")

    def explode_unpicklably(self) -> int:
        raise UnpicklableError(1, 2)

    def explode_barely(self) -> int:
        raise BareError("1 and 2")

    def foreign(self) -> object:
        """A record whose class this process alone has, as with another version of the code."""
        module = ModuleType("only_in_the_process_of_the_toy")
        sys.modules[module.__name__] = module
        record = make_dataclass("Foreign", ["number"], namespace={"__module__": module.__name__})
        vars(module)["Foreign"] = record
        return record(1)

    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def wait_for(self, path: str) -> bool:
        """Answers once a file is there; says whether it came."""
        end = time.monotonic() + WAIT_S
        while not os.path.exists(path) and time.monotonic() < end:  # noqa: PTH110
            time.sleep(0.02)
        return os.path.exists(path)  # noqa: PTH110

    def warn(self, words: str) -> None:
        logging.getLogger("workers.toys").warning(words)

    def say(self, text: str) -> int:
        """Writes a line to the log of its process; returns the process's id."""
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
        return os.getpid()

    def crash(self) -> None:
        """Ends with a segmentation fault."""
        ctypes.string_at(0)

    def leave(self, code: int) -> None:
        sys.exit(code)

    def spell(self, text: str) -> "Letters":
        if not text:
            raise ValueError("nothing to spell")
        return Letters(text)

    def read(self, letters: "Letters", number: int) -> str:
        return f"{letters.text}{number}"

    def threads(self) -> str | None:
        return os.environ.get("OMP_NUM_THREADS")


def make_toy(start: int) -> Toy:
    return Toy(start)


def make_nothing() -> Toy:
    raise NonFiniteError("building", "nothing", "a toy")


class Singer:
    """One of several ranks that run collectives among themselves."""

    def chord(self, value: float) -> float:
        total = torch.tensor([value])
        dist.all_reduce(total)
        return float(total)

    def late_chord(self, value: float, late_rank: int, seconds: float) -> float:
        """A chord that one of the ranks comes late to."""
        if dist.get_rank() == late_rank:
            time.sleep(seconds)
        return self.chord(value)

    def break_off(self) -> None:
        raise RuntimeError("out of tune")

    def place(self) -> tuple[int, int]:
        return dist.get_rank(), dist.get_world_size()


def make_singer() -> Singer:
    # Here already, as a role that shards its network does.
    dist.barrier()
    return Singer()


@dataclass(frozen=True, slots=True)
class Letters:
    """One letter a sample."""

    text: str

    def cut(self, start: int, stop: int) -> "Letters":
        return Letters(self.text[start:stop])

    @classmethod
    def joined(cls, parts: Sequence["Letters"]) -> "Letters":
        return cls("".join(part.text for part in parts))


def make_sleepy() -> Toy:
    time.sleep(WAIT_S)
    return Toy()
