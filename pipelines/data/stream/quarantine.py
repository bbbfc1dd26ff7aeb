"""Unusable data of a run: `quarantine.parquet`, and the limit that stops it.

The same row is met again in every epoch and entered once.
"""

from collections import Counter
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.errors import StorageError
from cluster.files import write_whole
from cluster.paths import require_file
from cluster.storage_errors import storage_errors
from pipelines.data.shards.rejection import Place, Reason, Rejection, from_parquet, to_parquet
from sgmd_core.errors import CheckpointError, DataError

_NUM_SHOWN = 5

REPEATS = "an earlier row of the epoch has it"
_DUPLICATES = (Reason.DUPLICATE_ID, "duplicate id")
"""As runs write it today, and as earlier ones have."""


class Tally:
    """Counts rejects against the limit; each place once.

    Args:
        max_bad_fraction: Share of the data set's rows that may be bad.
        earlier: Rejects of the run so far.
    """

    def __init__(self, max_bad_fraction: float, earlier: Iterable[Rejection] = ()) -> None:
        self._limit = max_bad_fraction
        self._rejects: dict[Place, Rejection] = {}
        self._repeats: dict[tuple[str, int | None], set[int]] = {}
        self.add(earlier)

    def repeats(self, shard: str, row_group: int) -> Set[int]:
        """Rows of a row group whose id another row has, which is the one that is used."""
        return self._repeats.get((shard, row_group), frozenset())

    def add(self, rejects: Iterable[Rejection]) -> list[Rejection]:
        """Counts rejects; returns those that were not known."""
        new: list[Rejection] = []
        for reject in rejects:
            if reject.place not in self._rejects:
                self._rejects[reject.place] = reject
                if reject.reason in _DUPLICATES and reject.row is not None:
                    rows = self._repeats.setdefault((reject.source, reject.row_group), set())
                    rows.add(reject.row)
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


def summarize_rejects(rejects: Sequence[Rejection], rows_per_shard: float = 1.0) -> str:
    """The worst shards, with counts and the commonest reason of each."""
    rows: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = {}
    for reject in rejects:
        size = rows_per_shard if reject.num_rows is None else reject.num_rows
        rows[reject.source] += max(1, round(size))
        reasons.setdefault(reject.source, Counter())[reject.why] += 1
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
        self._entries = _read(path) if path.exists() else []

    @property
    def rejects(self) -> list[Rejection]:
        """All entries."""
        return [each for each, _ in self._entries]

    def add(self, iteration: int, rejects: Sequence[Rejection]) -> None:
        """Enters what was met on the way to an iteration's batch, and writes the file."""
        if rejects:
            self._entries += [(reject, iteration) for reject in rejects]
            self._write()

    def rewind(self, iteration: int) -> None:
        """Forgets what was entered for this iteration or a later one."""
        kept = [(reject, entered) for reject, entered in self._entries if entered < iteration]
        if len(kept) != len(self._entries):
            self._entries = kept
            self._write()

    def counts(self) -> dict[str, Any]:
        """For summary.json: entries, shards, and how often each kind of reason occurred."""
        kinds = Counter(str(reject.reason) for reject in self.rejects)
        return {
            "entries": len(self._entries),
            "shards": len({reject.source for reject in self.rejects}),
            "reasons": dict(kinds.most_common()),
        }

    def _write(self) -> None:
        with storage_errors(f"writing {self._path}"):
            content = to_parquet(self.rejects, [iteration for _, iteration in self._entries])
            write_whole(self._path, content)


def _read(path: Path) -> list[tuple[Rejection, int]]:
    """The entries of a run's quarantine file, with their iterations.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        require_file(path)
        return [(reject, iteration or 0) for reject, iteration in from_parquet(path.read_bytes())]
    except (OSError, KeyError, pa.ArrowException, StorageError) as error:
        told = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise CheckpointError(
            f"reading {path}",
            error.found if isinstance(error, StorageError) else told,
            "the rows that the run has left out",
            "Move the file away to go on without them: what is bad is found again when it is met,"
            " and counted from 0",
        ) from error
