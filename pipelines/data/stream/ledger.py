"""The ledger of a run: which samples went into which iteration.

    RUN/ledger/000000000.jsonl   iterations 0 to 999, one line each
        {"iteration": 7, "epochs": [[0, 12], [1, 4]], "cursor": {...}, "ids": ["clip-17", ...]}

A line is added when its iteration is done, with the metrics, and handed to the system at once: a
process that is killed loses none, at worst it tears the last line, which is then not read.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.storage import write_text
from pipelines.data.stream.feed import Batch
from pipelines.data.stream.plan import Cursor

_ITERATIONS_PER_FILE = 1000


@dataclass(frozen=True, slots=True)
class Entry:
    """What one iteration used.

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
        self._folder.mkdir(exist_ok=True)
        with self._path(iteration).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def rewind(self, iteration: int) -> None:
        """Drops the lines of this iteration and later ones, and a torn one."""
        for path in self._paths():
            if int(path.stem) >= iteration:
                path.unlink()
            elif int(path.stem) + _ITERATIONS_PER_FILE > iteration:
                kept = [line for line, entry in _lines(path) if entry.iteration < iteration]
                write_text(str(path), "".join(f"{line}\n" for line in kept))

    def entries(self) -> Iterator[Entry]:
        """Every iteration's entry, oldest first."""
        for path in self._paths():
            for _, entry in _lines(path):
                yield entry

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


def _lines(path: Path) -> Iterator[tuple[str, Entry]]:
    """Whole lines of a file and what they say; a last line torn by a crash is left out."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            stored = json.loads(line)
            yield (
                line.rstrip("\n"),
                Entry(
                    stored["iteration"],
                    tuple((epoch, count) for epoch, count in stored["epochs"]),
                    Cursor.from_json(stored["cursor"]),
                    tuple(stored["ids"]),
                ),
            )
