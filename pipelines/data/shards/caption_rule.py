"""The rule that says which captions can be used: in prepare, check, encode and training alike.

A caption is text in UTF-8 of more than blanks, control and format characters, and has no more
characters than allowed; blanks around it do not count.
"""

import unicodedata

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.data.shards.rejection import Reason
from pipelines.data.shards.text import decode_utf8

Fault = tuple[Reason, str]
"""A reason and what was found, in words."""

_FIRST_BEYOND_ASCII = 0x80
_DELETE = 0x7F
# Control characters, such as NUL, and those that format others, such as the zero-width space.
_INVISIBLE = ("Cc", "Cf")


def is_blank(text: str) -> bool:
    """Returns True if a text has nothing but blanks of any kind, control and format characters.

    Pipelines drop most of them, so the networks would see the empty caption. Letters and marks that
    show nothing, such as U+3164 and U+FE0F, count as text.
    """
    return all(char.isspace() or unicodedata.category(char) in _INVISIBLE for char in text)


def caption_fault(text: str | None, max_chars: int) -> Fault | None:
    """Says why a caption cannot be used; None where it can.

    Args:
        text: The caption; None where a row has none.
        max_chars: Most characters, without blanks around them.
    """
    if text is None:
        return Reason.EMPTY_CAPTION, "no text"
    num_chars = len(text.strip())
    if not num_chars:
        return Reason.EMPTY_CAPTION, "nothing but blanks"
    if is_blank(text):
        return Reason.EMPTY_CAPTION, "nothing but blanks and invisible characters"
    if num_chars > max_chars:
        return Reason.LONG_CAPTION, f"{num_chars} characters; at most {max_chars}"
    return None


def caption_faults(
    captions: pa.ChunkedArray, max_chars: int
) -> tuple[pa.ChunkedArray, dict[int, Fault]]:
    """Applies the rule to a column.

    Args:
        captions: Strings, of whatever bytes a file calls so.
        max_chars: Most characters of a caption.

    Returns:
        The captions as valid UTF-8, and the faults by row.
    """
    captions = captions.cast(pa.string())
    if _are_surely_good(captions, max_chars):
        return captions, {}
    captions, broken = decode_utf8(captions)
    faults: dict[int, Fault] = {}
    rows = zip(captions.to_pylist(), broken.to_pylist(), strict=True)
    for row, (text, is_broken) in enumerate(rows):
        fault = caption_fault(text, max_chars)
        if is_broken:
            fault = Reason.UNREADABLE_CAPTION, "no UTF-8"
        if fault is not None:
            faults[row] = fault
    return captions, faults


def is_ascii(values: pa.ChunkedArray) -> bool:
    """Returns True if no string holds a character beyond ASCII."""
    return all(
        _characters(chunk)[1].max(initial=0) < _FIRST_BEYOND_ASCII for chunk in values.chunks
    )


def _are_surely_good(captions: pa.ChunkedArray, limit: int) -> bool:
    """Returns True if a quick test finds no caption missing, blank, too long or broken.

    All is ASCII, each begins with a letter, digit or sign and has at most as many bytes as
    characters are allowed. That holds for most row groups, and looking closer costs as much as all
    other checks together.
    """
    for chunk in captions.chunks:
        borders, characters = _characters(chunk)
        lengths = np.diff(borders)
        if chunk.null_count or not lengths.all() or (lengths > limit).any():
            return False
        first = characters[borders[:-1]]
        if (first <= ord(" ")).any() or (first == _DELETE).any():
            return False
    return is_ascii(captions)


def _characters(chunk: pa.StringArray) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Returns where each string begins and ends in the bytes of all, and these bytes."""
    _, offsets, content = chunk.buffers()
    borders = np.frombuffer(offsets, dtype=np.int32)[chunk.offset :][: len(chunk) + 1]
    content = np.frombuffer(content or b"", dtype=np.uint8)
    if not len(borders):
        return np.zeros(1, np.int32), content[:0]
    return borders - borders[0], content[borders[0] : borders[-1]]
