"""The order of the rows: complete, seeded, lazy, and the same from any place on."""

import pickle
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from cluster.schedule.program import Team, partition_samples
from pipelines.data.shards.filesystem import open_folder
from pipelines.data.shards.index import INDEX_NAME
from pipelines.data.shards.indexing import index_folder
from pipelines.data.stream.batch import Batch
from pipelines.data.stream.catalogue import Catalogue
from pipelines.data.stream.feed import Feed, FeedProgress, StreamSettings
from pipelines.data.stream.plan import (
    Cursor,
    RowGroup,
    ShuffleSettings,
    chapter_order,
    windows_of,
)
from pipelines.data.stream.source import Source
from pipelines.data.stream.stream import Planned, plan_windows, read_in_process
from sgmd_core.errors import CheckpointError, DataError
from tests.helpers.shards import write_folder, write_shard

SIZES = (7, 7, 7, 5, 1, 9)
SMALL = ShuffleSettings(shards=2, row_groups=2)
CHAPTERS = ShuffleSettings(chapter_shards=2, shards=2, row_groups=2)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Six shards in row groups of at most three rows."""
    write_folder(tmp_path / "set", SIZES)
    return str(tmp_path / "set")


def feed(
    folder: str,
    seed: int = 0,
    progress: FeedProgress = FeedProgress(),
    shuffle: ShuffleSettings = SMALL,
) -> Feed:
    return Feed(StreamSettings(Source(folder), seed, shuffle), progress, 1000)


def ids(batches: Iterator[Batch] | list[Batch]) -> list[str]:
    return [name for batch in batches for name in batch.sample_ids]


def test_an_epoch_hands_out_every_row_exactly_once(folder: str) -> None:
    stream = feed(folder)
    for _ in range(3):
        names = stream.take(sum(SIZES)).sample_ids
        assert len(set(names)) == sum(SIZES)


def test_epochs_and_seeds_have_orders_of_their_own(folder: str) -> None:
    stream = feed(folder)
    first, second = stream.take(sum(SIZES)).sample_ids, stream.take(sum(SIZES)).sample_ids
    assert first != second
    assert feed(folder, seed=1).take(sum(SIZES)).sample_ids != first
    assert feed(folder).take(sum(SIZES)).sample_ids == first


def test_a_row_keeps_its_own_caption(folder: str) -> None:
    batch = feed(folder).take(sum(SIZES))
    assert batch.captions == tuple(f"clip {name}" for name in batch.sample_ids)


def test_a_batch_travels_without_the_window_that_it_was_cut_from(tmp_path: Path) -> None:
    write_folder(tmp_path, (3000,), group=3000)
    stream = feed(str(tmp_path))
    batch = stream.take(4)
    sent = pickle.dumps(batch)
    assert pickle.loads(sent) == batch
    assert len(sent) < batch.rows.nbytes + 4000 < len(pickle.dumps(batch.rows))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 4, 7, 36, 50])
def test_the_stream_goes_on_from_any_position_as_if_never_stopped(folder: str, size: int) -> None:
    whole = feed(folder, seed=3).take(150).sample_ids
    progress, taken = FeedProgress(), []
    while len(taken) < 150 - size:
        # A new feed for each batch: nothing is left of the one before but the cursor.
        batch = feed(folder, 3, progress).take(size)
        taken += batch.sample_ids
        epoch = batch.cursor.epoch
        in_epoch = sum(count for number, count in batch.epochs if number == epoch)
        used = progress.used_ids if epoch == progress.cursor.epoch else ()
        used += batch.sample_ids[size - in_epoch :]
        progress = FeedProgress(batch.cursor, batch.position, used_ids=used)
    assert taken == list(whole[: len(taken)])


@pytest.mark.slow
def test_an_index_changes_nothing_of_the_order(folder: str) -> None:
    without = feed(folder, shuffle=CHAPTERS).take(100)
    index_folder(*open_folder(folder))
    with_index = feed(folder, shuffle=CHAPTERS).take(100)
    assert (Path(folder) / INDEX_NAME).exists()
    assert with_index.sample_ids == without.sample_ids
    assert with_index.cursor == without.cursor


def test_chapters_come_as_listed_first_and_shuffled_later(folder: str) -> None:
    stream = feed(folder, shuffle=CHAPTERS)
    orders = []
    for _ in range(4):
        names = stream.take(sum(SIZES)).sample_ids
        chapters = [int(name.split("-")[0]) // 2 for name in names]
        orders.append(list(dict.fromkeys(chapters)))
        # A chapter is finished before the next one begins.
        assert chapters == sorted(chapters, key=orders[-1].index)
    assert orders[0] == [0, 1, 2]
    assert orders[1:] == [chapter_order(0, epoch, 3) for epoch in (1, 2, 3)]
    assert len({tuple(order) for order in orders}) > 1


def test_the_first_batch_waits_for_one_chapter_and_one_section(folder: str) -> None:
    catalogue = Catalogue(*open_folder(folder), 2)
    next(plan_windows(catalogue, 0, CHAPTERS))
    assert catalogue.num_shards == 2
    assert not catalogue.is_complete
    rest = Path(folder) / "part-005.parquet"
    rest.write_bytes(b"broken, and nobody has looked yet")
    assert feed(folder, shuffle=CHAPTERS).take(14).rejects == ()


def test_row_groups_of_a_window_are_mixed(folder: str) -> None:
    names = feed(folder).take(6).sample_ids
    places = [(name.split("-")[0], int(name.split("-")[1]) // 3) for name in names]
    assert len(set(places)) > 1
    assert places != sorted(places)


def test_a_window_holds_no_more_bytes_than_it_may() -> None:
    groups = [RowGroup(f"s{shard}", 12 * 2**20, index, 10) for shard in "ab" for index in range(4)]
    cut = windows_of(0, 0, 0, 0, groups, ShuffleSettings(row_groups=8, window_mb=7))
    assert [len(chosen) for chosen, _ in cut] == [2, 2, 2, 2]
    assert {group for chosen, _ in cut for group in chosen} == set(groups)
    alone = windows_of(0, 0, 0, 0, groups, ShuffleSettings(row_groups=8, window_mb=1))
    assert [len(chosen) for chosen, _ in alone] == [1] * 8


def test_epoch_and_passes_are_known_at_every_batch(folder: str) -> None:
    stream, total = feed(folder), sum(SIZES)
    seen = []
    for _ in range(9):
        batch = stream.take(total // 3)
        seen.append((batch.epochs, batch.passes))
    assert [epochs for epochs, _ in seen[:3]] == [((0, 12),)] * 3
    assert [epochs for epochs, _ in seen[3:6]] == [((1, 12),)] * 3
    assert seen[2][1] == pytest.approx(1.0)
    assert [passes for _, passes in seen] == sorted(passes for _, passes in seen)


def test_a_batch_over_the_end_of_an_epoch_says_so(folder: str) -> None:
    batch = feed(folder).take(sum(SIZES) + 4)
    assert batch.epochs == ((0, sum(SIZES)), (1, 4))
    assert batch.cursor.epoch == 1


@pytest.mark.slow
def test_a_folder_that_changes_meanwhile_does_not_shift_what_is_to_come(folder: str) -> None:
    whole = feed(folder).take(72).sample_ids
    stream = feed(folder)
    first = stream.take(20)
    notes = tuple(first.notes)
    write_shard(Path(folder) / "part-000a.parquet", ["new-0", "new-1"])
    (Path(folder) / "part-009.parquet").write_bytes(b"not yet there before")
    progress = FeedProgress(first.cursor, 20, notes, used_ids=first.sample_ids)
    assert feed(folder, 0, progress).take(52).sample_ids == whole[20:]


def test_listing_goes_on_after_what_was_written_down(folder: str) -> None:
    whole = feed(folder, shuffle=CHAPTERS).take(100).sample_ids
    first = feed(folder, shuffle=CHAPTERS).take(10)
    progress = FeedProgress(first.cursor, 10, tuple(first.notes), used_ids=first.sample_ids)
    assert sum(len(line.get("shards", ())) for line in first.notes) == 2
    assert feed(folder, 0, progress, CHAPTERS).take(90).sample_ids == whole[10:]


def test_going_on_with_another_number_of_ranks_uses_every_sample_once(folder: str) -> None:
    """Stopped after each batch, and taken up by 1, 2, 3, ... ranks in turn."""
    progress, used = FeedProgress(), []
    for num_ranks in range(1, 10):
        batch = feed(folder, 0, progress).take(4)
        for share in partition_samples(4, Team(replicas=num_ranks), round=0):
            used += batch.sample_ids[slice(*share.samples)]
        progress = replace(progress, cursor=batch.cursor, rows=batch.position, used_ids=tuple(used))
    assert len(used) == sum(SIZES) == len(set(used))


def test_a_missing_folder_is_named_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.*sgmd shapes"):
        feed(str(tmp_path / "nowhere")).take(1)


def test_files_of_ours_and_of_tools_are_no_shards(folder: str) -> None:
    for name in ("_staging/part-8.parquet", ".hidden.parquet", "notes.txt"):
        path = Path(folder) / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no shard")
    write_shard(Path(folder) / "deeper" / "one.parquet", ["deep"])
    assert "deep" in feed(folder).take(sum(SIZES) + 1).sample_ids


def test_a_cursor_survives_a_manifest_and_refuses_another() -> None:
    cursor = Cursor(3, 1, 4, 1, 5)
    assert Cursor.from_json(cursor.to_json()) == cursor
    with pytest.raises(CheckpointError, match=r"another version"):
        Cursor.from_json(None)


def test_the_plan_is_endless_and_asks_for_nothing_twice(folder: str) -> None:
    catalogue = Catalogue(*open_folder(folder), 1000)
    windows = list(islice(plan_windows(catalogue, 0, SMALL), 40))
    assert {planned.window.cursor.epoch for planned in windows} > {0, 1, 2}
    opened = [
        path for planned in windows for note in planned.notes for path in note.get("rows", ())
    ]
    assert len(opened) == len(set(opened)) == len(SIZES)


def test_one_window_is_read_ahead_and_none_beyond_what_will_be_taken(folder: str) -> None:
    source = Source(folder)
    planned: list[Planned] = []

    def plan() -> Iterator[Planned]:
        catalogue = Catalogue(*open_folder(folder), 1000)
        for each in plan_windows(catalogue, 0, SMALL):
            planned.append(each)
            yield each

    windows = read_in_process(plan(), source, num_rows=2**30)
    first, _ = next(windows)
    end = time.monotonic() + 30
    while len(planned) < 2:
        assert time.monotonic() < end, "nothing is read while the first window is handed out"
        time.sleep(0.01)
    windows.close()

    planned.clear()
    windows = read_in_process(plan(), source, num_rows=first.window.num_rows)
    assert next(windows)[0] == first
    time.sleep(0.5)
    assert len(planned) == 1
    # More may be taken all the same.
    assert next(windows)[0].window.num_rows > 0
    windows.close()
