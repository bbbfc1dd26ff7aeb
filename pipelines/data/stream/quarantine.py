"""Unusable data with their reasons: `quarantine.parquet` of a run, and the limit that stops it.

    shard  row_group  row  sample_id  reason  num_rows  iteration

An entry stands for one row; for a whole row group where `row` is null; for a whole shard where
`row_group` is null too. The same row is met again in every epoch and entered once.
"""

from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.files import storage_errors, whole_file
from sgmd_core.errors import CheckpointError, DataError

_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("row_group", pa.int32()),
        ("row", pa.int32()),
        ("sample_id", pa.string()),
        ("reason", pa.string()),
        ("num_rows", pa.int64()),
        ("iteration", pa.int64()),
    ]
)
_NUM_SHOWN = 5

DUPLICATE = "duplicate_id (an earlier row of the epoch has it)"
_DUPLICATES = (DUPLICATE, "duplicate id (an earlier row of the epoch has it)")
"""As runs write it today, and as earlier ones have."""

Place = tuple[str, int | None, int | None]
"""(shard, row group, row)"""


@dataclass(frozen=True, slots=True)
class Reject:
    """Something that was left out.

    Attributes:
        shard: Path relative to the data folder.
        row_group: Number within the shard; None for the whole shard.
        row: Number within the row group; None for the whole row group.
        sample_id: The row's id, where it has one.
        reason: Why it cannot be used.
        num_rows: Rows that it stands for; None where nobody knows.
    """

    shard: str
    row_group: int | None
    row: int | None
    sample_id: str | None
    reason: str
    num_rows: int | None = 1

    @property
    def place(self) -> Place:
        """Key by which two entries are the same."""
        return self.shard, self.row_group, self.row


class Tally:
    """Counts rejects against the limit; each place once.

    Args:
        max_bad_fraction: Share of the data set's rows that may be bad.
        earlier: Rejects of the run so far.
    """

    def __init__(self, max_bad_fraction: float, earlier: Iterable[Reject] = ()) -> None:
        self._limit = max_bad_fraction
        self._rejects: dict[Place, Reject] = {}
        self._repeats: set[Place] = set()
        self.add(earlier)

    @property
    def repeats(self) -> Set[Place]:
        """Rows whose id another row has, which is the one that is used."""
        return self._repeats

    def add(self, rejects: Iterable[Reject]) -> list[Reject]:
        """Counts rejects; returns those that were not known."""
        new: list[Reject] = []
        for reject in rejects:
            if reject.place not in self._rejects:
                self._rejects[reject.place] = reject
                if reject.reason in _DUPLICATES:
                    self._repeats.add(reject.place)
                new.append(reject)
        return new

    def verdict(self, num_rows: float, rows_per_shard: float) -> DataError | None:
        """The error that stops the run, if the limit is passed.

        Args:
            num_rows: Rows of the data set as far as it is known, usable or not.
            rows_per_shard: What a shard of unknown length counts for.
        """
        bad = self._num_rows(rows_per_shard)
        if bad <= self._limit * num_rows:
            return None
        return DataError(
            "streaming the training data",
            f"{bad:.0f} of about {num_rows:.0f} rows cannot be used: "
            f"{summarize_rejects(list(self._rejects.values()), rows_per_shard)}",
            f"at most {self._limit:.2%} (data.max_bad_fraction)",
            "Repair or remove these shards (quarantine.parquet of the run lists everything, "
            "`sgmd check` the whole set), or raise data.max_bad_fraction",
        )

    def _num_rows(self, rows_per_shard: float) -> float:
        return sum(
            rows_per_shard if reject.num_rows is None else reject.num_rows
            for reject in self._rejects.values()
        )


def summarize_rejects(rejects: Sequence[Reject], rows_per_shard: float = 1.0) -> str:
    """The worst shards, with counts and the commonest reason of each."""
    rows: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = {}
    for reject in rejects:
        size = rows_per_shard if reject.num_rows is None else reject.num_rows
        rows[reject.shard] += max(1, round(size))
        reasons.setdefault(reject.shard, Counter())[reject.reason] += 1
    shown = [
        f"{shard} ({count} rows, {reasons[shard].most_common(1)[0][0]})"
        for shard, count in rows.most_common(_NUM_SHOWN)
    ]
    more = f" and {len(rows) - len(shown)} more shards" if len(rows) > len(shown) else ""
    return ", ".join(shown) + more


class QuarantineFile:
    """`quarantine.parquet` of a run; whole on the disk at any time.

    Args:
        path: The file; absent as long as nothing was rejected.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[dict[str, Any]] = _read(path) if path.exists() else []

    @property
    def rejects(self) -> list[Reject]:
        """All entries."""
        return [
            Reject(**{name: value for name, value in line.items() if name != "iteration"})
            for line in self._lines
        ]

    def add(self, iteration: int, rejects: Sequence[Reject]) -> None:
        """Enters what was met on the way to an iteration's batch, and writes the file."""
        if rejects:
            self._lines += [{**asdict(reject), "iteration": iteration} for reject in rejects]
            self._write()

    def rewind(self, iteration: int) -> None:
        """Forgets what was entered for this iteration or a later one."""
        kept = [line for line in self._lines if line["iteration"] < iteration]
        if len(kept) != len(self._lines):
            self._lines = kept
            self._write()

    def counts(self) -> dict[str, Any]:
        """For summary.json: entries, shards, and how often each kind of reason occurred."""
        kinds = Counter(line["reason"].partition(" (")[0] for line in self._lines)
        return {
            "entries": len(self._lines),
            "shards": len({line["shard"] for line in self._lines}),
            "reasons": dict(kinds.most_common()),
        }

    def _write(self) -> None:
        with storage_errors(f"writing {self._path}"), whole_file(self._path) as draft:
            pq.write_table(pa.Table.from_pylist(self._lines, schema=_SCHEMA), draft)


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a quarantine file.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        return pq.read_table(path, schema=_SCHEMA).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise CheckpointError(
            f"reading {path}",
            f"{type(error).__name__}: {str(error).splitlines()[0]}",
            "the rows that the run has left out",
            "Move the file away to go on without them: what is bad is found again when it is met,"
            " and counted from 0",
        ) from error
