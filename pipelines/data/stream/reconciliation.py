"""Reconciles a run's ledger with the plan: every sample is used once.

    plan, replayed from the start (ids only)  ->  rows that were due, by epoch
    ledger                                    ->  ids that were used, by epoch
    quarantine.parquet                        ->  rows that were left out, and why

A row that was due is used once, repeated, quarantined or missing. Ids that were used and not due
are unknown: they are no (longer) in the data.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

from pipelines.data.shards.parquet import Fault, RowGroupReader
from pipelines.data.shards.rejection import Place, Rejection
from pipelines.data.shards.schema import SAMPLE_ID
from pipelines.data.shards.text import decode_utf8
from pipelines.data.stream.catalogue import Catalogue
from pipelines.data.stream.ledger import LedgerEntry
from pipelines.data.stream.plan import Cursor, ShuffleSettings, Window
from pipelines.data.stream.stream import plan_windows

_NUM_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class DueRow:
    """A row whose turn has come.

    Attributes:
        epoch: In which pass.
        sample_id: Its id; None where it has none or can no longer be read.
        is_quarantined: Whether the run says that it left it out.
    """

    epoch: int
    sample_id: str | None
    is_quarantined: bool


@dataclass(slots=True)
class EpochReconciliation:
    """Fate of the rows of one epoch, as far as the run has come.

    Attributes:
        epoch: Which pass.
        due: Rows whose turn has come.
        used_once: Ids used exactly once.
        quarantined: Rows left out, with their reason in quarantine.parquet.
        repeated: Ids used more than once.
        missing: Rows neither used nor quarantined.
        unknown: Ids used that were not due.
        examples: A few ids of the last three kinds.
    """

    epoch: int
    due: int = 0
    used_once: int = 0
    quarantined: int = 0
    repeated: int = 0
    missing: int = 0
    unknown: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """True if every row that was due is used once or quarantined."""
        return not (self.repeated or self.missing or self.unknown)

    def to_json(self) -> dict[str, Any]:
        """As `sgmd ledger --json` prints it."""
        return {**asdict(self), "clean": self.is_clean}


def reconcile(due: Iterable[DueRow], entries: Iterable[LedgerEntry]) -> list[EpochReconciliation]:
    """Compares what was due with what was used, epoch by epoch.

    Args:
        due: In the plan's order, up to where the ledger ends.
        entries: The ledger, oldest first.
    """
    used: dict[int, Counter[str]] = {}
    for entry in entries:
        for epoch, ids in entry.by_epoch():
            used.setdefault(epoch, Counter()).update(ids)
    verdicts = {
        epoch: _judge_epoch(epoch, rows, used.pop(epoch, Counter()))
        for epoch, rows in groupby(due, key=lambda row: row.epoch)
    }
    for epoch, ids in used.items():
        verdicts[epoch] = _judge_epoch(epoch, (), ids)
    return [verdicts[epoch] for epoch in sorted(verdicts)]


def due_rows(
    catalogue: Catalogue,
    reader: RowGroupReader,
    seed: int,
    shuffle: ShuffleSettings,
    end: Cursor,
    rejects: Iterable[Rejection],
) -> Iterator[DueRow]:
    """Replays the plan from the start of a run to a place; reads ids alone.

    Args:
        catalogue: The folder as the run wrote it down.
        reader: Of the same folder.
        seed: The run's seed.
        shuffle: The run's.
        end: The row that was to come next.
        rejects: The run's quarantine.

    Raises:
        DataError: The folder cannot be read.
    """
    left_out = {reject.place for reject in rejects}
    for planned in plan_windows(catalogue, seed, shuffle):
        if planned.window.cursor >= end:
            return
        yield from _due_in(planned.window, reader, end, left_out)


def _due_in(
    window: Window,
    reader: RowGroupReader,
    end: Cursor,
    left_out: set[Place],
) -> Iterator[DueRow]:
    groups = window.groups
    tables = reader.read([(each.shard, each.num_bytes, each.index) for each in groups], [SAMPLE_ID])
    ids: list[str | None] = []
    for group, table in zip(groups, tables, strict=True):
        if isinstance(table, Fault) or table.num_rows != group.num_rows:
            ids += [None] * group.num_rows
        else:
            ids += decode_utf8(table[SAMPLE_ID])[0].to_pylist()
    places = [(group.shard, group.index, row) for group in groups for row in range(group.num_rows)]
    cursor = window.cursor
    here = (cursor.epoch, cursor.chapter, cursor.section, cursor.window)
    is_last = here == (end.epoch, end.chapter, end.section, end.window)
    for index in window.order()[: end.row if is_last else None].tolist():
        shard, group, row = places[index]
        quarantined = {(shard, group, row), (shard, group, None)} & left_out
        yield DueRow(cursor.epoch, ids[index], bool(quarantined))


def _judge_epoch(epoch: int, due: Iterable[DueRow], used: Counter[str]) -> EpochReconciliation:
    verdict = EpochReconciliation(epoch)
    wanted: Counter[str | None] = Counter()
    left_out: Counter[str | None] = Counter()
    for row in due:
        (left_out if row.is_quarantined else wanted)[row.sample_id] += 1
    verdict.due = wanted.total() + left_out.total()
    for name, count in used.items():
        if not wanted[name] and not left_out[name]:
            verdict.unknown += 1
            _note(verdict, f"unknown {name}")
            continue
        # A row group that could not be read in one epoch may have been readable in another.
        (wanted if wanted[name] else left_out)[name] -= 1
        if count > 1:
            verdict.repeated += 1
            _note(verdict, f"repeated {name} ({count} times)")
        else:
            verdict.used_once += 1
    verdict.quarantined = left_out.total()
    verdict.missing = wanted.total()
    for name in +wanted:
        _note(verdict, f"missing {name}")
    return verdict


def _note(verdict: EpochReconciliation, example: str) -> None:
    if len(verdict.examples) < _NUM_EXAMPLES:
        verdict.examples.append(example)
