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
    """Strings, some of which are bytes that are no UTF-8."""
    raw = [each.encode() if isinstance(each, str) else each for each in values]
    array = pa.array(raw, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(array), array.buffers())
