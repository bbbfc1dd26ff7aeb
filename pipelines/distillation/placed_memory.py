"""Memory of the machines that a run's processes were placed on, before a role loads there.

    needs of a process (by pool)  x  machine of each rank  ->  compared with what the machine has

The checks before a run see this machine alone; where Ray has put which rank is known when all
bundles are reserved. What a process needs is modelled: a machine that has a little less is warned
of, and one that has much less ends the run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.ray.capacity import Capacity, capacities_of
from cluster.ray.topology import Placement
from pipelines.config.recipe import DistillConfig
from pipelines.distillation.readiness import ProcessNeed, in_gb, process_needs, ways_to_save
from pipelines.planning.workload import Workload
from sgmd_core.errors import ConfigError
from sgmd_core.words import count_in_words
from workers.models.folder import ModelFolder

MODEL_MARGIN = 1.2
"""Times the memory that is there: a run that needs more by the model is refused."""


@dataclass(frozen=True, slots=True)
class PlacedNeed:
    """Memory that a rank needs on the machine where it is placed.

    Attributes:
        rank: "pool[rank]".
        node: Ray's id of its machine.
        need: What the process takes.
    """

    rank: str
    node: str
    need: ProcessNeed

    @property
    def main_bytes(self) -> float:
        """Bytes of main memory."""
        return self.need.host_bytes + (0.0 if self.need.gpus else self.need.num_bytes)

    def in_words(self, num_bytes: float) -> str:
        """The rank, and how much of a memory it needs."""
        return f"{self.rank} ({self.need.name}) {in_gb(num_bytes)}"


def require_placed(
    config: DistillConfig, model: ModelFolder, encoding: frozenset[str], placement: Placement
) -> list[str]:
    """Checks that the machines of all reserved bundles have what their ranks need.

    Args:
        config: The run.
        model: Its networks.
        encoding: Sections of `topology` whose processes load a text encoder.
        placement: Where the ranks are; those of a service are looked after by it.

    Returns:
        Sentences about machines that may lack memory, and about those that were not looked at.

    Raises:
        ConfigError: A machine or a GPU has much less; names machine, pool and rank.
    """
    try:
        nodes = placement.nodes()
        found, failed = capacities_of({node for each in nodes.values() for node in each})
    # A run does not end because its machines could not be read: that is reported.
    except Exception as error:
        return [_not_compared(f"{type(error).__name__}: {error}")]
    placed = placed_needs(process_needs(config, model, encoding), nodes)
    tight = require_room(placed, found, Workload.of(config))
    return tight + [_not_compared(f"{machine}: {why}") for machine, why in failed.items()]


def placed_needs(
    needs: Sequence[ProcessNeed], nodes: Mapping[str, Sequence[str]]
) -> list[PlacedNeed]:
    """The needs of each rank where it is.

    Args:
        needs: Of one process of each pool.
        nodes: Ray's id of the machine of every rank, by pool.
    """
    return [
        PlacedNeed(f"{need.pool}[{rank}]", node, need)
        for need in needs
        for rank, node in enumerate(nodes.get(need.pool, ()))
    ]


def require_room(
    placed: Sequence[PlacedNeed], capacities: Mapping[str, Capacity], work: Workload
) -> list[str]:
    """Compares what ranks need with what their machines have.

    Args:
        placed: All ranks.
        capacities: Machines by Ray's id; those that are missing are not compared.
        work: The run's iteration, for the settings that would save memory.

    Returns:
        Sentences about machines that lack memory by the model, and by no more than it may err.

    Raises:
        ConfigError: The first machine that lacks more, of a GPU or of main memory.
    """
    tight: list[str] = []
    for node, capacity in capacities.items():
        there = [one for one in placed if one.node == node]
        on_gpus = [one for one in there if one.need.gpus]
        # Where torch sees no GPU, `sgmd doctor --address` says what is wrong.
        if capacity.gpu_bytes and on_gpus:
            tight += _of_each_gpu(on_gpus, capacity, work)
            # Of a machine that torch sees a part of, the sum is not known.
            if capacity.sees_all_gpus:
                tight += _of_all_gpus(on_gpus, capacity)
        tight += _of_main_memory(there, capacity)
    return tight


def _of_each_gpu(ranks: Sequence[PlacedNeed], capacity: Capacity, work: Workload) -> list[str]:
    # A rank of several GPUs computes on the first.
    largest, one = max(capacity.gpu_bytes), max(ranks, key=lambda rank: rank.need.num_bytes)
    error = ConfigError(
        f"checking the GPUs of machine {capacity.name}",
        f"{one.in_words(one.need.num_bytes)} is placed there, and its GPUs have {in_gb(largest)}",
        "each rank to fit its GPU",
        f"Pin the pool to machines with larger GPUs (topology.pools.NAME.labels), or: "
        f"{ways_to_save(work)}",
    )
    return _told(one.need.num_bytes, largest, error)


def _of_all_gpus(ranks: Sequence[PlacedNeed], capacity: Capacity) -> list[str]:
    needed, there = sum(one.need.num_bytes for one in ranks), sum(capacity.gpu_bytes)
    words = ", ".join(one.in_words(one.need.num_bytes) for one in ranks)
    error = ConfigError(
        f"checking the GPUs of machine {capacity.name}",
        f"{in_gb(needed)} placed there ({words}), and it has "
        f"{count_in_words(len(capacity.gpu_bytes), 'GPU')} with {in_gb(there)} in all",
        "ranks that share GPUs to fit them together",
        "Raise `gpus` of these pools, so that fewer ranks share a GPU",
    )
    return _told(needed, there, error)


def _of_main_memory(ranks: Sequence[PlacedNeed], capacity: Capacity) -> list[str]:
    needed = sum(one.main_bytes for one in ranks)
    words = ", ".join(one.in_words(one.main_bytes) for one in ranks if one.main_bytes)
    error = ConfigError(
        f"checking the main memory of machine {capacity.name}",
        f"the processes placed there need {in_gb(needed)} ({words}), and it has "
        f"{in_gb(capacity.memory_bytes)}",
        "a machine that holds all of its processes",
        "Spread the pools over more machines (topology.pools.NAME.strategy: spread), give pools "
        "GPUs, or pin them to larger machines (topology.pools.NAME.labels)",
    )
    return _told(needed, capacity.memory_bytes, error)


def _told(needed: float, there: float, error: ConfigError) -> list[str]:
    """Refuses what is surely too much; returns words about what may be."""
    if needed > MODEL_MARGIN * there:
        raise error
    # Needs are modelled, and a run that has trained before must not be ended by a model.
    return [f"{error} The run continues, because needs are modelled"] if needed > there else []


def _not_compared(why: str) -> str:
    return f"the memory of machines was not compared with what the run needs: {why}"
