"""Records about the samples of a batch, which can be cut and joined along them.

Roles with different numbers of ranks share a batch out differently, so what one rank returns may
have to be cut, or joined with what another one returns, before a third can use it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor

_METRICS = "metrics"

# Not `Self`, which the checks of arguments at run time cannot resolve.
R = TypeVar("R", bound="SampleRecord")


class SampleRecord:
    """Base of such dataclasses.

    Tensors, tuples and records of this kind have one entry a sample; the first of them is no
    record. `metrics` are means over samples, so those of a whole are the weighted means of its
    parts'. Everything else is the same for every part.

    Attributes:
        SHARED: Fields that are tensors or tuples and yet the same for every part.
    """

    __slots__ = ()
    SHARED: ClassVar[tuple[str, ...]] = ()

    @property
    def num_samples(self) -> int:
        """Samples that the record is about."""
        values = self._values()
        return next(len(values[name]) for name in values if self._is_by_sample(name, values[name]))

    def cut(self: R, start: int, stop: int) -> R:
        """The same record about samples `start` to `stop` of its own."""
        values = self._values()
        cut = {
            name: value.cut(start, stop) if isinstance(value, SampleRecord) else value[start:stop]
            for name, value in values.items()
            if self._is_by_sample(name, value)
        }
        return type(self)(**values | cut)

    @classmethod
    def joined(cls: type[R], parts: Sequence[R]) -> R:
        """One record about the samples of all parts, in their order."""
        values = parts[0]._values()
        for name, first in values.items():
            entries = [part._values()[name] for part in parts]
            if name == _METRICS:
                values[name] = _weighted_means(entries, [part.num_samples for part in parts])
            elif isinstance(first, SampleRecord):
                values[name] = type(first).joined(entries)
            elif cls._is_by_sample(name, first):
                is_tensor = isinstance(first, Tensor)
                values[name] = torch.cat(entries) if is_tensor else sum(entries, start=())
        return cls(**values)

    @classmethod
    def _is_by_sample(cls, name: str, value: object) -> bool:
        by_sample = isinstance(value, Tensor | tuple | SampleRecord)
        return by_sample and name not in cls.SHARED

    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(cast(Any, self))}


def _weighted_means(
    metrics: Sequence[Mapping[str, float]], sizes: Sequence[int]
) -> dict[str, float]:
    pairs = list(zip(metrics, sizes, strict=True))
    return {
        name: sum(size * entry[name] for entry, size in pairs) / sum(sizes) for name in metrics[0]
    }
