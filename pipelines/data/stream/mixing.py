"""Several sets of captions as one stream, each sample of a set that is drawn by weight.

    sample n of the run  ->  one draw, counted by n  ->  its set  ->  the next row of that set

Where the sets are the sizes of one set, an iteration takes all its rows of the size that it draws
(`sgmd_core.buckets`): one draw an iteration, the one by which roles know the size.

A set is a feed of its own: its epochs, cursor, ledger and quarantine are those of a run that had
this set alone. So an epoch is one pass over one set, and sets are passed over at their own pace.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipelines.data.shards.schema import LATENTS, TEXT_EMBEDS, caption_schema
from pipelines.data.stream.batch import Batch, BatchFeed
from pipelines.data.stream.feed import Feed, FeedProgress, StreamSettings
from sgmd_core.buckets import drawn_bucket
from sgmd_core.types import Latents, Text

_BLOCK = 1024
_DRAWS = 4
"""First number of the seeds; `pipelines.data.stream.plan` has those before."""


def drawn_sets(
    seed: int, first: int, num_samples: int, weights: Sequence[float]
) -> NDArray[np.int64]:
    """Numbers of the sets that some samples of a run come from.

    Args:
        seed: The run's seed.
        first: Samples of the run before them.
        num_samples: How many.
        weights: Of the sets; their shares are these over their sum.
    """
    edges = np.cumsum(np.asarray(weights, dtype=np.float64)) / sum(weights)
    places = np.arange(first, first + num_samples)
    found = np.zeros(num_samples, dtype=np.int64)
    for block in np.unique(places // _BLOCK).tolist():
        drawn = np.random.default_rng((_DRAWS, seed, block)).random(_BLOCK)
        mine = places // _BLOCK == block
        found[mine] = np.searchsorted(edges[:-1], drawn[places[mine] % _BLOCK], side="right")
    return found


class MixedFeed(BatchFeed):
    """Hands out rows of several sets.

    Args:
        settings: Of the first set, with the others in `further`.
        progress: Likewise.
        num_rows: Rows of all sets that the rest of the run will take.
    """

    def __init__(self, settings: StreamSettings, progress: FeedProgress, num_rows: int) -> None:
        assert settings.seed is not None, "sets are drawn by a seed"
        self._seed = settings.seed
        self._weights = (settings.weight, *(weight for _, weight in settings.further))
        self._position = progress.rows
        self._taken = 0
        self._columns = settings.source.columns
        self._kept: dict[int, _Kept] = {}
        own = zip(settings.of_each_set, progress.of_each_set, strict=True)
        self._feeds = [Feed(one, where, num_rows) for one, where in own]

    def take(
        self, num_rows: int, columns: tuple[str, ...] | None = None, draw: int | None = None
    ) -> Batch:
        """The next `num_rows` usable rows; see `BatchFeed.take`."""
        if draw is None:
            sets = drawn_sets(self._seed, self._position, num_rows, self._weights)
        else:
            sets = np.full(num_rows, drawn_bucket(self._seed, draw, self._weights))
        parts = tuple(
            feed.take(int((sets == number).sum()), columns)
            for number, feed in enumerate(self._feeds)
        )
        stop = next((part.stop for part in parts if part.stop is not None), None)
        rows = caption_schema().empty_table()
        # Rows of the first set come first in the table, and each goes to a place of its set.
        order = np.argsort(np.argsort(sets, kind="stable"), kind="stable")
        if stop is None:
            rows = pa.concat_tables([part.rows for part in parts]).take(pa.array(order))
            self._position += num_rows
            wanted = self._columns if columns is None else columns
            if wanted:
                self._kept[self._taken] = _Kept(order, parts, {*wanted})
        self._taken += 1
        first = parts[0]
        return Batch(
            number=self._taken - 1,
            rows=rows,
            epochs=first.epochs,
            cursor=first.cursor,
            position=self._position,
            passes=first.passes,
            rejects=(),
            notes=(),
            stop=stop,
            parts=parts,
        )

    def embeddings(self, number: int) -> Text:
        """Stored embeddings of a batch; see `BatchFeed.embeddings`."""
        return self._joined(number, TEXT_EMBEDS)

    def latents(self, number: int) -> Latents:
        """Stored latents of a batch; see `Feed.latents`."""
        return self._joined(number, LATENTS)

    def close(self) -> None:
        """Ends all reading; harmless when repeated."""
        for feed in self._feeds:
            feed.close()

    def _joined(self, number: int, column: str) -> torch.Tensor:
        kept = self._kept[number]
        kept.columns.remove(column)
        if not kept.columns:
            del self._kept[number]
        found = [
            feed.embeddings(part.number) if column == TEXT_EMBEDS else feed.latents(part.number)
            for feed, part in zip(self._feeds, kept.parts, strict=True)
            if part.rows.num_rows
        ]
        return torch.cat(found)[torch.from_numpy(kept.order)]


@dataclass(frozen=True, slots=True)
class _Kept:
    """A batch whose columns will be asked for.

    Attributes:
        order: Place of each sample among the rows of all parts.
        parts: What each set gave.
        columns: Columns that are still to be asked for.
    """

    order: NDArray[np.int64]
    parts: tuple[Batch, ...]
    columns: set[str]


def build_feed(settings: StreamSettings, progress: FeedProgress, num_rows: int) -> BatchFeed:
    """Returns the feed of one set or of several; factory for a worker group."""
    feed = MixedFeed if settings.further else Feed
    return feed(settings, progress, num_rows)
