"""A run's side of its data: what it writes down about them, and what it takes up again.

    RUN/shards.jsonl         the folder as the run first saw it; only grows
    RUN/quarantine.parquet   what was left out, entered when a batch arrives
    RUN/ledger/              what was used, entered when its iteration is done
    RUN/sets/1/...           the same three of each further set of captions

All of it is on the disk before the iteration that depends on it ends, so a process that is killed
at any moment can be taken up at its checkpoint: `rewind` forgets what will be made again.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pipelines.data.stream.batch import Batch
from pipelines.data.stream.feed import FeedProgress
from pipelines.data.stream.ledger import Ledger
from pipelines.data.stream.plan import Cursor
from pipelines.data.stream.quarantine import QuarantineFile
from pipelines.run.folder import RunFolder, append_jsonl, read_jsonl
from sgmd_core.errors import CheckpointError, DataError


class DataLog:
    """The books of one run.

    Args:
        folder: The run's folder.
        num_sets: Sets of captions that it draws from.
    """

    def __init__(self, folder: RunFolder, num_sets: int = 1) -> None:
        self._sets = [_SetLog(folder.of_set(number)) for number in range(num_sets)]

    def rewind(self, iteration: int, on_broken: Callable[[str], None] | None = None) -> None:
        """Forgets what was entered for this iteration and later ones.

        Args:
            iteration: The first to forget.
            on_broken: Called with one sentence that names the broken lines.
        """
        for one in self._sets:
            one.ledger.rewind(iteration, on_broken)
            one.quarantine.rewind(iteration)

    def progress(self, cursor: Cursor, rows: int) -> FeedProgress:
        """Returns what a feed needs to go on from a place.

        Args:
            cursor: Of the first set.
            rows: Of all sets, handed out before.

        Raises:
            CheckpointError: The ledger of a further set does not say where it stood.
        """
        first, *further = self._sets
        found = first.progress(cursor, rows)
        made = first.ledger.last_iteration if further else None
        return replace(found, further=tuple(one.progress_after(made) for one in further))

    def record_arrival(self, iteration: int, batches: Sequence[Batch]) -> int:
        """Writes down what came with an iteration's batches; returns how much was left out.

        Raises:
            DataError: Too much of the data cannot be used.
        """
        num_rejects = sum(
            one.record_arrival(iteration, [batch.of_set(number) for batch in batches])
            for number, one in enumerate(self._sets)
        )
        stop = next((batch.stop for batch in batches if batch.stop is not None), None)
        if stop is not None:
            raise DataError(*stop)
        return num_rejects

    def record(self, iteration: int, batches: Sequence[Batch]) -> None:
        """Writes down which samples an iteration has used."""
        for number, one in enumerate(self._sets):
            one.ledger.append(iteration, [batch.of_set(number) for batch in batches])

    def counts(self) -> dict[str, Any]:
        """Counts what was left out, for summary.json; of further sets under `also`."""
        first, *further = (one.quarantine.counts() for one in self._sets)
        return first | ({"also": further} if further else {})


class _SetLog:
    """The books of one set of captions.

    Args:
        folder: The run's folder, or the set's within it.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self.ledger = Ledger(folder.ledger)
        self.quarantine = QuarantineFile(folder.quarantine)

    def progress(self, cursor: Cursor, rows: int) -> FeedProgress:
        """Returns what a feed of the set needs to go on from a place."""
        return FeedProgress(
            cursor=cursor,
            rows=rows,
            catalogue=tuple(read_jsonl(self._folder.shards)),
            rejects=tuple(self.quarantine.rejects),
            used_ids=tuple(self.ledger.ids_of(cursor.epoch)) if rows else (),
        )

    def progress_after(self, iteration: int | None) -> FeedProgress:
        """The same after an iteration; None: at the start.

        Raises:
            CheckpointError: The ledger ends elsewhere.
        """
        entries = list(self.ledger.entries())
        last = entries[-1].iteration if entries else None
        if last != iteration:
            raise CheckpointError(
                f"going on in the set of captions of {self._folder}",
                f"its ledger ends at iteration {last}, and that of data.train at {iteration}",
                "ledgers that end alike",
                "Restore the folder `sets` from a copy, or start a new run",
            )
        cursor = entries[-1].cursor if entries else Cursor()
        return self.progress(cursor, sum(len(entry.sample_ids) for entry in entries))

    def record_arrival(self, iteration: int, batches: Sequence[Batch]) -> int:
        """Writes down what was learnt and left out; returns how much was left out."""
        rejects = [reject for batch in batches for reject in batch.rejects]
        notes = [note for batch in batches for note in batch.notes]
        self._folder.make()
        for note in notes:
            append_jsonl(self._folder.shards, note)
        self.quarantine.add(iteration, rejects)
        return len(rejects)
