"""A run's side of its data: what it writes down about them, and what it takes up again.

    RUN/shards.jsonl         the folder as the run first saw it; only grows
    RUN/quarantine.parquet   what was left out, entered when a batch arrives
    RUN/ledger/              what was used, entered when its iteration is done

All of it is on the disk before the iteration that depends on it ends, so a process that is killed
at any moment can be taken up at its checkpoint: `rewind` forgets what will be made again.
"""

from collections.abc import Callable, Sequence
from typing import Any

from pipelines.data.stream.feed import Batch, FeedProgress
from pipelines.data.stream.ledger import Ledger
from pipelines.data.stream.plan import Cursor
from pipelines.data.stream.quarantine import QuarantineFile
from pipelines.run.folder import RunFolder, append_jsonl, read_jsonl
from sgmd_core.errors import DataError


class DataLog:
    """The books of one run.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._shards = folder.shards
        self._ledger = Ledger(folder.ledger)
        self._quarantine = QuarantineFile(folder.quarantine)

    def rewind(self, iteration: int, on_broken: Callable[[str], None] | None = None) -> None:
        """Forgets what was entered for this iteration and later ones.

        Args:
            iteration: The first to forget.
            on_broken: Hears which lines were broken.
        """
        self._ledger.rewind(iteration, on_broken)
        self._quarantine.rewind(iteration)

    def progress(self, cursor: Cursor, rows: int) -> FeedProgress:
        """Returns what a feed needs to go on from a place."""
        return FeedProgress(
            cursor=cursor,
            rows=rows,
            catalogue=tuple(read_jsonl(self._shards)),
            rejects=tuple(self._quarantine.rejects),
            used_ids=tuple(self._ledger.ids_of(cursor.epoch)) if rows else (),
        )

    def enter(self, iteration: int, batches: Sequence[Batch]) -> int:
        """Writes down what came with an iteration's batches; returns how much was left out.

        Raises:
            DataError: Too much of the data cannot be used.
        """
        rejects = [reject for batch in batches for reject in batch.rejects]
        for batch in batches:
            for note in batch.notes:
                append_jsonl(self._shards, note)
        self._quarantine.add(iteration, rejects)
        stop = next((batch.stop for batch in batches if batch.stop is not None), None)
        if stop is not None:
            raise DataError(*stop)
        return len(rejects)

    def record(self, iteration: int, batches: Sequence[Batch]) -> None:
        """Writes down which samples an iteration has used."""
        self._ledger.append(iteration, batches)

    def counts(self) -> dict[str, Any]:
        """Counts what was left out, for summary.json."""
        return self._quarantine.counts()
