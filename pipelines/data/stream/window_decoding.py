"""Pixels in the place of the videos of a window, in the window's order.

Pixels are a hundred times as large as the file they come from. So they are made last, once the rows
are in order and only of those that are wanted, and a window comes out in parts of bounded size.
"""

from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.data.clips.clip_errors import ClipError, ClipFault
from pipelines.data.clips.guarded_process import Died, ProcessStartError, decoding_process
from pipelines.data.shards.rejection import join_reason
from pipelines.data.shards.schema import FPS, VIDEO
from pipelines.data.stream.source import Decode, Source
from pipelines.data.stream.window import REASON

BUCKET = "bucket"
"""Column of the number of a clip's shape, of sources with several."""

_PART_BYTES = 64 * 2**20


def decode_rows(source: Source, rows: pa.Table) -> Iterator[pa.Table]:
    """Decodes the videos of rows that `pipelines.data.stream.window.read_window` has read.

    Args:
        source: Says how, and to which shape.
        rows: What was read; rows that have a reason stay as they are.

    Yields:
        All rows, in order: `video` holds the pixels' bytes (`large_binary`, since those of one clip
        may be more than 2 GiB), or null where it cannot be decoded, with its reason.

    Raises:
        ProcessStartError: The process that decodes does not start.
    """
    size = max(1, _PART_BYTES // _largest(source))
    for start in range(0, max(1, rows.num_rows), size):
        yield _decode_part(source, rows.slice(start, size))


def _decode_part(source: Source, rows: pa.Table) -> pa.Table:
    decode = _decoder_of(source)
    reasons: list[str | None] = rows.column(REASON).to_pylist()
    rates = rows.column(FPS).to_pylist() if FPS in rows.column_names else [0.0] * len(reasons)
    # Arrow's allocator keeps memory for the next part, which the system's gives back and clears.
    memory = pa.allocate_buffer(len(reasons) * _largest(source))
    pixels = np.frombuffer(memory, dtype=np.uint8)
    lengths = np.zeros(len(reasons) + 1, dtype=np.int64)
    buckets: list[int | None] = [None] * len(reasons)
    end = 0
    for row, (stored, fps) in enumerate(zip(rows.column(VIDEO), rates, strict=True)):
        if reasons[row] is not None:
            continue
        try:
            frames = decode(stored.as_py(), float(fps or 0.0))
        except ProcessStartError:
            raise
        except Exception as error:  # A broken file raises whatever its codec thinks of it.
            reasons[row] = _in_words(error)
            continue
        if isinstance(frames, Died):
            reasons[row] = join_reason(frames.reason, frames.in_words)
            continue
        if frames.shape not in source.pixel_shapes:
            reasons[row] = join_reason(ClipFault.WRONG_SIZE, f"pixels of {frames.shape}")
            continue
        pixels[end : end + frames.nbytes].reshape(frames.shape)[:] = frames
        end += frames.nbytes
        lengths[row + 1] = frames.nbytes
        buckets[row] = source.pixel_shapes.index(frames.shape)
    columns = {
        VIDEO: _binary(pixels, np.cumsum(lengths), lengths[1:] > 0),
        REASON: pa.array(reasons, pa.string()),
    }
    for name, values in columns.items():
        rows = rows.set_column(rows.schema.get_field_index(name), name, values)
    if source.further_shapes:
        rows = rows.append_column(BUCKET, pa.array(buckets, pa.int64()))
    return rows


def _largest(source: Source) -> int:
    """Bytes of the largest clip."""
    return max(map(prod, source.pixel_shapes))


def _decoder_of(source: Source) -> Callable[[bytes, float], NDArray[np.uint8] | Died[bytes]]:
    """The source's decoder, in a process that may be lost where the source bounds its calls."""
    decode = cast("Decode", source.decode)
    # No other process can import what a script or a notebook defines.
    if not source.max_hang_s or getattr(source.decode, "__module__", "") == "__main__":
        return decode
    return partial(decoding_process(source.max_hang_s).apply, decode)


def _binary(
    content: NDArray[np.uint8], borders: NDArray[np.int64], is_there: NDArray[np.bool_]
) -> pa.Array:
    """Values that lie one after the other in `content`, without a copy; some are null."""
    bits = pa.py_buffer(np.packbits(is_there, bitorder="little"))
    buffers = [bits, pa.py_buffer(borders), pa.py_buffer(content)]
    return pa.Array.from_buffers(pa.large_binary(), len(is_there), buffers)


def _in_words(error: Exception) -> str:
    if isinstance(error, ClipError):
        return join_reason(error.fault, error.in_short)
    words = str(error).splitlines()
    return join_reason(
        ClipFault.UNDECODABLE, f"{type(error).__name__}: {words[0] if words else ''}"
    )
