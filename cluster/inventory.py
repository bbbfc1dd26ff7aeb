"""What a Ray cluster consists of: its machines and their resources, in all and free."""

from dataclasses import dataclass

import ray


@dataclass(frozen=True, slots=True)
class ClusterInventory:
    """The machines of a cluster.

    Attributes:
        num_nodes: Machines that are alive.
        cpus: Logical CPUs of all of them.
        gpus: GPUs of all of them.
        free_cpus: CPUs that nothing has reserved.
        free_gpus: GPUs that nothing has reserved.
    """

    num_nodes: int
    cpus: float
    gpus: float
    free_cpus: float
    free_gpus: float


def take_inventory() -> ClusterInventory:
    """Counts the cluster that this process is connected to."""
    total, free = ray.cluster_resources(), ray.available_resources()
    return ClusterInventory(
        num_nodes=sum(bool(node["Alive"]) for node in ray.nodes()),
        cpus=total.get("CPU", 0.0),
        gpus=total.get("GPU", 0.0),
        free_cpus=free.get("CPU", 0.0),
        free_gpus=free.get("GPU", 0.0),
    )
