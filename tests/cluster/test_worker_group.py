"""What a group promises, the same in one process as on Ray."""

from collections.abc import Mapping

import pytest

from cluster.errors import ClusterError, ControllerTensorError, TransferError
from cluster.local import LocalWorkerGroup
from cluster.worker_group import WorkerGroup
from sgmd_core.errors import NonFiniteError
from tests.cluster.toys import WAIT_S, Toy

Groups = Mapping[str, WorkerGroup[Toy]]


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def groups(request: pytest.FixtureRequest) -> Groups:
    """`first` with two ranks and `second` with one, on both kinds of group."""
    if request.param == "ray":
        return request.getfixturevalue("ray_groups")
    return {
        "first": LocalWorkerGroup("first", [Toy(100), Toy(100)]),
        "second": LocalWorkerGroup("second", [Toy(100)]),
    }


def test_call_asks_every_rank_and_map_gives_each_its_own(groups):
    group = groups["first"]
    group.fetch(group.call(Toy.note, 7), WAIT_S, "noting")
    group.fetch(group.map(Toy.note, [8, 9]), WAIT_S, "noting")
    histories = group.fetch(group.call(Toy.history), WAIT_S, "reading")
    assert [history[-2:] for history in histories] == [(7, 8), (7, 9)]


def test_a_rank_works_in_the_order_of_submission(groups):
    group = groups["second"]
    futures = [group.call_rank(0, Toy.note, number) for number in range(200, 300)]
    group.fetch(futures, WAIT_S, "noting")
    history = group.fetch([group.call_rank(0, Toy.history)], WAIT_S, "reading")[0]
    assert history[-100:] == tuple(range(200, 300))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16", "int64", "uint8"])
def test_a_pending_record_reaches_another_group_bit_for_bit(groups, dtype):
    first, second = groups["first"], groups["second"]
    future = first.call_rank(0, Toy.parcel, dtype, 1000)
    described = second.call_rank(0, Toy.describe, future)
    by_keyword = second.call_rank(0, Toy.describe, parcel=future, extra=0)  # type: ignore[arg-type]
    expected = Toy().describe(Toy().parcel(dtype, 1000))
    assert second.fetch([described, by_keyword], WAIT_S, "describing") == [expected, expected]


def test_an_error_arrives_as_itself_and_says_where(groups):
    group = groups["first"]
    with pytest.raises(NonFiniteError) as caught:
        group.fetch([group.call_rank(1, Toy.explode)], WAIT_S, "training")
    assert type(caught.value) is NonFiniteError
    assert caught.value.found == "a loss of nan"
    assert "explode() of first rank 1" in caught.value.__notes__[0]


def test_an_error_reaches_the_caller_through_the_calls_that_depend_on_it(groups):
    first, second = groups["first"], groups["second"]
    failed = first.call_rank(0, Toy.explode)
    after = second.call_rank(0, Toy.note, failed)
    last = first.call_rank(1, Toy.note, after)
    with pytest.raises(NonFiniteError) as caught:
        first.fetch([last], WAIT_S, "training")
    assert "explode() of first rank 0" in caught.value.__notes__[0]


def test_the_controller_refuses_a_tensor(groups):
    group = groups["first"]
    with pytest.raises(ControllerTensorError, match=r"tensor\(\) of first rank 0 .* at result"):
        group.fetch([group.call_rank(0, Toy.tensor, 3)], WAIT_S, "looking")
    with pytest.raises(ControllerTensorError, match=r"at result\.payload"):
        group.fetch([group.call_rank(0, Toy.parcel, "float32", 3)], WAIT_S, "looking")


def test_a_graph_or_a_foreign_object_is_refused_with_its_place(groups):
    group = groups["first"]
    with pytest.raises(TransferError, match="part of an autograd graph"):
        group.fetch([group.call_rank(0, Toy.graph)], WAIT_S, "looking")
    with pytest.raises(TransferError, match=r"result.* is a builtins\.object"):
        group.fetch([group.call_rank(0, Toy.unsendable)], WAIT_S, "looking")


def test_a_wrong_rank_or_column_is_refused_before_anything_runs(groups):
    group = groups["first"]
    with pytest.raises(ClusterError, match="rank 2"):
        group.call_rank(2, Toy.history)
    with pytest.raises(ClusterError, match=r"columns of length \[3\]"):
        group.map(Toy.note, [1, 2, 3])


def test_timings_count_busy_seconds_by_method_and_start_anew(groups):
    group = groups["first"]
    group.timings()
    group.fetch(group.call(Toy.sleep, 0.05), WAIT_S, "sleeping")
    assert 0.1 <= group.timings()["sleep"] < 1
    assert "sleep" not in group.timings()


def test_a_closed_group_can_be_closed_again():
    group = LocalWorkerGroup("first", [Toy()])
    with group:
        assert group.fetch(group.call(Toy.history), WAIT_S, "reading") == [(0,)]
    group.close()
