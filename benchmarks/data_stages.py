"""CPU time of the feed, stage by stage, in one process and without Ray."""

import statistics
import time

import pyarrow as pa

from pipelines.data.shards.filesystem import open_folder
from pipelines.data.shards.schema import REQUIRED_COLUMNS
from pipelines.data.stream.catalogue import Catalogue
from pipelines.data.stream.feed import Feed, FeedProgress, StreamSettings
from pipelines.data.stream.plan import ShuffleSettings, Window
from pipelines.data.stream.source import Source
from pipelines.data.stream.stream import plan_windows
from pipelines.data.stream.window import fetch_groups, read_window


def read_in_stages(
    source: Source, num_rows: int, batch: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Passes as far as some stage: rows a second and CPU seconds, medians of the rounds.

    `in_words` is what a text encoder adds: Python strings of ids and captions.
    """
    runs = [_pass_in_stages(source, num_rows, batch) for _ in range(rounds)]
    return {
        stage: {unit: statistics.median(run[stage][unit] for run in runs) for unit in units}
        for stage, units in runs[0].items()
    }


def _pass_in_stages(source: Source, num_rows: int, batch: int) -> dict[str, dict[str, float]]:
    windows: list[Window] = []
    checked_last = pa.table({})

    def planned() -> None:
        catalogue = Catalogue(*open_folder(source.url), 1000)
        for each in plan_windows(catalogue, 0, ShuffleSettings()):
            if each.window.cursor.epoch:
                return
            windows.append(each.window)

    def fetched() -> None:
        reader = source.open_reader()
        for window in windows:
            fetch_groups(reader, source, window)

    def checked() -> None:
        nonlocal checked_last
        reader = source.open_reader()
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
    for stage in (planned, fetched, checked, handed_out, in_words):
        began, cpu = time.perf_counter(), time.process_time()
        stage()
        found[stage.__name__] = {
            "rows_per_s": num_rows / (time.perf_counter() - began),
            "cpu_s": time.process_time() - cpu,
        }
    return found
