"""The ledger keeps what was used, however the process ends, and the verdict tells the truth."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.data.shards.filesystem import S3Settings, open_folder
from pipelines.data.shards.parquet import RowGroupReader
from pipelines.data.shards.rejection import Rejection
from pipelines.data.shards.schema import caption_schema
from pipelines.data.stream.batch import Batch
from pipelines.data.stream.catalogue import Catalogue
from pipelines.data.stream.feed import Feed, FeedProgress, StreamSettings
from pipelines.data.stream.ledger import Ledger, LedgerEntry
from pipelines.data.stream.plan import Cursor, ShuffleSettings
from pipelines.data.stream.reconciliation import DueRow, due_rows, reconcile
from pipelines.data.stream.source import Source
from tests.helpers.shards import write_folder, write_shard

SMALL = ShuffleSettings(shards=2, row_groups=2)


def batch(ids: tuple[str, ...], epochs=None, cursor=Cursor()) -> Batch:
    rows = pa.table({"sample_id": ids, "caption": ids}, caption_schema())
    return Batch(0, rows, epochs or ((0, len(ids)),), cursor, len(ids), 0.0, rejects=(), notes=())


def entry(iteration: int, ids: tuple[str, ...], epochs=None) -> LedgerEntry:
    return LedgerEntry(iteration, epochs or ((0, len(ids)),), Cursor(), ids)


def due(*names: str, epoch: int = 0, quarantined: tuple[str, ...] = ()) -> list[DueRow]:
    return [DueRow(epoch, name, name in quarantined) for name in names]


def test_what_was_entered_is_read_back_in_order(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    cursor = Cursor(1, 0, 2, 3, 4)
    for iteration in (0, 1, 999, 1000, 2500):
        ledger.append(iteration, [batch((f"é{iteration}",)), batch(("b", "c"), cursor=cursor)])
    entries = list(ledger.entries())
    assert [each.iteration for each in entries] == [0, 1, 999, 1000, 2500]
    assert entries[2].sample_ids == ("é999", "b", "c")
    assert entries[2].cursor == cursor
    assert len(list((tmp_path / "ledger").iterdir())) == 3


def test_ids_are_told_apart_by_epoch(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    ledger.append(0, [batch(("a", "b", "c"), ((0, 2), (1, 1)))])
    ledger.append(1, [batch(("d",), ((1, 1),))])
    assert ledger.ids_of(0) == ["a", "b"]
    assert ledger.ids_of(1) == ["c", "d"]


@pytest.mark.parametrize("first_dropped", [0, 1, 998, 1000, 1001])
def test_rewinding_drops_the_lines_from_an_iteration_on(tmp_path: Path, first_dropped: int) -> None:
    ledger = Ledger(tmp_path / "ledger")
    iterations = (0, 1, 998, 999, 1000, 1001, 2000)
    for iteration in iterations:
        ledger.append(iteration, [batch((str(iteration),))])
    ledger.rewind(first_dropped)
    kept = [number for number in iterations if number < first_dropped]
    assert [each.iteration for each in ledger.entries()] == kept
    ledger.append(first_dropped, [batch(("again",))])
    assert [each.iteration for each in ledger.entries()] == [*kept, first_dropped]


def test_a_torn_last_line_is_not_read_and_goes_with_a_rewind(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    for iteration in range(3):
        ledger.append(iteration, [batch((str(iteration),))])
    path = next((tmp_path / "ledger").iterdir())
    path.write_bytes(path.read_bytes()[:-9])
    assert [each.iteration for each in ledger.entries()] == [0, 1]
    ledger.rewind(2)
    ledger.append(2, [batch(("2",))])
    assert [each.iteration for each in ledger.entries()] == [0, 1, 2]


def test_every_sample_once_is_clean() -> None:
    (verdict,) = reconcile(due("a", "b", "c"), [entry(0, ("b",)), entry(1, ("a", "c"))])
    assert verdict.is_clean
    assert (verdict.due, verdict.used_once) == (3, 3)


def test_each_fault_is_told_by_its_name() -> None:
    rows = due("a", "b", "c", "d", quarantined=("d",))
    (verdict,) = reconcile(rows, [entry(0, ("a", "b", "b", "x"))])
    assert not verdict.is_clean
    found = (verdict.used_once, verdict.repeated, verdict.missing, verdict.quarantined)
    assert found == (1, 1, 1, 1)
    assert verdict.unknown == 1
    assert verdict.examples == ["repeated b (2 times)", "unknown x", "missing c"]


def test_epochs_are_judged_apart() -> None:
    rows = due("a", "b") + due("b", "a", epoch=1)
    entries = [entry(0, ("a", "b", "b"), ((0, 2), (1, 1))), entry(1, ("a",), ((1, 1),))]
    assert [each.is_clean for each in reconcile(rows, entries)] == [True, True]
    swapped = [entry(0, ("a", "b", "b"), ((0, 1), (1, 2))), entries[1]]
    assert [each.is_clean for each in reconcile(rows, swapped)] == [False, False]


def test_of_two_rows_with_one_id_one_is_used_and_one_quarantined() -> None:
    rows = [DueRow(0, "a", False), DueRow(0, "a", True)]
    (verdict,) = reconcile(rows, [entry(0, ("a",))])
    assert verdict.is_clean
    (verdict,) = reconcile([DueRow(0, "a", False), DueRow(0, "a", False)], [entry(0, ("a",))])
    assert verdict.missing == 1


def test_the_plan_replayed_agrees_with_what_a_feed_handed_out(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_folder(folder, (7, 7, 5))
    write_shard(folder / "bad.parquet", ["x", "0-1", "y"], ["", "a twin", "good"])
    (folder / "cut.parquet").write_bytes(b"PAR1")
    source = Source(str(folder))
    feed = Feed(StreamSettings(source, 4, SMALL, max_bad_fraction=1.0), FeedProgress(), 100)
    ledger = Ledger(tmp_path / "ledger")
    rejects: list[Rejection] = []
    notes = []
    for iteration in range(11):
        taken = feed.take(5)
        ledger.append(iteration, [taken])
        rejects += taken.rejects
        notes += taken.notes
    filesystem, root = open_folder(str(folder))

    def replayed(without: int = -1, rejects: list[Rejection] = rejects) -> list:
        entries = [each for each in ledger.entries() if each.iteration != without]
        catalogue = Catalogue(filesystem, root, 1000, recorded=notes)
        reader = RowGroupReader(filesystem, root, S3Settings())
        end = entries[-1].cursor
        return reconcile(due_rows(catalogue, reader, 4, SMALL, end, rejects), entries)

    verdicts = replayed()
    assert [each.epoch for each in verdicts] == [0, 1, 2]
    assert all(each.is_clean for each in verdicts)
    assert (verdicts[0].due, verdicts[0].used_once, verdicts[0].quarantined) == (22, 20, 2)
    assert sum(each.used_once for each in verdicts) == 55
    assert sum(each.missing for each in replayed(without=3)) == 5
    assert replayed(rejects=[])[0].missing == 2
