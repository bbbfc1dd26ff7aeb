"""Bytes of tensors at the widest place of a computation, on any device."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations inside have made and nothing has let go of.

    Attributes:
        peak: Most bytes at one moment.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {
            value.untyped_storage()._cdata
            for value in tree_iter((args, kwargs))
            if isinstance(value, torch.Tensor)
        }
        for value in tree_iter(made):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in given | self._known:
                    self._add(storage)
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        size, place = storage.nbytes(), storage._cdata
        self._known.add(place)
        self._now += size
        self.peak = max(self.peak, self._now)

        def forget() -> None:
            self._known.discard(place)
            self._now -= size

        weakref.finalize(storage, forget)
