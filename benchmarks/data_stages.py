"""CPU time of the feed, stage by stage, in one process and without Ray."""

import time
from itertools import takewhile

import pyarrow as pa

from pipelines.data.shards.filesystem import open_folder
from pipelines.data.shards.schema import REQUIRED_COLUMNS
from pipelines.data.stream.catalogue import Catalogue
from pipelines.data.stream.feed import Feed, FeedProgress, StreamSettings
from pipelines.data.stream.plan import ShuffleSettings
from pipelines.data.stream.source import Source
from pipelines.data.stream.stream import plan_windows
from pipelines.data.stream.window import read_window


def read_in_stages(source: Source, num_rows: int, batch: int) -> dict[str, dict[str, float]]:
    """One pass as far as some stage: rows a second, CPU seconds.

    `in_words` is what a text encoder adds: Python strings of ids and captions.
    """
    catalogue = Catalogue(*open_folder(source.url), 1000)
    plan = plan_windows(catalogue, 0, ShuffleSettings())
    windows = [each.window for each in takewhile(lambda each: not each.window.cursor.epoch, plan)]
    reader = source.open_reader()
    columns = [*REQUIRED_COLUMNS, *source.columns]
    checked_last = pa.table({})

    def fetched() -> None:
        for window in windows:
            groups = window.groups
            reader.read([(each.shard, each.num_bytes, each.index) for each in groups], columns)

    def checked() -> None:
        nonlocal checked_last
        for window in windows:
            checked_last = read_window(reader, source, window)

    def in_words() -> None:
        table = checked_last.select(REQUIRED_COLUMNS)
        for first in range(0, num_rows, batch):
            part = table.slice(first % table.num_rows, batch)
            for name in REQUIRED_COLUMNS:
                tuple(part.column(name).to_pylist())

    def handed_out() -> None:
        with Feed(StreamSettings(source, seed=0), FeedProgress(), num_rows) as feed:
            for _ in range(num_rows // batch):
                taken = feed.take(batch)
                if source.columns:
                    assert len(feed.latents(taken.number)) == batch

    found: dict[str, dict[str, float]] = {}
    for stage in (fetched, checked, in_words, handed_out):
        began, cpu = time.perf_counter(), time.process_time()
        stage()
        found[stage.__name__] = {
            "rows_per_s": num_rows / (time.perf_counter() - began),
            "cpu_s": time.process_time() - cpu,
        }
    return found
