"""Memory of machines and of their GPUs, read on each machine before anything large is loaded there.

Ray knows how many GPUs a machine has, and not how large they are. This machine is looked at by this
process, every other one by a process of its own, which ends when it has answered.
"""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import ray
import torch

from cluster.errors import ClusterError
from cluster.inventory import memory_bytes
from cluster.ray.every_machine import OnMachines
from cluster.ray.group import RayWorkerGroup
from cluster.ray.shortage import Machine, machines

_NAME = "capacity"
_LOOK_S = 120.0


@dataclass(frozen=True, slots=True)
class Capacity:
    """Memory of one machine.

    Attributes:
        memory_bytes: Main memory in all, a container's limit included.
        gpu_bytes: Memory in all of each GPU that torch sees.
    """

    memory_bytes: int
    gpu_bytes: tuple[int, ...] = ()


class CapacityProbe:
    """Looks at its machine."""

    def look(self) -> Capacity:
        """Returns what the machine has."""
        return capacity_here()


def capacity_here() -> Capacity:
    """Memory of this machine, and of the GPUs that this process sees."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    sizes = tuple(torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus)
    return Capacity(memory_bytes()[0], sizes)


def capacities_of(
    nodes: Collection[str], timeout_s: float = _LOOK_S
) -> tuple[dict[str, Capacity], dict[str, str]]:
    """Looks at the machines of some nodes, all at once.

    Args:
        nodes: Ray's ids.
        timeout_s: How long all of them together may take.

    Returns:
        What each machine has, by its address, and of those that did not answer, why.
    """
    known = {machine.node: machine for machine in machines()}
    own = known.get(ray.get_runtime_context().get_node_id())
    there = {known[node].address: node for node in nodes if node in known}
    found: dict[str, Capacity] = {}
    if own is not None and own.address in there:
        here = capacity_here()
        if len(here.gpu_bytes) >= _gpus_at(own.address, known):
            # A job's own process may see none of the GPUs: then one that does is asked.
            found[own.address] = here
            del there[own.address]
    failed: dict[str, str] = {}
    if there:
        answers, failed = _asked(there, timeout_s)
        found |= answers
    return found, failed


def addresses_of(nodes: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Addresses of the machines of nodes, in the same order: several nodes may share one.

    Args:
        nodes: Ray's ids, by any name.
    """
    known = {machine.node: machine.address for machine in machines()}
    return {name: [known.get(node, node) for node in each] for name, each in nodes.items()}


def _gpus_at(address: str, known: Mapping[str, Machine]) -> float:
    return sum(
        machine.total.get("GPU", 0.0) for machine in known.values() if machine.address == address
    )


def _asked(
    there: Mapping[str, str], timeout_s: float
) -> tuple[dict[str, Capacity], dict[str, str]]:
    """Asks a process on each of some nodes, by address."""
    found: dict[str, Capacity] = {}
    failed: dict[str, str] = {}
    placement = OnMachines(_NAME, list(there.values()))
    with RayWorkerGroup(_NAME, CapacityProbe, (), placement) as group:
        asked = {
            address: group.call_rank(rank, CapacityProbe.look) for rank, address in enumerate(there)
        }
        end_s = time.monotonic() + timeout_s
        for address, future in asked.items():
            try:
                left_s = max(0.1, end_s - time.monotonic())
                (found[address],) = group.fetch([future], left_s, "reading a machine's memory")
            except ClusterError as error:
                failed[address] = str(error)
    return found, failed
