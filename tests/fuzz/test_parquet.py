"""Of a damaged shard, every row is handed out as it was or counted as unusable."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.checking.check import CheckOptions, check_shards
from pipelines.data.shards.filesystem import open_folder
from pipelines.data.shards.index import Shard, write_index
from pipelines.data.shards.rejection import Rejection
from pipelines.data.shards.schema import caption_schema, parquet_options
from pipelines.data.stream.feed import Feed, FeedProgress, StreamSettings
from pipelines.data.stream.source import Source
from sgmd_core.errors import DataError
from tests.fuzz.mutations import NUM_CASES, mutate_bytes, time_limit

ROWS, GROUP = 12, 4
SHARDS = ("a.parquet", "b.parquet")
CAPTIONS = {f"{shard}-{row}": f"clip {row} of {shard}" for shard in SHARDS for row in range(ROWS)}


def write_set(folder: Path) -> bytes:
    """Two shards as `sgmd prepare` writes them; returns the bytes of the first one."""
    folder.mkdir()
    schema, shards = pa.schema(caption_schema()), []
    for shard in SHARDS:
        ids = [name for name in CAPTIONS if name.startswith(shard)]
        table = pa.table([ids, [CAPTIONS[name] for name in ids]], schema=schema)
        pq.write_table(table, folder / shard, row_group_size=GROUP, **parquet_options(schema))
        shards.append(Shard(shard, (folder / shard).stat().st_size, (GROUP,) * (ROWS // GROUP)))
    write_index(*open_folder(str(folder)), shards)
    return (folder / SHARDS[0]).read_bytes()


def one_epoch(folder: Path) -> tuple[dict[str, str], list[Rejection]]:
    """Captions by id, and rejects, of the first epoch."""
    settings = StreamSettings(Source(str(folder)), 0, max_bad_fraction=1.0)
    feed, rows, rejects = Feed(settings, FeedProgress(), 1000), {}, []
    while True:
        batch = feed.take(1)
        rejects += batch.rejects
        if batch.stop is not None or batch.cursor.epoch:
            return rows, rejects
        rows |= dict(zip(batch.sample_ids, batch.captions, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("indexed", [True, False])
def test_every_row_of_a_damaged_shard_is_handed_out_or_rejected(indexed, tmp_path: Path):
    folder = tmp_path / "set"
    data, reported = write_set(folder), 0
    if not indexed:
        (folder / "_index.json").unlink()
    for seed in range(NUM_CASES):
        (folder / SHARDS[0]).write_bytes(mutate_bytes(data, seed))
        try:
            with time_limit():
                rows, rejects = one_epoch(folder)
        except DataError:
            reported += 1
            continue
        assert rows.items() <= CAPTIONS.items(), seed
        lost = len(CAPTIONS) - len(rows)
        counted = sum(ROWS if each.num_rows is None else each.num_rows for each in rejects)
        assert counted >= lost, (seed, rows, rejects)
        reported += lost > 0
    assert reported


@pytest.mark.slow
def test_check_counts_what_is_damaged(tmp_path: Path):
    folder = tmp_path / "set"
    data, found = write_set(folder), Counter()
    options = CheckOptions(num_processes=0)
    assert check_shards(str(folder), options).is_usable
    for seed in range(NUM_CASES):
        (folder / SHARDS[0]).write_bytes(mutate_bytes(data, seed))
        with time_limit():
            report = check_shards(str(folder), options)
        rows, _ = one_epoch(folder)
        assert report.bad or report.problems or rows == CAPTIONS, seed
        found[report.is_usable] += 1
    assert found[False]
