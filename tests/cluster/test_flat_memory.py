"""What an iteration leaves behind: nothing in the object store, and no tensor in the controller."""

import gc
import time
from collections.abc import Callable, Iterator
from itertools import count

import pytest
import torch

from benchmarks.dummies import make_dummy_worker, run_dummies
from benchmarks.store_use import store_use
from cluster.ray.group import RayWorkerGroup
from cluster.ray.pools import Pool
from cluster.ray.topology import reserve
from cluster.schedule.program import Pass, Stage, Team
from cluster.schedule.schedule import order_calls
from cluster.schedule.simulate import Costs
from cluster.transfer import WireTensor
from tests.cluster.toys import WAIT_S

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

RESULT_BYTES = 400_000
"""Above the size from which Ray keeps results in the store."""
NUM_ITERATIONS, MICRO_BATCHES = 80, 3
"""So many that a quarter of all results is more than the 100 that Ray frees at a time.

Whether it frees so many at once, or fewer after its second, is a matter of how fast iterations are.
"""


@pytest.fixture
def run_iteration(ray_cluster: None):
    pools = [Pool("maker", cpus_per_rank=0.1), Pool("judge", cpus_per_rank=0.1)]
    stages = (
        Stage("paint", "maker", keeps_until="learn"),
        Stage("look", "judge", ("paint",)),
        Stage("learn", "maker", ("look",), accumulates=True),
    )
    teams, costs = {pool.name: Team() for pool in pools}, Costs(lambda c: 0, lambda c: RESULT_BYTES)
    with reserve(pools, timeout_s=WAIT_S) as placement:
        groups = {
            pool.name: RayWorkerGroup(pool.name, make_dummy_worker, (), placement) for pool in pools
        }
        for group in groups.values():
            group.wait_ready(WAIT_S)
        numbers = count()

        def run() -> None:
            number = next(numbers)
            calls = order_calls(
                (Pass(stages),), teams, MICRO_BATCHES, 2, iterations=range(number, number + 1)
            )
            run_dummies(calls, groups, costs, WAIT_S)

        yield run
        for group in groups.values():
            group.close()


@pytest.fixture
def looking_at_new_objects() -> Iterator[None]:
    """Keeps what is here already from being looked at again after every iteration."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def tensors_here() -> int:
    # By type: asking an object for its class makes some of torch's warn.
    return sum(issubclass(type(one), torch.Tensor | WireTensor) for one in gc.get_objects())


def settled(empty: Callable[[], bool], within_s: float = 20.0) -> bool:
    """Whether it is so before long: Ray frees objects a little after their last use."""
    until = time.monotonic() + within_s
    while not empty() and time.monotonic() < until:
        time.sleep(0.1)
    return empty()


def test_objects_are_freed_as_soon_as_used_and_the_controller_holds_no_tensor(
    run_iteration, looking_at_new_objects
):
    others = store_use().num_objects
    run_iteration()
    tensors, most = tensors_here(), 0
    for _ in range(NUM_ITERATIONS):
        run_iteration()
        most = max(most, store_use().num_bytes)
        assert tensors_here() <= tensors
    made = 2 * MICRO_BATCHES * NUM_ITERATIONS * RESULT_BYTES
    assert most < made / 4
    assert settled(lambda: store_use().num_objects <= others)
