"""Memory of the machines that a run's processes were placed on, before a role loads there.

    needs of a process (by pool)  x  machine of each rank  ->  compared with what the machine has

The checks before a run see this machine alone; where Ray has put which rank is known when all
bundles are reserved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.ray.capacity import Capacity, addresses_of, capacities_of
from cluster.ray.topology import Placement
from pipelines.config.recipe import DistillConfig
from pipelines.distillation.readiness import ProcessNeed, in_gb, process_needs, ways_to_save
from pipelines.planning.workload import Workload
from sgmd_core.errors import ConfigError
from workers.models.folder import ModelFolder


@dataclass(frozen=True, slots=True)
class PlacedNeed:
    """Memory that a rank needs on the machine where it is placed.

    Attributes:
        rank: "pool[rank]".
        machine: Address of its machine.
        need: What the process takes.
    """

    rank: str
    machine: str
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
) -> str:
    """Checks that the machines of all reserved bundles have what their ranks need.

    Args:
        config: The run.
        model: Its networks.
        encoding: Sections of `topology` whose processes load a text encoder.
        placement: Where the ranks are; those of a service are looked after by it.

    Returns:
        Machines that could not be looked at, and why; empty if all could be.

    Raises:
        ConfigError: A machine or a GPU has less; names machine, pool and rank.
    """
    try:
        nodes = placement.nodes()
        found, failed = capacities_of({node for each in nodes.values() for node in each})
        places = addresses_of(nodes)
    # A run does not end because its machines could not be looked at: that is told.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    placed = placed_needs(process_needs(config, model, encoding), places)
    require_room(placed, found, Workload.of(config))
    return "; ".join(f"{machine}: {why}" for machine, why in failed.items())


def placed_needs(
    needs: Sequence[ProcessNeed], places: Mapping[str, Sequence[str]]
) -> list[PlacedNeed]:
    """The needs of each rank where it is.

    Args:
        needs: Of one process of each pool.
        places: Address of the machine of every rank, by pool.
    """
    return [
        PlacedNeed(f"{need.pool}[{rank}]", machine, need)
        for need in needs
        for rank, machine in enumerate(places.get(need.pool, ()))
    ]


def require_room(
    placed: Sequence[PlacedNeed], capacities: Mapping[str, Capacity], work: Workload
) -> None:
    """Compares what ranks need with what their machines have.

    Args:
        placed: All ranks.
        capacities: Machines by address; those that are missing are not compared.
        work: The run's iteration, for the settings that would save memory.

    Raises:
        ConfigError: The first machine that lacks memory of a GPU, or main memory.
    """
    for machine, capacity in capacities.items():
        there = [one for one in placed if one.machine == machine]
        # Where torch sees no GPU, `sgmd doctor --address` says what is wrong.
        if capacity.gpu_bytes:
            _require_gpus(machine, [one for one in there if one.need.gpus], capacity, work)
        needed = sum(one.main_bytes for one in there)
        if needed > capacity.memory_bytes:
            words = ", ".join(one.in_words(one.main_bytes) for one in there if one.main_bytes)
            raise ConfigError(
                f"checking the main memory of machine {machine}",
                f"the processes placed there need {in_gb(needed)} ({words}), and it has "
                f"{in_gb(capacity.memory_bytes)}",
                "a machine that holds all of its processes",
                "Spread the pools over more machines (topology.pools.NAME.strategy: spread), give "
                "pools GPUs, or pin them to larger machines (topology.pools.NAME.labels)",
            )


def _require_gpus(
    machine: str, ranks: Sequence[PlacedNeed], capacity: Capacity, work: Workload
) -> None:
    largest, attempted = max(capacity.gpu_bytes), f"checking the GPUs of machine {machine}"
    for one in ranks:
        # A rank of several GPUs computes on the first.
        if one.need.num_bytes > largest:
            raise ConfigError(
                attempted,
                f"{one.in_words(one.need.num_bytes)} is placed there, and its GPUs have "
                f"{in_gb(largest)}",
                "each rank to fit its GPU",
                f"Pin the pool to machines with larger GPUs (topology.pools.NAME.labels), or: "
                f"{ways_to_save(work)}",
            )
    needed = sum(one.need.num_bytes for one in ranks)
    if needed > sum(capacity.gpu_bytes):
        words = ", ".join(one.in_words(one.need.num_bytes) for one in ranks)
        raise ConfigError(
            attempted,
            f"{in_gb(needed)} placed there ({words}), and its {len(capacity.gpu_bytes)} GPUs have "
            f"{in_gb(sum(capacity.gpu_bytes))} in all",
            "ranks that share GPUs to fit them together",
            "Raise `gpus` of these pools, so that fewer ranks share a GPU",
        )
