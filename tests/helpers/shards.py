"""Small folders of shards whose rows say where they are from."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def write_shard(
    path: Path,
    ids: Sequence[str | None],
    captions: Sequence[str | None] | None = None,
    group: int = 3,
) -> None:
    """One shard of captions; each is "clip ID" where none is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    told = captions if captions is not None else [f"clip {name}" for name in ids]
    columns = {"sample_id": pa.array(ids, pa.string()), "caption": pa.array(told, pa.string())}
    pq.write_table(pa.table(columns), path, row_group_size=group)


def write_folder(folder: Path, sizes: Sequence[int], group: int = 3) -> list[str]:
    """Shards `part-NNN.parquet` of these sizes; returns all ids, "SHARD-ROW"."""
    names: list[str] = []
    for shard, size in enumerate(sizes):
        ids = [f"{shard}-{row}" for row in range(size)]
        write_shard(folder / f"part-{shard:03d}.parquet", ids, group=group)
        names += ids
    return names


def byte_strings(values: Sequence[str | bytes | None]) -> pa.Array:
    """Strings, some of which are bytes that are not UTF-8."""
    raw = [each.encode() if isinstance(each, str) else each for each in values]
    array = pa.array(raw, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(array), array.buffers())


def write_unknown_page(path: Path, table: pa.Table, group: int = 4) -> None:
    """A Parquet file whose first page has a kind that no version of the format has.

    Arrow passes over such a page: the first row group comes out shorter than its footer says.
    """
    pq.write_table(table, path, row_group_size=group, use_dictionary=False)
    content = bytearray(path.read_bytes())
    # After the magic: the header of the first field, and its value, the kind of the page.
    assert content[4:6] == b"\x15\x00"
    content[5] = 0x7F
    path.write_bytes(content)
