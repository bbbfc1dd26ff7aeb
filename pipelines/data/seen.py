"""Which ids an epoch has met, in eight bytes an id.

Ids are remembered as 64-bit digests: a sum of their bytes, each times a fixed random number of its
place. Two given ids share a digest with a probability below 2^-56, so of ten million ids a pair
does with one below a thousandth, and then a row is quarantined as a duplicate of another one.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

_SEED = 0


class SeenIds:
    """A set of ids that only grows.

    Args:
        ids: Those met before.
    """

    def __init__(self, ids: Iterable[str] = ()) -> None:
        # Sorted, each at least twice as long as the next one.
        self._known: list[NDArray[np.uint64]] = []
        self.add(pa.array(ids, pa.string()))

    def add(self, ids: pa.Array) -> NDArray[np.bool_]:
        """Enters ids; returns which have been met before, here or earlier."""
        digests = _digests(ids)
        first = np.unique(digests, return_index=True)[1]
        again = np.ones(len(digests), dtype=bool)
        again[first] = False
        for known in self._known:
            place = np.minimum(np.searchsorted(known, digests), len(known) - 1)
            again |= known[place] == digests
        new = np.sort(digests[~again])
        while self._known and len(self._known[-1]) < 2 * len(new):
            new = np.sort(np.concatenate([self._known.pop(), new]))
        if len(new):
            self._known.append(new)
        return again


def _digests(ids: pa.Array) -> NDArray[np.uint64]:
    """One number an id, of all its UTF-8 bytes and their places."""
    strings = ids.cast(pa.large_string())
    _, offsets, content = strings.buffers()
    if not len(ids) or not content:
        return np.zeros(len(ids), dtype=np.uint64)
    borders = np.frombuffer(offsets, dtype=np.int64)[strings.offset :][: len(ids) + 1]
    lengths = np.diff(borders)
    content = np.frombuffer(content, dtype=np.uint8)[borders[0] : borders[-1]]
    places = np.arange(len(content)) - np.repeat(borders[:-1] - borders[0], lengths)
    # Bytes count from 1, so that what an id lacks at its end counts too.
    weights = np.random.default_rng(_SEED).integers(
        0, 2**64, max(1, lengths.max()), dtype=np.uint64
    )
    weighed = (content.astype(np.uint64) + np.uint64(1)) * weights[places]
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(weighed, dtype=np.uint64)])
    return sums[borders[1:] - borders[0]] - sums[borders[:-1] - borders[0]]
