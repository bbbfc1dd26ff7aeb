"""Resources in all and free: machines of a Ray cluster; cores and memory of this one."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path


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
    # Here, because a run in one process looks at memory where Ray need not be installed.
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    return ClusterInventory(
        num_nodes=sum(bool(node["Alive"]) for node in ray.nodes()),
        cpus=total.get("CPU", 0.0),
        gpus=total.get("GPU", 0.0),
        free_cpus=free.get("CPU", 0.0),
        free_gpus=free.get("GPU", 0.0),
    )


def num_cores() -> int:
    """Cores that this process may use: as many as `taskset` or a container's cpuset allows."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def memory_bytes() -> tuple[int, int]:
    """Memory that this process may use: (in all, free), a container's limit included.

    Where the system does not say what is free (outside of Linux), all of it counts as free.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        free = total
    else:
        # What is available counts the disk cache, which gives way.
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    limit_file, used_file = (Path("/sys/fs/cgroup") / f"memory.{n}" for n in ("max", "current"))
    if limit_file.exists() and (limit := limit_file.read_text().strip()) != "max":
        total = min(total, int(limit))
        free = min(free, int(limit) - int(used_file.read_text()))
    return total, free
