"""Types of stored columns: those that fit a column of the format, and their values in its type."""

from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.compute

from cluster.redaction import printable
from pipelines.data.shards.rejection import Reason, join_reason
from pipelines.data.shards.schema import (
    CAPTION,
    FPS,
    SAMPLE_ID,
    VIDEO,
)

# Arrow makes these functions while it is imported, where a type checker does not see them.
pc: Any = pyarrow.compute

_BYTES, _PATH = "bytes", "path"
_MAX_PATH_CHARS = 200


def fits(name: str, stored: pa.DataType) -> bool:
    """Tells whether a stored type can be read as one of our columns."""
    if pa.types.is_null(stored):
        return True
    if name in (SAMPLE_ID, CAPTION):
        # A dictionary of strings reads as strings; ids may be numbers. Text that an old Spark or
        # Hive has written has no mark that it is text.
        plain = stored.value_type if isinstance(stored, pa.DictionaryType) else stored
        is_id = name == SAMPLE_ID and (pa.types.is_integer(plain) or _is_uuid(plain))
        whole = name == SAMPLE_ID and pa.types.is_decimal(plain) and plain.scale == 0
        return _is_text(plain) or _is_bytes(plain) or is_id or whole
    if name == FPS:
        return pa.types.is_integer(stored) or pa.types.is_floating(stored)
    if name == VIDEO and isinstance(stored, pa.StructType):
        place = stored.get_field_index(_BYTES)
        return place >= 0 and _is_bytes(stored.field(place).type)
    return _is_bytes(stored) or pa.types.is_fixed_size_binary(stored)


def _is_text(kind: pa.DataType) -> bool:
    return any(
        is_kind(kind)
        for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    )


def _is_bytes(kind: pa.DataType) -> bool:
    return any(
        is_kind(kind)
        for is_kind in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    )


def _is_uuid(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.uuid"


def as_plain(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column in a type that the rest of the pipeline casts; our own types stay as they are."""
    kind = column.type
    if name == FPS:
        return column.cast(pa.float64()) if pa.types.is_null(kind) else column
    if name not in (SAMPLE_ID, CAPTION):
        if isinstance(kind, pa.StructType):
            column = pc.struct_field(column, _BYTES)
        is_plain = pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)
        return column if is_plain else column.cast(pa.binary())
    if _is_uuid(kind):
        texts = [None if value is None else str(UUID(bytes=value)) for value in _storage(column)]
        return pa.chunked_array([pa.array(texts, pa.string())])
    if isinstance(kind, pa.DictionaryType) and _is_bytes(kind.value_type):
        column, kind = column.cast(pa.binary()), pa.binary()
    if _is_bytes(kind):
        options = pc.CastOptions(target_type=pa.string(), allow_invalid_utf8=True)
        return pc.cast(column, options=options)
    ours = pa.types.is_integer(kind) or isinstance(kind, pa.DictionaryType)
    if ours or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return column
    return column.cast(pa.string())


def _storage(column: pa.ChunkedArray) -> list[bytes | None]:
    return [value for chunk in column.chunks for value in chunk.storage.to_pylist()]


def paths_alone(content: pa.ChunkedArray, column: pa.ChunkedArray) -> dict[int, str]:
    """Faults of videos that are structs with a path and without bytes, by row.

    Such a path leads to a file on the machine that wrote the set, which may be any file here.
    """
    kind = column.type
    if not isinstance(kind, pa.StructType) or kind.get_field_index(_PATH) < 0:
        return {}
    if not _is_text(kind.field(_PATH).type):
        return {}
    paths = pc.struct_field(column, _PATH)
    is_empty = pc.equal(pc.fill_null(pc.binary_length(content), 0), 0)
    if not pc.any(is_empty).as_py():
        return {}
    found = {}
    for row, (alone, path) in enumerate(zip(is_empty.to_pylist(), paths.to_pylist(), strict=True)):
        if alone and path:
            shown = printable(path[:_MAX_PATH_CHARS])
            detail = f"a path alone, {shown}; its file is not in the set"
            found[row] = join_reason(Reason.MISSING_VIDEO, detail)
    return found
