"""A batch of a stream, and the interface of what hands out batches."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa

from pipelines.data.shards.rejection import Rejection
from pipelines.data.shards.schema import CAPTION, SAMPLE_ID
from pipelines.data.stream.plan import Cursor
from sgmd_core.types import DataBatch, Latents, Text


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows for one batch, and where the stream stands after them.

    Attributes:
        number: Which batch of this feed it is, from 0.
        rows: Id and caption of each, in stream order.
        epochs: (epoch, rows) in stream order; a batch may reach over the end of an epoch.
        cursor: The row that comes next.
        position: Rows handed out since the start of the run, these included.
        passes: Passes over the data; a whole number as long as the end of the folder is unknown.
        rejects: What was newly left out on the way.
        notes: What was newly learnt about the folder, for the run to write down.
        stop: Arguments of the DataError that ends the run, where too much is bad; no rows then.
        parts: Of several sets, what each gave; empty for one set.
    """

    PACKS_ITSELF: ClassVar[bool] = True

    number: int
    rows: pa.Table
    epochs: tuple[tuple[int, int], ...]
    cursor: Cursor
    position: int
    passes: float
    rejects: tuple[Rejection, ...]
    notes: tuple[dict[str, Any], ...]
    stop: tuple[str, ...] | None = None
    parts: tuple["Batch", ...] = ()

    def of_set(self, number: int) -> "Batch":
        """Rows that a set gave: of one set alone, all."""
        return self.parts[number] if self.parts else self

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """Its ids in stream order."""
        return tuple(self.rows.column(SAMPLE_ID).to_pylist())

    @property
    def captions(self) -> tuple[str, ...]:
        """Caption of each row, in order."""
        return tuple(self.rows.column(CAPTION).to_pylist())

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels with its own rows; Arrow would send the whole window that they are a slice of."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values["rows"] = self.rows.take(pa.array(np.arange(self.rows.num_rows)))
        return partial(Batch, **values), ()


class BatchFeed(ABC):
    """Hands out the batches of a run: a `Feed` of one set, or a `MixedFeed` of several.

    A group's controller calls these methods by name; where a run stands is in its batches.
    """

    @abstractmethod
    def take(
        self, num_rows: int, columns: tuple[str, ...] | None = None, draw: int | None = None
    ) -> Batch:
        """Returns the next `num_rows` usable rows.

        Args:
            num_rows: How many.
            columns: Columns of theirs that will be asked for; None: all that are read.
            draw: Number of the draw that decides of which set all of them are; None: each row
                is of a set of its own draw.

        Raises:
            DataError: The server failed, or a whole epoch has no usable row.
        """

    @abstractmethod
    def embeddings(self, number: int) -> Text:
        """Returns stored embeddings of a batch, (rows, positions, width), float32, once."""

    @abstractmethod
    def latents(self, number: int) -> Latents:
        """Returns stored latents of a batch, (b, c, t, h, w), once.

        In the type in which they are stored: it is half as much to send on, and the device that
        needs them casts faster.
        """

    def data(self, number: int) -> DataBatch:
        """Returns the same as a record, which roles share out among their ranks."""
        return DataBatch(self.latents(number))

    @abstractmethod
    def close(self) -> None:
        """Ends all reading; harmless when repeated."""

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes it."""
        self.close()
