"""Finds rows that cannot be used, in check, encode and training alike.

No id, a bad caption, values of a wrong size:

columns of a row group -> the same, with text that is text -> a reason for each bad row

Columns are checked as Arrow arrays; Python looks at the rows that fail, to say why.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from pipelines.data.shards.caption_rule import caption_faults, is_ascii
from pipelines.data.shards.rejection import Reason, join_reason
from pipelines.data.shards.schema import (
    CAPTION,
    LATENTS,
    SAMPLE_ID,
    TEXT_EMBEDS,
    VIDEO,
    Encoding,
)
from pipelines.data.shards.text import decode_utf8

# Arrow makes these functions while it is imported, where a type checker does not see them.
pc: Any = pyarrow.compute

_NONE: Mapping[int, str] = MappingProxyType({})


def check_rows(
    columns: Mapping[str, pa.ChunkedArray],
    max_caption_chars: int,
    faults: Mapping[int, str] = _NONE,
    encoding: Encoding | None = None,
) -> tuple[dict[str, pa.ChunkedArray], dict[int, str]]:
    """Checks every row of a row group.

    Args:
        columns: Ids and captions as strings, and what else is wanted.
        max_caption_chars: A longer caption is bad.
        faults: Rows of which it is known that they are bad.
        encoding: What latents and embeddings must be; None where they are not among the columns.

    Returns:
        The columns, in which ids and captions are valid UTF-8; and for each row that cannot be
        used, why. The first reason counts.
    """
    columns = dict(columns)
    num_rows = len(columns[SAMPLE_ID])
    reasons = {row: fault for row, fault in faults.items() if row < num_rows}

    def reject(which: Any, reason: Callable[[int], str]) -> None:  # noqa: ANN401 - Arrow's array
        bad = pc.fill_null(which, True)
        if pc.any(bad).as_py():
            for row in np.flatnonzero(np.asarray(bad)).tolist():
                reasons.setdefault(row, reason(row))

    if not is_ascii(columns[SAMPLE_ID]):
        columns[SAMPLE_ID], broken = decode_utf8(columns[SAMPLE_ID])
        reject(broken, lambda row: join_reason(Reason.NO_ID, "no UTF-8"))
    has_no_id = pc.equal(pc.binary_length(columns[SAMPLE_ID]), 0)
    reject(has_no_id, lambda row: str(Reason.NO_ID))
    columns[CAPTION], bad_captions = caption_faults(columns[CAPTION], max_caption_chars)
    for row, fault in bad_captions.items():
        reasons.setdefault(row, join_reason(*fault))
    if encoding is not None and TEXT_EMBEDS in columns:
        positions, width = encoding.text_shape
        row_bytes = width * encoding.item_bytes
        stored = pc.binary_length(columns[TEXT_EMBEDS])
        ragged = pc.not_equal(pc.multiply(pc.divide(stored, row_bytes), row_bytes), stored)
        reject(
            pc.or_(ragged, pc.greater(stored, positions * row_bytes)),
            lambda row: join_reason(Reason.BAD_ENCODING, f"text embedding of {stored[row]} bytes"),
        )
    if encoding is not None and LATENTS in columns:
        stored_latents = pc.binary_length(columns[LATENTS])
        reject(
            pc.not_equal(stored_latents, encoding.latent_bytes),
            lambda row: join_reason(Reason.BAD_ENCODING, f"latents of {stored_latents[row]} bytes"),
        )
    if VIDEO in columns:
        reject(pc.equal(pc.binary_length(columns[VIDEO]), 0), lambda row: str(Reason.MISSING_VIDEO))
    return columns, reasons
