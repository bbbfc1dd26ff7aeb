"""Resources are reserved all at once, or the shortage is told bundle by bundle."""

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import ClusterError, InsufficientResourcesError
from cluster.ray_group import RayWorkerGroup
from cluster.topology import Placement, Pool, bundles_of, first_fit, reserve
from tests.cluster.toys import WAIT_S, Toy, make_toy


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


def test_a_shortage_is_told_rank_by_rank():
    pools = [Pool("small", 2, cpus_per_rank=1), Pool("big", 2, 2), Pool("fast", 1, 1, 1)]
    rows = first_fit(pools, {"CPU": 4.0, "GPU": 0.0})
    assert [(rank, verdict) for rank, _, verdict in rows] == [
        ("small[0]", "fits"),
        ("small[1]", "fits"),
        ("big[0]", "fits"),
        ("big[1]", "lacks 2 CPU"),
        ("fast[0]", "lacks 1 CPU, 1 GPU"),
    ]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
class TestOnRay:
    def test_what_the_cluster_lacks_is_an_error_and_nothing_stays_reserved(self):
        with pytest.raises(InsufficientResourcesError) as caught:
            reserve([Pool("small"), Pool("big", 2, cpus_per_rank=2)], timeout_s=0.5)
        told = " ".join(str(caught.value).split())
        assert "of 4 CPU, 0 GPU are free on 1 machines" in told
        assert "small[0] asks for 1 CPU, 0 GPU fits" in told
        assert "big[1] asks for 2 CPU, 0 GPU lacks" in told
        reserve([Pool("most", 3)], timeout_s=WAIT_S).release()

    def test_a_placement_is_given_back_on_every_way_out(self):
        with pytest.raises(ZeroDivisionError), reserve([Pool("most", 3)], timeout_s=WAIT_S):
            _ = 1 / 0
        reserve([Pool("most", 3)], timeout_s=WAIT_S).release()

    def test_an_unknown_pool_is_refused(self):
        with (
            reserve([Pool("a", cpus_per_rank=0.1)], timeout_s=WAIT_S) as placement,
            pytest.raises(ClusterError, match=r"pools \['a'\]"),
        ):
            RayWorkerGroup("b", make_toy, (1,), placement)

    def test_pools_take_over_the_placement_group_they_are_started_in(self):
        pools = [Pool("a", cpus_per_rank=0.5)]
        group = placement_group([{"CPU": 1}, *bundles_of(pools)])
        inside = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        trial = ray.remote(_histories_of_adopted_pools).options(scheduling_strategy=inside)
        assert ray.get(trial.remote(pools), timeout=WAIT_S) == [(3,)]
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
