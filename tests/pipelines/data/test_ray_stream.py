"""What travels between the plan and the processes that read for it; Ray itself is not needed."""

import pickle
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.data.catalogue import Catalogue
from pipelines.data.filesystem import open_folder
from pipelines.data.plan import ShuffleSettings, Window
from pipelines.data.ray_stream import by_window, fault_line, raise_fault, read_block, tasks_of
from pipelines.data.stream import plan_windows
from pipelines.data.window import Source, read_window
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


def test_a_task_reads_several_windows_of_captions_and_one_of_anything_else(source: Source) -> None:
    windows = windows_in(source, 32)
    tasks = tasks_of(windows, source)
    assert [len(task) for task in tasks] == [4] * 8
    assert [pair for task in tasks for pair in task] == list(enumerate(windows))
    # The first windows are wanted soon.
    assert [len(task) for task in tasks_of(windows[:8], source)] == [1] * 8
    videos = Source(source.url, columns=("video",))
    assert [len(task) for task in tasks_of(windows, videos)] == [1] * 32


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
