"""Text columns of shards: values that are sure to be UTF-8."""

import numpy as np
import pyarrow as pa


def decode_utf8(values: pa.ChunkedArray) -> tuple[pa.ChunkedArray, pa.Array]:
    """Values as strings that are sure to be UTF-8, and which of them were not.

    Parquet's readers hand out whatever bytes a file calls a string.
    """
    values = values.cast(pa.string())
    try:
        values.validate(full=True)
        return values, pa.array(np.zeros(len(values), dtype=bool))
    except pa.ArrowInvalid:
        raw = [each for chunk in values.chunks for each in chunk.cast(pa.binary()).to_pylist()]
    texts = [None if each is None else each.decode(errors="replace") for each in raw]
    broken = [
        each is not None and each != (text or "").encode()
        for each, text in zip(raw, texts, strict=True)
    ]
    return pa.chunked_array([texts], values.type), pa.array(broken)
