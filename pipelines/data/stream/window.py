"""Reads one window: its row groups together, every row checked and put in its place.

    row groups -> columns of all -> checks -> the window's permutation -> one table

Every row of the window comes out: usable, or with the reason why not. A row group that cannot be
read comes out as one row. So a count of the rows can prove that none was lost on the way.
"""

from collections.abc import Mapping, Sequence

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
    """Reads a window: `put_in_order` of `fetch_groups`."""
    return put_in_order(source, window, fetch_groups(reader, source, window))


def fetch_groups(reader: RowGroupReader, source: Source, window: Window) -> list[pa.Table | Fault]:
    """Reads the row groups of a window, as they are.

    Args:
        reader: Of the source's folder.
        source: What is wanted.
        window: What to read.

    Raises:
        DataError: The server failed; see `pipelines.data.shards.parquet.fetch`.
    """
    places = [(each.shard, each.num_bytes, each.index) for each in window.groups]
    return reader.read(places, [*REQUIRED_COLUMNS, *source.columns])


def put_in_order(source: Source, window: Window, tables: Sequence[pa.Table | Fault]) -> pa.Table:
    """Checks the rows of a window and puts them in their places.

    Args:
        source: What is wanted.
        window: What was read; rows before `cursor.row` of its order and from `stop` on are left
            out.
        tables: What `fetch_groups` has read.

    Returns:
        One line for each row, in the window's order: `place` in that order, number of the row
        `group` in the window, `row` in the row group, sample_id, caption, the wanted columns, and
        `reason`, which is null for a row that can be used. Before them, one line with `row`
        `WHOLE_GROUP` for each row group that cannot be read. Videos are as they were stored: see
        `pipelines.data.stream.window_decoding`.
    """
    groups = window.groups
    columns = [*REQUIRED_COLUMNS, *source.columns]
    usable: list[pa.Table] = []
    faults: list[tuple[int, str]] = []
    reasons: dict[int, str] = {}
    sizes = np.array([group.num_rows for group in groups])
    first_rows = np.cumsum(sizes) - sizes
    for number, (group, table) in enumerate(zip(groups, tables, strict=True)):
        checked = _checked(source, group, table, columns)
        if isinstance(checked, Fault):
            faults.append((number, checked.reason))
        else:
            usable.append(checked[0])
            first = int(first_rows[number])
            reasons |= {first + row: reason for row, reason in checked[1].items()}
    schema = lines_schema(source)
    parts = [_fault_lines(faults, schema)]
    if usable:
        numbers = np.repeat(np.arange(len(groups)), sizes)
        is_usable = ~np.isin(numbers, [number for number, _ in faults])
        order = window.order()
        places = np.flatnonzero(is_usable[order])
        first = window.cursor.row
        places = places[(places >= first) & (places < first + window.num_wanted)]
        chosen = order[places]
        taken = _in_order(pa.concat_tables(usable), (np.cumsum(is_usable) - 1)[chosen])
        lines = {
            PLACE: pa.array(places, pa.int32()),
            GROUP: pa.array(numbers[chosen], pa.int32()),
            ROW: pa.array(chosen - first_rows[numbers[chosen]], pa.int32()),
            **{name: taken.column(name) for name in columns},
            REASON: _reasons_at(chosen, reasons, window.num_rows),
        }
        parts.append(pa.table(lines, schema=schema))
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


def _reasons_at(rows: NDArray[np.int64], reasons: Mapping[int, str], num_rows: int) -> pa.Array:
    """The reasons of some of a window's rows, null for those that can be used."""
    if not reasons:
        return pa.nulls(len(rows), pa.string())
    of_all = np.full(num_rows, None, dtype=object)
    of_all[[*reasons]] = [*reasons.values()]
    return pa.array(of_all[rows], pa.string())


def _checked(
    source: Source, group: RowGroup, table: pa.Table | Fault, columns: Sequence[str]
) -> tuple[pa.Table, dict[int, str]] | Fault:
    """A row group and the reasons of its bad rows; or what is wrong with all of it."""
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
    return pa.table(columns_by_name), reasons


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
