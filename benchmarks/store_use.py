"""Use of a cluster's object stores, as the stores report it."""

from dataclasses import dataclass

from ray._private import state
from ray._private.internal_api import get_memory_info_reply


@dataclass(frozen=True, slots=True)
class StoreUse:
    """Content of the object stores of all machines.

    Attributes:
        num_bytes: Size of it.
        num_objects: Objects, copies on several machines counted each.
    """

    num_bytes: int
    num_objects: int


def store_use() -> StoreUse:
    """Asks the cluster that this process is connected to."""
    stats = get_memory_info_reply(state.state).store_stats
    return StoreUse(int(stats.object_store_bytes_used), int(stats.num_local_objects))
