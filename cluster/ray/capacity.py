"""Memory of machines and of their GPUs, read on each machine before anything large is loaded there.

Ray knows how many GPUs a machine has, and not how large they are. This machine is looked at by this
process, every other one by a process of its own, which ends when it has answered. Several nodes of
Ray at one address, such as one for each GPU of a host, are machines of their own.
"""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import ray
import torch

from cluster.errors import ClusterError
from cluster.inventory import memory_bytes
from cluster.ray.every_machine import OnMachines, machines_by_id
from cluster.ray.group import RayWorkerGroup
from cluster.ray.shortage import Machine

_NAME = "capacity"
_LOOK_S = 120.0


@dataclass(frozen=True, slots=True)
class Capacity:
    """Memory of one machine.

    Attributes:
        memory_bytes: Main memory in all, a container's limit included.
        gpu_bytes: Memory in all of each GPU that torch sees.
        name: What it is called: its address, with digits of its id where several share one.
        num_gpus: GPUs that Ray has there; of a GPU in instances (MIG) torch sees one alone.
    """

    memory_bytes: int
    gpu_bytes: tuple[int, ...] = ()
    name: str = ""
    num_gpus: float = 0.0

    @property
    def sees_all_gpus(self) -> bool:
        """The sizes are those of all GPUs that Ray has there."""
        return len(self.gpu_bytes) >= self.num_gpus

    def of(self, machine: Machine) -> "Capacity":
        """The same memory as that of this machine."""
        return replace(self, name=machine.name, num_gpus=machine.total.get("GPU", 0.0))


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
        What each machine has, by Ray's id, and by the names of those that did not answer, why.
    """
    own = ray.get_runtime_context().get_node_id()
    return look_at_machines(
        nodes, machines_by_id(), own, lambda others: ask_machines(others, timeout_s)
    )


def look_at_machines(
    nodes: Collection[str],
    known: Mapping[str, Machine],
    own: str,
    ask: Callable[[Mapping[str, Machine]], tuple[dict[str, Capacity], dict[str, str]]],
) -> tuple[dict[str, Capacity], dict[str, str]]:
    """Looks at this process's machine, where it is one of them, and asks the others."""
    others = {node: known[node] for node in nodes if node in known}
    gone = {node: "it has left the cluster" for node in nodes if node not in known}
    found: dict[str, Capacity] = {}
    if own in others:
        here = capacity_here().of(others[own])
        # A job's own process may see none of the GPUs: then one that does is asked.
        if here.sees_all_gpus:
            found[own] = here
            del others[own]
    if not others:
        return found, gone
    answers, silent = ask(others)
    return found | answers, gone | silent


def ask_machines(
    others: Mapping[str, Machine], timeout_s: float
) -> tuple[dict[str, Capacity], dict[str, str]]:
    """Asks a process on each of some machines."""
    found: dict[str, Capacity] = {}
    failed: dict[str, str] = {}
    placement = OnMachines(_NAME, list(others))
    with RayWorkerGroup(_NAME, CapacityProbe, (), placement) as group:
        asked = [group.call_rank(rank, CapacityProbe.look) for rank in range(len(others))]
        end_s = time.monotonic() + timeout_s
        for (node, machine), future in zip(others.items(), asked, strict=True):
            try:
                left_s = max(0.1, end_s - time.monotonic())
                (answer,) = group.fetch([future], left_s, "reading a machine's memory")
                found[node] = answer.of(machine)
            except ClusterError as error:
                failed[machine.name] = str(error)
    return found, failed
