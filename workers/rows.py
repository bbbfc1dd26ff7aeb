"""Tensors whose rows lie in several files, of which a process reads the rows that it wants.

    files of n ranks, each with its rows  ->  the rows of one of m ranks, or everything

A file is read only if it holds a wanted row, and then in small pieces straight into their place.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from cluster.files import sha256_of
from workers.tensor_files import RowReader


@dataclass(frozen=True, slots=True)
class RowRange:
    """Place of a rank's part in a tensor that several ranks share.

    Attributes:
        first: Index of its first row.
        num: Number of its rows; may be 0.
        shape: Shape of the whole.
    """

    first: int
    num: int
    shape: tuple[int, ...]

    def shared_with(self, other: "RowRange") -> tuple[int, int] | None:
        """First row that two parts share, and the one after the last; None: they share no row."""
        start = max(self.first, other.first)
        end = min(self.first + self.num, other.first + other.num)
        return (start, end) if start < end else None


@dataclass(frozen=True, slots=True)
class PartFile:
    """A file of tensors, or of rows of them.

    Attributes:
        filesystem: Where it is.
        folder: The folder that it is in.
        name: Its name there.
        digest: SHA-256 of its content, where it is known.
        places: By parameter, the rows that are here; a tensor that is not named is whole.
    """

    filesystem: AbstractFileSystem
    folder: str
    name: str
    digest: str | None
    places: Mapping[str, RowRange]

    @contextmanager
    def open(self) -> Iterator[RowReader]:
        """Yields the file, once its bytes are known to be those that were written.

        Raises:
            ValueError: They are not.
        """
        path = f"{self.folder}/{self.name}"
        if isinstance(self.filesystem, LocalFileSystem):
            yield self._checked(Path(path))
            return
        with tempfile.TemporaryDirectory() as scratch:
            local = Path(scratch) / self.name
            self.filesystem.get_file(path, str(local))
            yield self._checked(local)

    def has_any_of(self, wanted: Mapping[str, RowRange]) -> bool:
        """Returns False if no wanted row is here; True where that is not known."""
        if not self.places or not wanted:
            return True
        return any(
            name not in wanted
            or wanted[name].shape != rows.shape
            or rows.shared_with(wanted[name]) is not None
            for name, rows in self.places.items()
        )

    def place(self, label: str, shape: tuple[int, ...]) -> RowRange:
        """RowRange of a tensor of this file.

        What an optimizer keeps of a parameter has its rows, and may have shorter ones.

        Raises:
            ValueError: The tensor has another shape than those rows.
        """
        here = self.places.get(_parameter(label, self.places), RowRange(0, shape[0], shape))
        if label not in self.places and shape[0] == here.num:
            return replace(here, shape=(here.shape[0], *shape[1:]))
        if shape != (here.num, *here.shape[1:]):
            raise ValueError(f"{label} is {shape} in {self.name}, which should hold {here}")
        return here

    def _checked(self, path: Path) -> RowReader:
        if self.digest is not None and (found := sha256_of(path)) != self.digest:
            raise ValueError(
                f"{self.name} is not what was written (sha256 {found[:12]}..., expected "
                f"{self.digest[:12]}...)"
            )
        return RowReader(path)


def read_parts(files: Sequence[PartFile], wanted: Mapping[str, RowRange]) -> dict[str, Tensor]:
    """Reads the wanted rows of all tensors of some files.

    Args:
        files: Files that make up the tensors; what has no rows is the same in all of them.
        wanted: By parameter, the rows to read; a tensor called `KIND/NAME` goes with NAME. What is
            not named, or has another shape than expected, is read whole.

    Raises:
        ValueError: A file is not what was written, or the files do not make up a whole.
    """
    found: dict[str, Tensor] = {}
    parts: dict[str, tuple[RowRange, list[tuple[int, int]]]] = {}
    # A rank may have no row of anything, and still needs what all ranks have alike.
    for file in [each for each in files if each.has_any_of(wanted)] or files[:1]:
        with file.open() as reader:
            for label in reader.names:
                shape, dtype = reader.shape(label), reader.dtype(label)
                if not shape:
                    found[label] = torch.empty((), dtype=dtype)
                    reader.read(label, found[label], 0)
                    continue
                here = file.place(label, shape)
                rows = wanted.get(_parameter(label, wanted))
                if rows is not None and label not in wanted and rows.shape[0] == here.shape[0]:
                    rows = replace(rows, shape=here.shape)
                if rows is None or rows.shape != here.shape:
                    rows = RowRange(0, here.shape[0], here.shape)
                if label not in found:
                    found[label] = torch.empty((rows.num, *here.shape[1:]), dtype=dtype)
                    parts[label] = (rows, [])
                if (shared := here.shared_with(rows)) is not None:
                    start, end = shared
                    target = found[label][start - rows.first : end - rows.first]
                    reader.read(label, target, start - here.first)
                    parts[label][1].append(shared)
    for label, (rows, read) in parts.items():
        _require_whole(label, rows, read)
    return found


def _require_whole(label: str, rows: RowRange, read: Sequence[tuple[int, int]]) -> None:
    """Checks that every wanted row was read once."""
    ends = [(0, rows.first), *sorted(read), (rows.first + rows.num, 0)]
    if any(before[1] != after[0] for before, after in pairwise(ends)):
        raise ValueError(f"rows of {label} are in no file, or in several")


def _parameter(label: str, rows: Mapping[str, RowRange]) -> str:
    """Parameter of a tensor that is called after it: `NAME` or `KIND/NAME`."""
    return label if label in rows else label.partition("/")[2]
