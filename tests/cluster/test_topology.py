"""Resources are reserved all at once, or the shortage is told bundle by bundle."""

import time

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import ClusterError, InsufficientResourcesError
from cluster.ray_group import RayWorkerGroup
from cluster.topology import Placement, Pool, bundles_of, reserve
from tests.cluster.toys import Toy, make_toy

WAIT_S = 60.0


def test_pools_become_one_bundle_a_rank_without_zeros():
    pools = [Pool("a", 2, cpus_per_rank=0.5), Pool("b", 1, cpus_per_rank=0, gpus_per_rank=1)]
    assert bundles_of(pools) == [{"CPU": 0.5}, {"CPU": 0.5}, {"GPU": 1.0}]


def test_a_pool_needs_ranks_resources_and_a_name_of_its_own():
    with pytest.raises(ClusterError, match="0 ranks"):
        Pool("a", 0)
    with pytest.raises(ClusterError, match="0 CPU and 0 GPU"):
        Pool("a", cpus_per_rank=0, gpus_per_rank=0)
    with pytest.raises(ClusterError, match="a name for each pool"):
        bundles_of([Pool("a"), Pool("a")])


def _free_cpus_within(seconds: float, at_least: float) -> float:
    """Free CPUs; Ray takes note of a release a little later."""
    end = time.monotonic() + seconds
    while (free := ray.available_resources().get("CPU", 0.0)) < at_least:
        if time.monotonic() > end:
            return free
        time.sleep(0.05)
    return free


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
class TestOnRay:
    def test_a_shortage_names_what_each_bundle_lacks_and_reserves_nothing(self):
        assert _free_cpus_within(WAIT_S, at_least=4) == 4
        pools = [Pool("small", 2, cpus_per_rank=1), Pool("big", 2, 2), Pool("fast", 1, 1, 1)]
        with pytest.raises(InsufficientResourcesError) as caught:
            reserve(pools, timeout_s=0.5)
        told = str(caught.value)
        assert "4 CPU, 0 GPU of 4 CPU, 0 GPU are free on 1 machines" in told
        lines = [" ".join(line.split()) for line in told.splitlines()]
        assert "small[1] asks for 1 CPU, 0 GPU fits" in lines
        assert "big[0] asks for 2 CPU, 0 GPU fits" in lines
        assert "big[1] asks for 2 CPU, 0 GPU lacks 2 CPU" in lines
        assert "fast[0] asks for 1 CPU, 1 GPU lacks 1 CPU, 1 GPU" in lines
        with reserve([Pool("all", 4)], timeout_s=WAIT_S):
            pass

    def test_a_placement_is_given_back_on_every_way_out(self):
        with pytest.raises(ZeroDivisionError), reserve([Pool("all", 4)], timeout_s=WAIT_S):
            _ = 1 / 0
        assert _free_cpus_within(WAIT_S, at_least=4) == 4

    def test_an_unknown_pool_is_refused(self):
        with (
            reserve([Pool("a", cpus_per_rank=0.1)], timeout_s=WAIT_S) as placement,
            pytest.raises(ClusterError, match=r"pools \['a'\]"),
        ):
            RayWorkerGroup("b", make_toy, (1,), placement)

    def test_pools_take_over_the_placement_group_they_are_started_in(self):
        pools = [Pool("a", 2, cpus_per_rank=0.5)]
        group = placement_group([{"CPU": 1}, *bundles_of(pools)])
        inside = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        trial = ray.remote(_histories_of_adopted_pools).options(scheduling_strategy=inside)
        assert ray.get(trial.remote(pools), timeout=WAIT_S) == [(3,), (3,)]
        with pytest.raises(ClusterError, match="after its own"):
            ray.get(trial.remote([Pool("a", 3)]), timeout=WAIT_S)
        remove_placement_group(group)

    def test_outside_of_a_placement_group_there_is_none_to_take_over(self):
        with pytest.raises(ClusterError, match="no placement group"):
            Placement.adopt_current([Pool("a")])


def _histories_of_adopted_pools(pools: list[Pool]) -> list[tuple[int, ...]]:
    with (
        Placement.adopt_current(pools) as placement,
        RayWorkerGroup("a", make_toy, (3,), placement) as group,
    ):
        return group.fetch(group.call(Toy.history), WAIT_S, "reading")
