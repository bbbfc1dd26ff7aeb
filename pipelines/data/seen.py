"""Which ids an epoch has met, in eight bytes an id.

Ids are remembered as 64-bit digests: two different ids out of ten million share one with a
probability of 3 in a million, and then one row is quarantined as a duplicate of the other.
"""

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_MERGE_AT = 2**17


class SeenIds:
    """A set of ids that only grows.

    Args:
        ids: Those met before.
    """

    def __init__(self, ids: Iterable[str] = ()) -> None:
        self._old: NDArray[np.uint64] = np.unique(_digests(list(ids)))
        self._new: set[int] = set()

    def add(self, ids: Sequence[str]) -> list[int]:
        """Enters ids; returns the places of those that have been met before, here or earlier."""
        digests = _digests(ids)
        known = np.zeros(len(ids), dtype=bool)
        if len(self._old):
            where = np.minimum(np.searchsorted(self._old, digests), len(self._old) - 1)
            known = self._old[where] == digests
        again: list[int] = []
        for place, digest in enumerate(digests.tolist()):
            if known[place] or digest in self._new:
                again.append(place)
            else:
                self._new.add(digest)
        if len(self._new) >= _MERGE_AT:
            recent = np.fromiter(self._new, dtype=np.uint64, count=len(self._new))
            self._old = np.sort(np.concatenate([self._old, recent]))
            self._new = set()
        return again


def _digests(ids: Sequence[str]) -> NDArray[np.uint64]:
    joined = b"".join(blake2b(each.encode(), digest_size=8).digest() for each in ids)
    return np.frombuffer(joined, dtype=np.uint64)
