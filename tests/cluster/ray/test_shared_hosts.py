"""Groups that share processes hand values over in them; others get them when they ask."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest
import ray

from benchmarks.dummies import make_dummy_worker, run_dummies
from cluster.errors import (
    ControllerTensorError,
    StartTimeoutError,
    TransferError,
    WorkerDiedError,
)
from cluster.ray.gpus import device_index
from cluster.ray.group import RayWorkerGroup
from cluster.ray.hosts import Hosts
from cluster.ray.pools import Pool
from cluster.ray.topology import Placement, reserve
from cluster.schedule.simulate import Costs
from cluster.spans import labelled
from cluster.worker_group import made_together, taken_by
from tests.cluster.schedule.test_dealing import MAPS, calls_of
from tests.cluster.toys import WAIT_S, Singer, Toy, make_singer, make_sleepy, make_toy

ray_only = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def test_a_gpu_is_named_by_its_place_among_those_in_sight():
    assert device_index("3", None) == 3
    assert device_index("5", "4,5") == 1
    assert device_index("GPU-b", "GPU-a, GPU-b") == 1


@pytest.fixture(scope="module")
def placement(ray_cluster: None) -> Iterator[Placement]:
    pools = [Pool("flat", 2, cpus_per_rank=0.1), Pool("beside", cpus_per_rank=0.1)]
    with reserve(pools, timeout_s=WAIT_S) as placement:
        yield placement


@pytest.fixture(scope="module")
def groups(placement: Placement) -> Iterator[list[RayWorkerGroup[Toy]]]:
    hosts = Hosts("flat", placement, shared=True)
    groups = [
        RayWorkerGroup("one", make_toy, (1,), hosts),
        RayWorkerGroup("two", make_toy, (2,), hosts),
        RayWorkerGroup("beside", make_toy, (3,), placement),
    ]
    for group in groups:
        group.wait_ready(WAIT_S)
    yield groups
    for group in groups:
        group.close()


class TestShared:
    """Two groups in the same two processes, and one beside them."""

    pytestmark = ray_only

    def test_each_has_workers_of_its_own_in_the_same_processes(self, groups):
        one, two, beside = groups
        assert one.process_ids() == two.process_ids() != beside.process_ids()
        assert one.fetch(one.call(Toy.history), WAIT_S, "reading") == [(1,)] * 2
        assert two.fetch(two.call(Toy.history), WAIT_S, "reading") == [(2,)] * 2

    def test_a_tensor_stays_in_its_process_and_is_the_same_for_all_there(self, groups):
        one, two, beside = groups
        made = one.call_rank(0, Toy.tensor, 5)
        assert made.reference is not None
        # Its neighbour writes into the very tensor, which no wire would allow.
        added = [two.call_rank(0, Toy.overwrite, made), one.call_rank(0, Toy.overwrite, made)]
        assert one.fetch(added, WAIT_S, "adding") == [5.0, 10.0]
        # Other processes are sent a copy.
        copied = [two.call_rank(1, Toy.overwrite, made), beside.call_rank(0, Toy.overwrite, made)]
        assert one.fetch(copied, WAIT_S, "copying") == [15.0, 15.0]
        assert one.fetch([one.call_rank(0, Toy.overwrite, made)], WAIT_S, "adding") == [15.0]

    def test_calls_made_together_are_one_task_and_hand_on_what_calls_by_themselves_do(self, groups):
        one, two, beside = groups
        here, there = ("flat", 0), ("beside", 0)
        with made_together(here):
            with taken_by({here, there}):
                made = one.call_rank(0, Toy.tensor, 5)
            with taken_by({there}):
                alone = two.call_rank(0, Toy.tensor, 3)
            with taken_by(set()):
                added = two.call_rank(0, Toy.overwrite, made)
                # No part of it: another process, which is asked at once.
                other = beside.call_rank(0, Toy.tensor, 2)
        assert made.reference == added.reference != alone.reference
        assert one.fetch([added], WAIT_S, "adding") == [5.0]
        # It was sent before its neighbour wrote into it, and stays for later calls here.
        copied = [beside.call_rank(0, Toy.size_of, value) for value in (made, alone, other)]
        assert one.fetch(copied, WAIT_S, "counting") == [5, 3, 2]
        later = [one.call_rank(0, Toy.overwrite, made), two.call_rank(1, Toy.size_of, made)]
        assert one.fetch(later, WAIT_S, "adding") == [10.0, 5]
        with pytest.raises(ControllerTensorError, match="tensor"):
            one.fetch([made], WAIT_S, "looking")

    def test_what_calls_made_together_keep_is_dropped_with_their_futures(self, groups):
        one, two, _ = groups
        with made_together(("flat", 0)), taken_by({("flat", 0)}):
            made = one.call_rank(0, Toy.tensor, 5)
            assert two.call_rank(0, Toy.size_of, made).owned is not None
        number, actor = made.owned.number, made.owned.actor
        assert ray.get(actor.keeps.remote(number))
        del made
        one.fetch([one.call_rank(0, Toy.note, 1)], WAIT_S, "noting")
        assert not ray.get(actor.keeps.remote(number))

    def test_a_failure_among_calls_made_together_names_its_call_and_is_that_of_all(self, groups):
        one, two, _ = groups
        with made_together(("flat", 0)), taken_by(set()):
            told = [
                one.call_rank(0, Toy.note, 2),
                two.call_rank(0, Toy.explode),
                two.call_rank(0, Toy.note, 3),
            ]
        for future in told:
            with pytest.raises(Exception, match=r".") as caught:
                one.fetch([future], WAIT_S, "noting")
            assert "explode() of two rank 0" in "".join(caught.value.__notes__)
        # Calls that are given up before they are made leave nothing behind.
        with suppress(KeyError), made_together(("flat", 0)):
            one.call_rank(0, Toy.explode)
            raise KeyError
        assert one.fetch([one.call_rank(0, Toy.note, 4)], WAIT_S, "noting")

    def test_what_stays_is_not_copied_and_is_no_part_of_a_graph(self, groups):
        one, two, _ = groups
        counted = two.call_rank(0, Toy.size_of, one.call_rank(0, Toy.elsewhere))
        assert two.fetch([counted], WAIT_S, "counting") == [3]
        with pytest.raises(TransferError, match=r"graph\(\) is part of an autograd"):
            one.fetch([one.call_rank(0, Toy.graph)], WAIT_S, "looking")

    def test_the_controller_gets_small_values_alone(self, groups):
        one, *_ = groups
        with pytest.raises(ControllerTensorError):
            one.fetch([one.call_rank(0, Toy.tensor, 5)], WAIT_S, "looking")
        assert one.fetch([one.call_rank(0, Toy.sleep, 0.0)], WAIT_S, "sleeping") == [0.0]

    def test_a_value_is_let_go_with_the_last_future_of_it(self, groups):
        one, *_ = groups
        hosts = one._seats[0].hosts
        made = one.call_rank(0, Toy.tensor, 5)
        number = made.owned.number
        del made
        one.fetch([one.call_rank(0, Toy.sleep, 0.0)], WAIT_S, "sleeping")
        assert not ray.get(hosts.actors[0].keeps.remote(number), timeout=WAIT_S)

    def test_work_is_told_by_group_and_label(self, groups):
        one, two, _ = groups
        one.timings()
        with labelled(7, 1, 2):
            one.fetch([one.call_rank(1, Toy.sleep, 0.05)], WAIT_S, "sleeping")
        (works,) = [part for part in one.fetch(one.ask_work(), WAIT_S, "reading") if part]
        (work,) = works
        assert (work.role, work.rank, work.method) == ("one", 1, "sleep")
        assert (work.label.iteration, work.label.part, work.label.micro_batch) == (7, 1, 2)
        assert work.ended_s - work.began_s >= 0.05
        assert two.clocks() == one.clocks() or len({c.machine for c in two.clocks()}) == 1

    def test_a_value_that_stayed_in_a_process_is_lost_with_it(self, groups):
        """Leaves both groups with new workers in that process."""
        one, two, beside = groups
        made = one.call_rank(0, Toy.tensor, 5)
        (hosts,) = one.pools
        hosts.end(0)
        hosts.restart([0])
        for group in (one, two):
            group.rebuild([0])
            group.wait_ready(WAIT_S)
        # The new process has never heard of it, and must not be asked for it.
        for group in (beside, two):
            with pytest.raises(WorkerDiedError) as caught:
                group.fetch([group.call_rank(0, Toy.size_of, made)], WAIT_S, "counting")
            assert (caught.value.group, caught.value.rank) == ("one", 0)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_an_iteration_moves_the_bytes_that_its_schedule_counts():
    """Two pools of two ranks, the teacher on both: what their processes took from others."""
    num_bytes = Counter(rollout=25_000, denoise=8_000, signal=9_000)
    teams, calls = MAPS["two pools"], calls_of("shared", "two pools", 5, 3, 0)
    process = [teams[call.role].process(call.role, call.rank) for call in calls]
    expected = Counter[tuple[str, int]]()
    for call, here in zip(calls, process, strict=True):
        apart = [calls[taken].stage for taken in call.inputs if process[taken] != here]
        expected[here] += sum(num_bytes[stage] for stage in apart)
    pools = [Pool(name, 2, cpus_per_rank=0.1) for name in ("a", "b")]
    with ExitStack() as stack:
        placement = stack.enter_context(reserve(pools, timeout_s=WAIT_S))
        hosts = {pool.name: Hosts(pool.name, placement, shared=True) for pool in pools}
        groups = {
            role: stack.enter_context(RayWorkerGroup(role, make_dummy_worker, (), homes))
            for role, homes in {
                role: [hosts[home.pool] for home in teams[role].homes]
                for role in {call.role for call in calls}
            }.items()
        }
        for group in groups.values():
            group.wait_ready(WAIT_S)
        run_dummies(
            calls, groups, Costs(lambda _: 0.0, lambda call: num_bytes[call.stage]), WAIT_S, teams
        )
        for (pool, rank), counted in expected.items():
            actor = hosts[pool].actors[rank]
            assert ray.get(actor.received_bytes.remote(), timeout=WAIT_S) == counted > 0
    assert len(expected) == 4


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_copies_meet_apart_from_one_another():
    with (
        reserve([Pool("choir", 4, cpus_per_rank=0.1)], timeout_s=WAIT_S) as placement,
        RayWorkerGroup("choir", make_singer, (), placement, replicas=2) as group,
    ):
        group.wait_ready(WAIT_S)
        places = group.fetch(group.call(Singer.place), WAIT_S, "counting")
        assert places == [(0, 2), (1, 2)] * 2
        notes = group.map(Singer.chord, [1.0, 10.0, 2.0, 20.0])
        assert group.fetch(notes, WAIT_S, "singing") == [11.0, 11.0, 22.0, 22.0]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_ranks_that_do_not_come_up_in_time_are_told_one_by_one():
    with (
        reserve([Pool("late", 2, cpus_per_rank=0.1)], timeout_s=WAIT_S) as placement,
        RayWorkerGroup("late", make_sleepy, (), placement) as group,
    ):
        started = time.monotonic()
        while group._start_state(0) == "its process has not started":
            assert time.monotonic() - started < WAIT_S
            time.sleep(0.1)
        with pytest.raises(StartTimeoutError) as caught:
            group.wait_ready(0.1)
    assert caught.value.group == "late"
    assert "is still building" in caught.value.states[0]
    assert "late[1]" in str(caught.value)
