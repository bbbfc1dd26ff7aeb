"""Tensors as the bytes that encoded shards store, and back; see `pipelines.data.shards.schema`.

Apart from the schema, so that processes which only read or decode never load torch.
"""

from typing import cast

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.data.shards.schema import DTypeName, Encoding
from sgmd_core.errors import DataError


def torch_dtype(name: DTypeName) -> torch.dtype:
    """The type of that name.

    Raises:
        ValueError: We do not store values of that type.
    """
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype {name!r}")
    return cast("torch.dtype", getattr(torch, name))


def pack_tensor(values: Tensor, dtype: DTypeName) -> bytes:
    """The bytes of a tensor's values as a shard stores them."""
    stored = values.detach().to("cpu", torch_dtype(dtype)).contiguous()
    return stored.view(torch.uint8).numpy().tobytes()


def pack_text(embedding: Tensor, dtype: DTypeName) -> bytes:
    """The bytes of an embedding (positions, width) up to its last row that is not zero."""
    rows = embedding.any(dim=1).nonzero()
    return pack_tensor(embedding[: int(rows[-1]) + 1 if len(rows) else 0], dtype)


def unpack_latents(stored: bytes, encoding: Encoding) -> Tensor:
    """Latents (channels, frames, rows, columns) in their stored type.

    Raises:
        DataError: These bytes are not latents of that shape.
    """
    if len(stored) != encoding.latent_bytes:
        raise _not_latents(len(stored), encoding)
    return _values(stored, encoding.dtype).view(encoding.latent_shape)


def unpack_all_latents(stored: pa.ChunkedArray, encoding: Encoding) -> Tensor:
    """Latents of many samples (b, channels, frames, rows, columns) in their stored type.

    Raises:
        DataError: They are not latents of that shape.
    """
    kind = torch_dtype(encoding.dtype)
    latents = torch.empty(len(stored), *encoding.latent_shape, dtype=kind)
    for sample, value in zip(latents, stored, strict=True):
        content = value.as_buffer()
        if content.size != encoding.latent_bytes:
            raise _not_latents(content.size, encoding)
        sample.copy_(_view(content, encoding.dtype).view(encoding.latent_shape))
    return latents


def unpack_text(stored: bytes, encoding: Encoding) -> Tensor:
    """An embedding (positions, width) in its stored type, with the zeros at its end.

    Raises:
        DataError: These bytes are not an embedding of that shape.
    """
    positions, width = encoding.text_shape
    row_bytes = width * encoding.item_bytes
    if len(stored) % row_bytes or len(stored) > positions * row_bytes:
        raise DataError(
            "reading a text embedding",
            f"{len(stored)} bytes",
            f"at most {positions} rows of {row_bytes} bytes",
        )
    embedding = torch.zeros(positions, width, dtype=torch_dtype(encoding.dtype))
    values = _values(stored, encoding.dtype).view(-1, width)
    embedding[: len(values)] = values
    return embedding


def unpack_rows(stored: bytes, encoding: Encoding) -> NDArray[np.float32]:
    """An embedding (rows, width) in float32, without the zeros at its end.

    Raises:
        DataError: These bytes are not an embedding of that shape.
    """
    padded = unpack_text(stored, encoding)
    num_rows = len(stored) // (encoding.text_shape[1] * encoding.item_bytes)
    return padded[:num_rows].float().numpy().copy()


def _view(stored: pa.Buffer, dtype: DTypeName) -> Tensor:
    """The values in a buffer, where they are; only to be read."""
    kind = torch_dtype(dtype)
    number = {2: pa.int16(), 4: pa.int32()}[kind.itemsize]
    array = pa.Array.from_buffers(number, stored.size // kind.itemsize, [None, stored])
    return torch.from_dlpack(array).view(kind)


def _values(stored: bytes, dtype: DTypeName) -> Tensor:
    # A copy: bytes are read-only, and a tensor is not.
    return _view(pa.py_buffer(stored), dtype).clone()


def _not_latents(num_bytes: int, encoding: Encoding) -> DataError:
    return DataError(
        "reading latents",
        f"{num_bytes} bytes",
        f"{encoding.latent_bytes} bytes for {encoding.latent_shape} in {encoding.dtype}",
    )
