"""Columns that are checked whole give what a loop over the rows gives, however messy the shards."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.shards.caption_rule import caption_fault
from pipelines.data.shards.filesystem import open_folder
from pipelines.data.shards.rejection import Reason
from pipelines.data.stream.catalogue import Catalogue
from pipelines.data.stream.feed import Feed, FeedProgress, StreamSettings
from pipelines.data.stream.plan import RowGroup, ShuffleSettings
from pipelines.data.stream.source import Source
from pipelines.data.stream.stream import plan_windows
from tests.helpers.shards import byte_strings

SEED, LIMIT, EPOCHS, GROUP = 3, 12, 3, 7
SHUFFLE = ShuffleSettings(shards=3, row_groups=4)
IDS = [None, "", b"\xff", "é1", "again", "again-2", "again-3"]
CAPTIONS = [
    None,
    "",
    " \t\n",
    "\u00a0",
    b"gr\xf6\xdfer",
    "é" * 13,
    "a" * 13,
    f" {'ü' * LIMIT}\u3000",
    "é",
]

Row = tuple[str, str]
Reject = tuple[str, str, int | None, int | None, str, str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards of which some are clean, some have bad rows, and one has a damaged row group."""
    rng = np.random.default_rng(0)
    for shard in range(9):
        is_messy = shard % 3 > 0
        rows = range(int(rng.integers(1, 40)))
        ids = [f"{shard}-{row}" for row in rows]
        captions = [f"clip {row}" for row in rows]
        for row in rows:
            if is_messy and rng.random() < 0.2:
                ids[row] = IDS[rng.integers(len(IDS))]
            if is_messy and rng.random() < 0.2:
                captions[row] = CAPTIONS[rng.integers(len(CAPTIONS))]
        table = pa.table({"sample_id": byte_strings(ids), "caption": byte_strings(captions)})
        path = tmp_path / f"part-{shard}.parquet"
        options = {"compression": "none", "write_page_checksum": True, "use_dictionary": False}
        pq.write_table(table, path, row_group_size=GROUP, **options)
    (tmp_path / "part-9.parquet").write_bytes(b"no shard")
    damaged = bytearray((tmp_path / "part-0.parquet").read_bytes())
    damaged[damaged.index(b"clip 3")] ^= 1
    (tmp_path / "part-0.parquet").write_bytes(damaged)
    return tmp_path


def row_by_row(folder: Path) -> tuple[list[Row], list[Reject]]:
    """What some epochs hand out, and what they leave out, by a loop over the rows."""
    rows: list[Row] = []
    rejects: dict[tuple[str, int | None, int | None], Reject] = {}
    seen: set[tuple[int, str]] = set()
    for planned in plan_windows(Catalogue(*open_folder(str(folder)), 1000), SEED, SHUFFLE):
        window = planned.window
        if window.cursor.epoch == EPOCHS:
            return rows, [*rejects.values()]
        for each in planned.rejects:
            rejects.setdefault(each.place, (*each.place, "", each.reason, each.detail))
        found = [stored_rows(folder, group) for group in window.groups]
        for group, stored in zip(window.groups, found, strict=True):
            if stored is None:
                place = (group.shard, group.index, None)
                rejects.setdefault(place, (*place, "", "corrupt row group", ""))
        places = [
            (group, row, stored[row] if stored else None)
            for group, stored in zip(window.groups, found, strict=True)
            for row in range(group.num_rows)
        ]
        good = []
        for group, row, stored in (places[number] for number in window.order()):
            if stored is None:
                continue
            name, caption, why = judged(*stored)
            place = (group.shard, group.index, row)
            if why is None:
                good.append((place, name, caption))
            else:
                rejects.setdefault(place, (*place, name, *why))
        again = (Reason.DUPLICATE_ID, "an earlier row of the epoch has it")
        known = {place for place, entry in rejects.items() if entry[4:] == again}
        for place, name, caption in good:
            key = (window.cursor.epoch, name)
            if place in known or key in seen:
                rejects.setdefault(place, (*place, name, *again))
            else:
                seen.add(key)
                rows.append((name, caption))
    raise AssertionError("unreachable: the plan is endless")


def stored_rows(folder: Path, group: RowGroup) -> list[tuple[bytes | None, bytes | None]] | None:
    """Ids and captions of a row group as bytes; None where it cannot be read."""
    try:
        file = pq.ParquetFile(folder / group.shard, page_checksum_verification=True)
        table = file.read_row_group(group.index)
    except OSError:
        return None
    columns = [table[name].cast(pa.binary()).to_pylist() for name in ("sample_id", "caption")]
    return [*zip(*columns, strict=True)]


def judged(name: bytes | None, caption: bytes | None) -> tuple[str, str, tuple[str, str] | None]:
    """The texts of a row, and why it cannot be used."""
    texts = [(each or b"").decode(errors="replace") for each in (name, caption)]
    why = caption_fault(None if caption is None else texts[1], LIMIT)
    if caption is not None and texts[1].encode() != caption:
        why = (Reason.UNREADABLE_CAPTION, "no UTF-8")
    if name is not None and texts[0].encode() != name:
        why = (Reason.NO_ID, "no UTF-8")
    elif not name:
        why = (Reason.NO_ID, "")
    return *texts, why


@pytest.mark.slow
def test_messy_shards_come_as_a_loop_over_their_rows_would_hand_them_out(folder: Path) -> None:
    expected, left_out = row_by_row(folder)
    reasons = {reason for *_, reason, _ in left_out}
    assert reasons >= {
        "no_id",
        "duplicate_id",
        "empty_caption",
        "long_caption",
        "unreadable_caption",
        "corrupt row group",
    }
    assert any(caption.startswith(" ") for _, caption in expected)
    source = Source(str(folder), max_caption_chars=LIMIT)
    settings = StreamSettings(source, SEED, SHUFFLE, max_bad_fraction=1.0)
    rows: list[Row] = []
    rejects: list[Reject] = []
    with Feed(settings, FeedProgress(), len(expected)) as feed:
        while len(rows) < len(expected):
            batch = feed.take(min(1 + len(rows) % 17, len(expected) - len(rows)))
            rows += zip(batch.sample_ids, batch.captions, strict=True)
            for each in batch.rejects:
                detail = "" if each.reason == "corrupt row group" else each.detail
                rejects.append((*each.place, each.sample_id, str(each.reason), detail))
    assert rows == expected
    assert rejects == left_out
