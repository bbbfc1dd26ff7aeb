"""Resources are reserved all at once, or the shortage is told bundle by bundle."""

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import ClusterError, InsufficientResourcesError
from cluster.ray.group import RayWorkerGroup
from cluster.ray.pools import Pool, bundles_of
from cluster.ray.shortage import Machine, first_fit, matches
from cluster.ray.topology import Placement, reserve
from tests.cluster.toys import WAIT_S, Toy, make_toy


def test_pools_become_one_bundle_a_rank_without_zeros():
    pools = [Pool("a", 2, cpus_per_rank=0.5), Pool("b", 1, cpus_per_rank=0, gpus_per_rank=1)]
    assert bundles_of(pools) == [{"CPU": 0.5}, {"CPU": 0.5}, {"GPU": 1.0}]


def test_a_pool_needs_ranks_resources_and_a_name_of_its_own():
    with pytest.raises(ClusterError, match="0 ranks"):
        Pool("a", 0)
    with pytest.raises(ClusterError, match="0 CPU, 0 GPU and"):
        Pool("a", cpus_per_rank=0, gpus_per_rank=0)
    with pytest.raises(ClusterError, match="a name for each pool"):
        bundles_of([Pool("a"), Pool("a")])


class TestShortage:
    """Who gets what on two machines of four cores, of which one is half taken."""

    MACHINES = (
        Machine("big", {"CPU": 4.0}, {"CPU": 4.0}, {"kind": "left"}),
        Machine("half", {"CPU": 4.0, "fast": 1.0}, {"CPU": 2.0, "fast": 1.0}, {"kind": "right"}),
    )

    def verdicts(self, *pools: Pool) -> list[str]:
        return [row.verdict for row in first_fit(pools, self.MACHINES)]

    def test_ranks_are_served_in_order_and_what_is_missing_is_told(self):
        pools = [Pool("small", 2), Pool("big", 3, cpus_per_rank=2), Pool("gpu", 1, 0, 1)]
        rows = first_fit(pools, self.MACHINES)
        assert [(row.rank, row.verdict) for row in rows] == [
            ("small[0]", "fits on big"),
            ("small[1]", "fits on big"),
            ("big[0]", "fits on big"),
            ("big[1]", "fits on half"),
            ("big[2]", "lacks 2 CPU on big, which comes nearest"),
            ("gpu[0]", "lacks 1 GPU on big, which comes nearest"),
        ]

    def test_free_cores_of_two_machines_do_not_add_up_for_one_rank(self):
        assert self.verdicts(Pool("huge", cpus_per_rank=5)) == [
            "lacks 1 CPU on big, which comes nearest"
        ]

    def test_labels_and_custom_resources_are_counted(self):
        assert self.verdicts(Pool("a", 2, cpus_per_rank=2, labels={"kind": "!left"})) == [
            "fits on half",
            "lacks 2 CPU on half, which comes nearest",
        ]
        assert self.verdicts(Pool("a", labels={"kind": "in(up, down)"})) == [
            "no machine has the labels kind=in(up, down)"
        ]
        row = first_fit([Pool("a", resources={"fast": 2.0}, labels={"x": "y"})], self.MACHINES)[0]
        assert row.asked == "1 CPU, 2 fast where x=y"

    def test_strict_strategies_bind_the_next_rank(self):
        assert self.verdicts(Pool("a", 3, cpus_per_rank=2, strategy="STRICT_PACK")) == [
            "fits on big",
            "fits on big",
            "lacks 2 CPU on big, which comes nearest",
        ]
        assert self.verdicts(Pool("a", 3, strategy="STRICT_SPREAD")) == [
            "fits on big",
            "fits on half",
            "no further machine for its strategy, STRICT_SPREAD",
        ]

    @pytest.mark.parametrize(
        ("selector", "fits"),
        [
            ("a", True),
            ("b", False),
            ("!a", False),
            ("!b", True),
            ("in(b, a)", True),
            ("in(b)", False),
            ("!in(a, b)", False),
            ("!in(b)", True),
        ],
    )
    def test_a_selector_means_what_ray_says(self, selector: str, fits: bool):
        assert matches({"kind": selector}, {"kind": "a"}) is fits
        assert matches({"other": selector}, {"kind": "a"}) is selector.startswith("!")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
class TestOnRay:
    def test_what_the_cluster_lacks_is_an_error_and_nothing_stays_reserved(self):
        with pytest.raises(InsufficientResourcesError) as caught:
            reserve([Pool("small"), Pool("big", 2, cpus_per_rank=2)], timeout_s=0.5)
        told = " ".join(str(caught.value).split())
        assert "of 4 CPU, 0 GPU are free on 1 machine (" in told
        assert "small[0] asks for 1 CPU fits on" in told
        assert "big[1] asks for 2 CPU lacks" in told
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

    def test_a_trial_cannot_be_placed_in_another_way_than_packed(self):
        with pytest.raises(ClusterError, match="PACK for every pool"):
            Placement.adopt_current([Pool("a", strategy="SPREAD")])

    def test_a_selector_that_ray_cannot_read_is_refused(self):
        with pytest.raises(ClusterError, match="strategies and labels"):
            reserve([Pool("a", cpus_per_rank=0.1, labels={"kind": "a b c!"})], timeout_s=WAIT_S)
        reserve([Pool("most", 3)], timeout_s=WAIT_S).release()

    def test_outside_of_a_placement_group_there_is_none_to_take_over(self):
        with pytest.raises(ClusterError, match="no placement group"):
            Placement.adopt_current([Pool("a")])


def _histories_of_adopted_pools(pools: list[Pool]) -> list[tuple[int, ...]]:
    with (
        Placement.adopt_current(pools) as placement,
        RayWorkerGroup("a", make_toy, (3,), placement) as group,
    ):
        return group.fetch(group.call(Toy.history), WAIT_S, "reading")
