"""Files of tensors (safetensors): written as a stream, read by rows.

    write_tensors(path, tensors)   straight from the tensors' memory; no copy of the file is made
    RowReader(file).read(...)      a few rows at a time into their place

So a process that saves or loads its part of a network needs memory for that part alone.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from fsspec import AbstractFileSystem
from safetensors import safe_open
from torch import Tensor

from cluster.streams import write_stream

# A file is mapped again after as much of it has been read: what is mapped counts as memory.
_MAPPED_BYTES = 2**25
_ALIGNMENT = 8
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], files: AbstractFileSystem | None = None
) -> str:
    """Writes a safetensors file; returns its SHA-256.

    Args:
        path: As in `cluster.streams.write_stream`.
        tensors: By name, in main memory.
        files: As in `cluster.streams.write_stream`.

    Raises:
        StorageError: The store has kept something else than was sent.
        OSError: The file system does not take it.
    """
    return write_stream(path, _pieces(tensors), files)


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: length of the header, header, tensors."""
    # Larger types first, as the library does it: then every tensor is aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // _ALIGNMENT) * _ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        flat = tensor.detach().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


class RowReader:
    """Reads rows of a safetensors file, and maps it again before it takes much memory.

    Args:
        file: A local file.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._num_read = 0
        self._weights: Any = safe_open(file, framework="pt")

    @property
    def names(self) -> list[str]:
        """Names of the tensors in the file."""
        return list(self._weights.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in the file."""
        return tuple(self._weights.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor in the file."""
        found: Tensor = (
            self._weights.get_slice(name)[:0]
            if self.shape(name)
            else self._weights.get_tensor(name)
        )
        return found.dtype

    def read(self, name: str, target: Tensor, first: int) -> None:
        """Copies rows from `first` on into `target`, as many as it has."""
        if not target.ndim:
            target.copy_(self._weights.get_tensor(name))
            return
        row_bytes = max(1, target[:1].numel() * torch.float32.itemsize)
        step = max(1, _MAPPED_BYTES // row_bytes)
        for start in range(0, len(target), step):
            rows = target[start : start + step]
            view = self._weights.get_slice(name)
            rows.copy_(view[first + start : first + start + len(rows)])
            self._count(len(rows) * row_bytes)

    def _count(self, num_bytes: int) -> None:
        self._num_read += num_bytes
        if self._num_read >= _MAPPED_BYTES:
            self._weights = safe_open(self._file, framework="pt")
            self._num_read = 0
