"""Records of tensors with one entry a clip."""

from collections.abc import Sequence
from dataclasses import fields
from typing import TypeVar

import torch

Record = TypeVar("Record")


def join_records(parts: Sequence[Record]) -> Record:
    """One record of the clips of several: a dataclass of tensors, joined along their first axis."""
    kind = type(parts[0])
    names = [field.name for field in fields(kind)]  # pyright: ignore[reportArgumentType]
    return kind(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
