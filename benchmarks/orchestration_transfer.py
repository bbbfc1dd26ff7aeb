"""One tensor from process to process and from raylet to raylet, next to a plain copy in memory."""

import os
import secrets
import statistics
import time
from contextlib import ExitStack
from typing import Any

import numpy as np
from harness import Groups, hops_s, open_sleepers, sleepers

from cluster.ray.pools import Pool
from cluster.runtime import start_ray

SIZES_MB = (1, 8, 64)
STORE_BYTES = 600 * 2**20


def measure_transfer(repetitions: int) -> dict[str, Any]:
    """Milliseconds and GB/s by size: within a machine's store, between two stores, and memcpy."""
    found: dict[str, Any] = {"memcpy": [_memcpy(size, repetitions) for size in SIZES_MB]}
    with sleepers({"maker": 1, "taker": 1}) as groups:
        found["two processes"] = _hops(groups, repetitions)
    found["two raylets"] = _between_raylets(repetitions)
    return found


def _between_raylets(repetitions: int) -> dict[str, Any]:
    """Two nodes of one cluster on this machine, each with its own object store."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "resources": {"here": 1}})
    cluster.add_node(**node, resources={"there": 1})
    try:
        with ExitStack() as stack:
            stack.enter_context(start_ray(cluster.address))
            pools = [
                Pool("maker", cpus_per_rank=0.5, resources={"here": 1.0}),
                Pool("taker", cpus_per_rank=0.5, resources={"there": 1.0}),
            ]
            return _hops(open_sleepers(stack, pools), repetitions)
    finally:
        cluster.shutdown()


def _hops(groups: Groups, repetitions: int) -> dict[str, Any]:
    hops_s(groups, 0, 5)
    empty_s = statistics.median(hops_s(groups, 0, repetitions))
    rows = []
    for size in SIZES_MB:
        times = hops_s(groups, size * 10**6, repetitions)
        rows.append(_row(size, statistics.median(times), empty_s))
    return {"latency_ms": 1e3 * empty_s, "sizes": rows}


def _memcpy(megabytes: int, repetitions: int) -> dict[str, float]:
    source = np.ones(megabytes * 10**6, np.uint8)
    target = np.empty_like(source)
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - started)
    return _row(megabytes, statistics.median(times), 0.0)


def _row(megabytes: int, seconds: float, empty_s: float) -> dict[str, float]:
    return {
        "megabytes": megabytes,
        "milliseconds": 1e3 * seconds,
        "gigabytes_per_second": megabytes / 1e3 / max(1e-9, seconds - empty_s),
    }
