"""What the tests of this folder share: groups of toys on Ray, and a bucket beside a folder."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest
from s3fs import S3FileSystem

from cluster.worker_group import WorkerGroup
from tests.cluster.toys import WAIT_S, Toy, make_toy


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def s3_bucket() -> Iterator[str]:
    """A bucket on an S3 server in this process."""
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as environment:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "test-key")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        # A client that is kept would go on speaking to the server of the module before.
        S3FileSystem.clear_instance_cache()
        # The buckets of this server live as long as the process.
        with suppress(FileExistsError):
            fsspec.filesystem("s3").mkdir("runs")
        yield "s3://runs"
        server.stop()


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "checkpoints")
    return f"{request.getfixturevalue('s3_bucket')}/{tmp_path.name}"
