"""What travels between the plan and the processes that read for it; what reading ahead costs."""

import pickle
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.data.shards.filesystem import open_folder
from pipelines.data.stream.catalogue import Catalogue
from pipelines.data.stream.feed import Feed, FeedProgress, StreamSettings
from pipelines.data.stream.plan import ShuffleSettings, Window
from pipelines.data.stream.ray_stream import (
    ReadAheadSettings,
    by_window,
    fault_line,
    raise_fault,
    read_block,
    tasks_of,
)
from pipelines.data.stream.source import Source
from pipelines.data.stream.stream import plan_windows
from pipelines.data.stream.window import read_window
from sgmd_core.errors import DataError
from tests.helpers.shards import write_folder


@pytest.fixture
def source(tmp_path: Path) -> Source:
    write_folder(tmp_path / "set", (9,) * 16)
    return Source(str(tmp_path / "set"))


def windows_in(source: Source, count: int) -> list[Window]:
    catalogue = Catalogue(*open_folder(source.url), 1000)
    plan = plan_windows(catalogue, 0, ShuffleSettings(row_groups=1))
    return [planned.window for planned in islice(plan, count)]


def test_a_task_reads_several_windows_but_decodes_the_videos_of_one(source: Source) -> None:
    windows = windows_in(source, 32)
    tasks = tasks_of(windows, source)
    assert [len(task) for task in tasks] == [4] * 8
    assert [pair for task in tasks for pair in task] == list(enumerate(windows))
    # The first windows are wanted soon.
    assert [len(task) for task in tasks_of(windows[:8], source)] == [1] * 8
    videos = Source(source.url, columns=("video",), decode=decode)
    assert [len(task) for task in tasks_of(windows, videos)] == [1] * 32
    stored = Source(source.url, columns=("latents",))
    assert {len(task) for task in tasks_of(windows * 3, stored)} == {4}


def decode(data: bytes, fps: float) -> np.ndarray:
    raise AssertionError("nothing is decoded here")


def test_windows_that_ray_data_joins_come_apart_again(source: Source) -> None:
    windows = windows_in(source, 32)
    task = tasks_of(windows, source)[1]
    lines = read_block(pa.table({"task": [pickle.dumps(task)]}), source)
    parts = list(by_window(iter([pa.concat_tables(lines)])))
    assert [part.column("window").unique().to_pylist() for part in parts] == [[4], [5], [6], [7]]
    reader = source.open_reader()
    for part, (_, window) in zip(parts, task, strict=True):
        assert part.column("window_lines").unique().to_pylist() == [part.num_rows]
        plain = part.drop_columns(["window", "window_lines"])
        assert plain.equals(read_window(reader, source, window))


def test_an_error_of_the_server_travels_in_the_place_of_its_window(source: Source) -> None:
    window = windows_in(source, 1)[0]
    good = next(read_block(pa.table({"task": [pickle.dumps([(0, window)])]}), source))
    bad = fault_line(1, DataError("reading x", "503", "an answer", "Try later"), source)
    first, second = by_window(iter([pa.concat_tables([good, bad])]))
    raise_fault(first)
    with pytest.raises(DataError, match=r"While reading x: 503\. Expected an answer\. Try later"):
        raise_fault(second)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_reading_ahead_rests_once_it_has_read_as_far_as_it_may(source: Source) -> None:
    settings = StreamSettings(
        source, 0, ShuffleSettings(row_groups=1), ahead=ReadAheadSettings(store_mb=0.002)
    )
    with Feed(settings, FeedProgress(), 9 * 16) as stream:
        stream.take(1)
        time.sleep(2.0)
        before = time.process_time()
        time.sleep(2.0)
        used_s = time.process_time() - before
        # Ray Data's loop left to itself takes as much as it gets, here about all of a core.
        assert used_s < 0.5
        assert len(set(stream.take(9 * 16 - 1).sample_ids)) == 9 * 16 - 1
