"""A result that stays where it is: in the object store, or in the process of its rank."""

from collections.abc import Mapping
from dataclasses import dataclass

import ray

from cluster.ray.batch import CallAnswer
from cluster.ray.hosts import OwnedResult
from cluster.worker_group import Future, R_co


@dataclass(frozen=True, slots=True, eq=False)
class RayFuture(Future[R_co]):
    """A reference to a result that stays in the object store, or in its process.

    Attributes:
        answer: Has Ray's reference, once the call is made; dropping the last future of it frees the
            value.
        ranks: (group, rank) by actor id of every actor that this result depends on, so that the
            death of any of them can be named.
        owned: Where the value is if it has stayed in its process.
        sent: Has the reference for other processes, where it was sent as well.
        entry: Which of the small results of a batch it is; None: the value itself.
    """

    answer: CallAnswer
    ranks: Mapping[str, tuple[str, int]]
    owned: OwnedResult | None = None
    sent: CallAnswer | None = None
    entry: int | None = None

    @property
    def reference(self) -> ray.ObjectRef:
        """Ray's reference."""
        return self.answer.require()
