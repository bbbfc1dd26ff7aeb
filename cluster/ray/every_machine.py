"""Processes on every machine of a cluster, beside whatever runs there.

    machines = machines_by_id()
    group = RayWorkerGroup("probe", make_probe, (), OnMachines("probe", list(machines)))

They reserve no CPU and no GPU, so they also start on a machine that is reserved to the last core,
or that offers none. They see every GPU of their machine.
"""

from collections.abc import Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.ray.pools import Pool
from cluster.ray.shortage import Machine, machines
from cluster.ray.topology import Placement

_SEES_ALL_GPUS = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}


class OnMachines(Placement):
    """A pool of one process for each entry of a list of machines.

    Args:
        name: Name of the pool.
        nodes: Ray's ids of the machines; one that occurs twice has two processes.
    """

    def __init__(self, name: str, nodes: Sequence[str]) -> None:
        super().__init__((), owned=False)
        # The CPUs are a word of the record: `actor_options` claims none.
        self._pool = Pool(name, len(nodes))
        self._nodes = tuple(nodes)

    def pool(self, name: str) -> Pool:
        """The one pool of a check, whatever the name: a process on each machine."""
        return self._pool

    def actor_options(self, name: str, rank: int) -> dict[str, Any]:
        """Returns the options of a rank's actor: its machine, and no resources."""
        return {
            "num_cpus": 0,
            "num_gpus": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(self._nodes[rank], soft=False),
            "runtime_env": _SEES_ALL_GPUS,
        }


def machines_by_id() -> dict[str, Machine]:
    """The living machines of the connected cluster by Ray's id, this process's own first.

    A name that several have, as several raylets of one machine do, gets the first digits of the id.
    """
    own = ray.get_runtime_context().get_node_id()
    found = sorted(machines(), key=lambda one: (one.node != own, one.name, one.node))
    names = [one.name for one in found]
    return {
        one.node: one if names.count(one.name) == 1 else one.renamed(f"{one.name}#{one.node[:4]}")
        for one in found
    }
