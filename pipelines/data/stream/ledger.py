"""The ledger of a run: which samples went into which iteration.

    RUN/ledger/000000000.jsonl   iterations 0 to 999, one line each
        {"iteration": 7, "epochs": [[0, 12], [1, 4]], "cursor": {...}, "ids": ["clip-17", ...]}

A line is added when its iteration is done, with the metrics, and handed to the system at once: a
process that is killed loses none, at worst it tears the last line, which is then not read.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.logs import append_line, whole_lines
from cluster.storage import write_text
from cluster.storage_errors import storage_errors
from pipelines.data.stream.batch import Batch
from pipelines.data.stream.plan import Cursor
from sgmd_core.errors import CheckpointError

_ITERATIONS_PER_FILE = 1000
_FIELDS = {"iteration": int, "epochs": list, "cursor": dict, "ids": list}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """Samples that one iteration used.

    Attributes:
        iteration: Generator updates made before it.
        epochs: (epoch, samples) in the order of the ids.
        cursor: Where the stream stood after it.
        sample_ids: In stream order.
    """

    iteration: int
    epochs: tuple[tuple[int, int], ...]
    cursor: Cursor
    sample_ids: tuple[str, ...]

    def by_epoch(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        """The ids of each epoch that it reaches into."""
        start = 0
        for epoch, count in self.epochs:
            yield epoch, self.sample_ids[start : start + count]
            start += count


class Ledger:
    """The ledger's files in one folder.

    Args:
        folder: Made with the first line.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def append(self, iteration: int, batches: Sequence[Batch]) -> None:
        """Writes down what an iteration used; its batches in stream order."""
        line = {
            "iteration": iteration,
            "epochs": [pair for batch in batches for pair in batch.epochs],
            "cursor": batches[-1].cursor.to_json(),
            "ids": [name for batch in batches for name in batch.sample_ids],
        }
        with storage_errors(f"making {self._folder}"):
            self._folder.mkdir(exist_ok=True)
        append_line(self._path(iteration), line)

    def rewind(self, iteration: int, on_broken: Callable[[str], None] | None = None) -> None:
        """Drops the lines of this iteration and later ones, and broken ones.

        Args:
            iteration: The first to drop.
            on_broken: Called with one sentence that names the broken lines.
        """
        for path in self._paths():
            if int(path.stem) >= iteration:
                path.unlink()
            elif int(path.stem) + _ITERATIONS_PER_FILE > iteration:
                lines = _lines(path, on_broken)
                kept = [line for line, entry in lines if entry.iteration < iteration]
                write_text(str(path), "".join(f"{line}\n" for line in kept))

    def entries(self) -> Iterator[LedgerEntry]:
        """Every iteration's entry, oldest first."""
        for path in self._paths():
            for _, entry in _lines(path):
                yield entry

    @property
    def last_iteration(self) -> int | None:
        """The newest iteration that it has; None: it has none."""
        return max((entry.iteration for entry in self.entries()), default=None)

    def ids_of(self, epoch: int) -> list[str]:
        """Ids used in one epoch, in stream order."""
        return [
            name
            for entry in self.entries()
            for number, ids in entry.by_epoch()
            if number == epoch
            for name in ids
        ]

    def _paths(self) -> list[Path]:
        return sorted(self._folder.glob("*.jsonl"))

    def _path(self, iteration: int) -> Path:
        first = iteration - iteration % _ITERATIONS_PER_FILE
        return self._folder / f"{first:09d}.jsonl"


def _lines(
    path: Path, on_broken: Callable[[str], None] | None = None
) -> Iterator[tuple[str, LedgerEntry]]:
    """Whole lines of a file and what they say; a line that makes no sense is left out."""
    say = on_broken or _log.warning
    for line, stored in whole_lines(path, _FIELDS, say):
        try:
            epochs = tuple((int(epoch), int(count)) for epoch, count in stored["epochs"])
            cursor = Cursor.from_json(stored["cursor"])
        except (CheckpointError, TypeError, ValueError) as error:
            say(f"{path}: the line of iteration {stored['iteration']} left out ({error})")
            continue
        yield line, LedgerEntry(stored["iteration"], epochs, cursor, tuple(map(str, stored["ids"])))
