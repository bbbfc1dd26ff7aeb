"""Groups of toys on Ray that the tests of this folder share: a process each is dear."""

from collections.abc import Iterator, Mapping

import pytest

from cluster.worker_group import WorkerGroup
from tests.cluster.toys import WAIT_S, Toy, make_toy


@pytest.fixture(scope="session")
def ray_groups(ray_cluster: None) -> Iterator[Mapping[str, WorkerGroup[Toy]]]:
    """`first` with two ranks and `second` with one."""
    from cluster.ray.group import RayWorkerGroup
    from cluster.ray.pools import Pool
    from cluster.ray.topology import reserve

    pools = [Pool("first", 2, cpus_per_rank=0.1), Pool("second", cpus_per_rank=0.1)]
    with reserve(pools, timeout_s=WAIT_S) as placement:
        started = {
            pool.name: RayWorkerGroup(pool.name, make_toy, (100,), placement) for pool in pools
        }
        for group in started.values():
            group.wait_ready(WAIT_S)
        yield started
        for group in started.values():
            group.close()
