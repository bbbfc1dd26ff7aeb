"""Why rows cannot be used: no id, a bad caption, values of a wrong size.

columns of a row group -> the same, with text that is text -> a reason for each bad row
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from pipelines.data.shards.schema import CAPTION, LATENTS, SAMPLE_ID, TEXT_EMBEDS, VIDEO
from pipelines.data.shards.text import decode_utf8
from pipelines.data.stream.source import Source

# Arrow makes these functions while it is imported, where a type checker does not see them.
pc: Any = pyarrow.compute

_FIRST_BEYOND_ASCII = 0x80
_NONE: Mapping[int, str] = MappingProxyType({})


def check_rows(
    source: Source, columns: Mapping[str, pa.ChunkedArray], faults: Mapping[int, str] = _NONE
) -> tuple[dict[str, pa.ChunkedArray], NDArray[np.object_]]:
    """Checks every row of a row group.

    Args:
        source: What is wanted of each row.
        columns: Ids and captions as strings, and what else is wanted.
        faults: Rows of which it is known that they are bad.

    Returns:
        The columns, in which ids and captions are valid UTF-8; and why each row cannot be used,
        None for a row that can. The first reason counts.
    """
    columns = dict(columns)
    reasons = np.full(len(columns[SAMPLE_ID]), None, dtype=object)
    for row, fault in faults.items():
        if row < len(reasons):
            reasons[row] = fault

    def reject(which: Any, reason: Callable[[int], str]) -> None:  # noqa: ANN401 - Arrow's array
        bad = pc.fill_null(which, True)
        if pc.any(bad).as_py():
            for row in np.flatnonzero(np.asarray(bad)):
                reasons[row] = reasons[row] or reason(int(row))

    if not _is_ascii(columns[SAMPLE_ID]):
        columns[SAMPLE_ID], broken = decode_utf8(columns[SAMPLE_ID])
        reject(broken, lambda row: "sample_id is no UTF-8")
    reject(pc.is_null(columns[SAMPLE_ID]), lambda row: "no sample_id")
    limit = source.max_caption_chars
    if not _are_surely_good(columns[CAPTION], limit):
        columns[CAPTION], broken = decode_utf8(columns[CAPTION])
        reject(broken, lambda row: "caption is no UTF-8")
        length = pc.utf8_length(pc.utf8_trim_whitespace(columns[CAPTION]))
        reject(pc.equal(length, 0), lambda row: "no caption")
        reject(
            pc.greater(length, limit),
            lambda row: f"caption too long ({length[row]} characters; at most {limit})",
        )
    if source.encoding is not None and TEXT_EMBEDS in columns:
        positions, width = source.encoding.text_shape
        row_bytes = width * source.encoding.item_bytes
        stored = pc.binary_length(columns[TEXT_EMBEDS])
        ragged = pc.not_equal(pc.multiply(pc.divide(stored, row_bytes), row_bytes), stored)
        reject(
            pc.or_(ragged, pc.greater(stored, positions * row_bytes)),
            lambda row: f"text embedding of a wrong size ({stored[row]} bytes)",
        )
    if source.encoding is not None and LATENTS in columns:
        stored_latents = pc.binary_length(columns[LATENTS])
        reject(
            pc.not_equal(stored_latents, source.encoding.latent_bytes),
            lambda row: f"latents of a wrong shape ({stored_latents[row]} bytes)",
        )
    if VIDEO in columns:
        reject(pc.equal(pc.binary_length(columns[VIDEO]), 0), lambda row: "no video")
    return columns, reasons


def _is_ascii(values: pa.ChunkedArray) -> bool:
    return all(
        _characters(chunk)[1].max(initial=0) < _FIRST_BEYOND_ASCII for chunk in values.chunks
    )


def _are_surely_good(captions: pa.ChunkedArray, limit: int) -> bool:
    """Whether a glance shows that no caption is missing, blank, too long or broken.

    All is ASCII, each begins with a letter, digit or sign and has at most as many bytes as
    characters are allowed. That holds for most row groups, and looking closer costs as much as all
    other checks together.
    """
    for chunk in captions.chunks:
        borders, characters = _characters(chunk)
        lengths = np.diff(borders)
        if chunk.null_count or not lengths.all() or (lengths > limit).any():
            return False
        if (characters[borders[:-1]] <= ord(" ")).any():
            return False
    return _is_ascii(captions)


def _characters(chunk: pa.StringArray) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Where each string begins and ends in the bytes of all, and these bytes."""
    _, offsets, content = chunk.buffers()
    borders = np.frombuffer(offsets, dtype=np.int32)[chunk.offset :][: len(chunk) + 1]
    content = np.frombuffer(content or b"", dtype=np.uint8)
    if not len(borders):
        return np.zeros(1, np.int32), content[:0]
    return borders - borders[0], content[borders[0] : borders[-1]]
