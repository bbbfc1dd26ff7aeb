"""Set of the ids that an epoch has met, in eight bytes an id.

Ids are remembered as 64-bit digests: a sum of their bytes, each times a fixed random number of its
place. Two given ids share a digest with a probability below 2^-56, so of ten million ids a pair
does with one below a thousandth, and then a row is quarantined as a duplicate of another one.
"""

from collections.abc import Iterable, Sequence
from functools import cache

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
        self.add(list(ids))

    def add(self, ids: Sequence[str] | pa.Array) -> list[int]:
        """Enters ids; returns the places of those that have been met before, here or earlier."""
        return self.add_digests(digest_ids(pa.chunked_array([pa.array(ids, pa.large_string())])))

    def add_digests(self, digests: NDArray[np.uint64]) -> list[int]:
        """As `add`, of what `digest_ids` has made of ids."""
        again: list[int] = []
        new = np.sort(digests)
        is_again = self._holds(new)
        is_again[1:] |= new[1:] == new[:-1]
        if is_again.any():
            # Only now does it matter where each stands; keeping track of that makes sorting slow.
            new, first = np.unique(digests, return_index=True)
            is_new = ~self._holds(new)
            new = new[is_new]
            again = np.setdiff1d(np.arange(len(digests)), first[is_new]).tolist()
        self._enter(new)
        return again

    def _holds(self, ordered: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Returns which of some digests, in order, have been entered."""
        found = np.zeros(len(ordered), dtype=bool)
        for known in self._known:
            place = np.minimum(np.searchsorted(known, ordered), len(known) - 1)
            found |= known[place] == ordered
        return found

    def _enter(self, new: NDArray[np.uint64]) -> None:
        while self._known and len(self._known[-1]) < 2 * len(new):
            new = np.sort(np.concatenate([self._known.pop(), new]))
        if len(new):
            self._known.append(new)


def digest_ids(ids: pa.ChunkedArray) -> NDArray[np.uint64]:
    """One number an id, of all its UTF-8 bytes and their places."""
    chunks = (_digests(chunk) for chunk in ids.cast(pa.large_string()).chunks)
    return np.concatenate([np.zeros(0, dtype=np.uint64), *chunks])


def _digests(ids: pa.Array) -> NDArray[np.uint64]:
    _, offsets, content = ids.buffers()
    if not len(ids) or not content:
        return np.zeros(len(ids), dtype=np.uint64)
    borders = np.frombuffer(offsets, dtype=np.int64)[ids.offset :][: len(ids) + 1]
    lengths = np.diff(borders)
    content = np.frombuffer(content, dtype=np.uint8)[borders[0] : borders[-1]]
    longest = int(lengths.max())
    weights = _weights(longest.bit_length())
    if 0 < longest == lengths.min():
        # Most sets number their clips with equally many digits, and a table is quickly summed.
        return content.reshape(-1, longest) @ weights[:longest] + weights[:longest].sum()
    places = np.arange(len(content)) - np.repeat(borders[:-1] - borders[0], lengths)
    # Bytes count from 1, so that what an id lacks at its end counts too.
    weighed = (content.astype(np.uint64) + np.uint64(1)) * weights[places]
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(weighed, dtype=np.uint64)])
    return sums[borders[1:] - borders[0]] - sums[borders[:-1] - borders[0]]


@cache
def _weights(bits: int) -> NDArray[np.uint64]:
    """Numbers for the places below 2^bits; the first ones are the same for all `bits`."""
    return np.random.default_rng(_SEED).integers(0, 2**64, 2**bits, dtype=np.uint64)
