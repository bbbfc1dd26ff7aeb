"""Reads one window: its row groups together, every row checked and put in its place.

    row groups -> columns of all -> checks -> the window's permutation -> one table

Every row of the window comes out: usable, or with the reason why not. A row group that cannot be
read comes out as one row. So whoever counts rows can prove that none was lost on the way.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.data.shards.parquet import Fault, RowGroupReader
from pipelines.data.shards.row_checks import check_rows
from pipelines.data.shards.schema import (
    CAPTION,
    FPS,
    LATENTS,
    REQUIRED_COLUMNS,
    SAMPLE_ID,
    TEXT_EMBEDS,
    Encoding,
    encoding_of,
    faults_in,
)
from pipelines.data.stream.plan import RowGroup, Window
from pipelines.data.stream.source import Source
from sgmd_core.errors import DataError

PLACE = "place"
GROUP = "group"
ROW = "row"
REASON = "reason"

# Each value that is not copied costs Ray two buffers to ship; smaller ones are copied faster.
_LARGE_BYTES = 2**18

WHOLE_GROUP = -1
"""`row` of what stands for a row group that cannot be read."""


def read_window(reader: RowGroupReader, source: Source, window: Window) -> pa.Table:
    """Reads a window.

    Args:
        reader: Of the source's folder.
        source: What is wanted.
        window: What to read; rows before `cursor.row` of its order are left out.

    Returns:
        One line for each row, in the window's order: `place` in that order, number of the row
        `group` in the window, `row` in the row group, sample_id, caption, the wanted columns, and
        `reason`, which is null for a row that can be used. Before them, one line with `row`
        `WHOLE_GROUP` for each row group that cannot be read. Videos are as they were stored: see
        `pipelines.data.stream.window_decoding`.

    Raises:
        DataError: The server failed; see `pipelines.data.shards.parquet.fetch`.
    """
    groups = window.groups
    columns = [*REQUIRED_COLUMNS, *source.columns]
    tables = reader.read([(each.shard, each.num_bytes, each.index) for each in groups], columns)
    usable: list[pa.Table] = []
    faults: list[tuple[int, str]] = []
    where = np.full(window.num_rows, -1, dtype=np.int64)
    before = num_usable = 0
    for number, (group, table) in enumerate(zip(groups, tables, strict=True)):
        checked = _checked(source, number, group, table, columns)
        if isinstance(checked, Fault):
            faults.append((number, checked.reason))
        else:
            usable.append(checked)
            where[before : before + group.num_rows] = np.arange(group.num_rows) + num_usable
            num_usable += group.num_rows
        before += group.num_rows
    rows = where[window.order()]
    places = np.flatnonzero(rows >= 0)
    places = places[places >= window.cursor.row]
    schema = lines_schema(source)
    taken = _in_order(pa.concat_tables(usable), rows[places]) if usable else None
    parts = [_fault_lines(faults, schema)]
    if taken is not None:
        taken = taken.append_column(PLACE, pa.array(places.astype(np.int32)))
        parts.append(taken.select(schema.names))
    return pa.concat_tables(parts)


def lines_schema(source: Source) -> pa.Schema:
    """Schema of the lines that `read_window` makes."""
    columns = [(PLACE, pa.int32()), (GROUP, pa.int32()), (ROW, pa.int32())]
    columns += [(SAMPLE_ID, pa.string()), (CAPTION, pa.string())]
    columns += [(name, pa.float64() if name == FPS else pa.binary()) for name in source.columns]
    return pa.schema([*columns, (REASON, pa.string())])


def _fault_lines(faults: Sequence[tuple[int, str]], schema: pa.Schema) -> pa.Table:
    lines = [
        {PLACE: WHOLE_GROUP, GROUP: number, ROW: WHOLE_GROUP, REASON: reason}
        for number, reason in faults
    ]
    return pa.Table.from_pylist(lines, schema=schema)


def _checked(
    source: Source, number: int, group: RowGroup, table: pa.Table | Fault, columns: Sequence[str]
) -> pa.Table | Fault:
    """A row group with the reasons of its bad rows; or what is wrong with all of it."""
    if isinstance(table, Fault):
        return table
    if table.num_rows != group.num_rows:
        return Fault(f"changed since it was listed ({group.num_rows} rows, now {table.num_rows})")
    if source.encoding is not None:
        try:
            found = encoding_of(table.schema)
        except DataError as error:
            return Fault(f"encoding unknown ({error.found})")
        if found is None or not _agree(found, source.encoding, source.columns):
            return Fault(f"encoded otherwise than wanted ({found})")
    # Shards may differ in how they store the same: 32 or 64 bits, plain strings or a dictionary.
    types = {field.name: field.type for field in lines_schema(source)}
    columns_by_name = {name: table.column(name).cast(types[name]) for name in columns}
    faults = faults_in(table.schema, group.index)
    columns_by_name, reasons = check_rows(
        columns_by_name, source.max_caption_chars, faults, source.encoding
    )
    size = table.num_rows
    return pa.table(
        {
            GROUP: pa.array(np.full(size, number, dtype=np.int32)),
            ROW: pa.array(np.arange(size, dtype=np.int32)),
            **columns_by_name,
            REASON: pa.array(reasons, pa.string()),
        }
    )


def _in_order(table: pa.Table, rows: NDArray[np.int64]) -> pa.Table:
    """The rows of a table in another order.

    Values as large as latents of videos stay where they are, and come as a chunk each: copying them
    into order would cost as much as all else that is done to them.
    """
    large = [
        field.name
        for field in table.schema
        if pa.types.is_binary(field.type)
        and table.column(field.name).nbytes >= _LARGE_BYTES * table.num_rows
    ]
    ordered = table.drop_columns(large).take(pa.array(rows))
    for name in large:
        column = table.column(name)
        chunks = [column.slice(row, 1).chunk(0) for row in rows.tolist()]
        ordered = ordered.append_column(name, pa.chunked_array(chunks, column.type))
    return ordered


def _agree(found: Encoding, wanted: Encoding, columns: Sequence[str]) -> bool:
    """Returns True if what is read of an encoded shard is as wanted; the rest may differ."""
    same = found.dtype == wanted.dtype
    if TEXT_EMBEDS in columns:
        same &= (found.text_shape, found.text_encoder) == (wanted.text_shape, wanted.text_encoder)
    if LATENTS in columns:
        same &= (found.latent_shape, found.vae) == (wanted.latent_shape, wanted.vae)
    return same
