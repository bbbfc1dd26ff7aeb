"""What only a group of processes can do: die, be late, share memory."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from ray.exceptions import ObjectStoreFullError, RayTaskError

from cluster.errors import CallTimeoutError, ClusterError, RemoteCallError, WorkerDiedError
from cluster.ray.failures import raise_cause
from cluster.ray.group import RayWorkerGroup
from cluster.ray.pools import Pool
from cluster.ray.topology import reserve
from cluster.spans import labelled
from sgmd_core.errors import NonFiniteError
from tests.cluster.toys import WAIT_S, BareError, Toy, make_nothing, make_toy

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def placement(ray_cluster: None):
    with reserve([Pool("doomed", cpus_per_rank=0.1)], timeout_s=WAIT_S) as reserved:
        yield reserved


@pytest.fixture
def first(ray_groups):
    return ray_groups["first"]


@pytest.fixture
def second(ray_groups):
    return ray_groups["second"]


def test_a_killed_process_is_told_by_group_rank_and_what_was_attempted(placement, second):
    doomed = RayWorkerGroup("doomed", make_toy, (5,), placement)
    result_before = doomed.call_rank(0, Toy.history)
    os.kill(doomed.process_ids()[0], signal.SIGKILL)
    started = time.perf_counter()
    with pytest.raises(WorkerDiedError) as caught:
        doomed.fetch(doomed.call(Toy.history), WAIT_S, "updating in iteration 3")
    assert time.perf_counter() - started < WAIT_S / 4
    assert (caught.value.group, caught.value.rank) == ("doomed", 0)
    assert "While updating in iteration 3" in str(caught.value)

    downstream = second.call_rank(0, Toy.note, doomed.call_rank(0, Toy.note, 1))
    with pytest.raises(WorkerDiedError) as caught:
        second.fetch([downstream], WAIT_S, "learning")
    assert (caught.value.group, caught.value.rank) == ("doomed", 0)

    assert doomed.fetch([result_before], WAIT_S, "reading") == [(5,)]
    assert second.fetch([second.call_rank(0, Toy.sleep, 0.0)], WAIT_S, "sleeping") == [0.0]
    doomed.close()


def test_whether_a_call_is_done_is_told_without_waiting(second, tmp_path):
    gate = str(tmp_path / "gate")
    future = second.call_rank(0, Toy.wait_for, gate)
    # Had this waited, it would have waited for ever.
    assert not second.is_done(future)
    Path(gate).touch()
    assert second.fetch([future], WAIT_S, "waiting for the gate") == [True]
    assert second.is_done(future)


def test_a_late_rank_is_named(second):
    second.fetch([second.call_rank(0, Toy.history)], WAIT_S, "waiting for an idle rank")
    future = second.call_rank(0, Toy.sleep, 2.0)
    with pytest.raises(CallTimeoutError, match=r"second rank 0 did not finish sleep\(\)") as caught:
        second.fetch([future], 1.0, "sleeping in iteration 2")
    assert isinstance(caught.value, TimeoutError)
    assert (caught.value.attempted, caught.value.timeout_s) == ("sleeping in iteration 2", 1.0)


def test_an_error_that_cannot_travel_is_told_in_words(second):
    with pytest.raises(RemoteCallError, match="UnpicklableError: 1 and 2") as caught:
        second.fetch([second.call_rank(0, Toy.explode_unpicklably)], WAIT_S, "training")
    (note,) = caught.value.__notes__
    assert note.startswith("raised in explode_unpicklably() of second rank 0:\n")


def test_an_error_that_loses_its_notes_is_not_said_to_be_outside_of_its_call(second):
    with pytest.raises(BareError, match="1 and 2") as caught:
        second.fetch([second.call_rank(0, Toy.explode_barely)], WAIT_S, "training")
    assert not getattr(caught.value, "__notes__", [])


@pytest.mark.parametrize(
    ("is_locked", "kind", "note"),
    [
        (
            False,
            ValueError,
            "raised in packing the result of unpackable() of second rank 0, iteration 7, part 0, "
            "micro-batch 1",
        ),
        (True, TypeError, "raised in second rank 0, outside of its calls (unpackable()); training"),
    ],
    ids=["by us", "by Ray"],
)
def test_a_result_that_cannot_be_packed_names_its_call(second, is_locked, kind, note):
    with labelled(7, 0, 1):
        future = second.call_rank(0, Toy.unpackable, is_locked)
    with pytest.raises(kind) as caught:
        second.fetch([future], WAIT_S, "training")
    assert caught.value.__notes__[0].partition("\n")[0].rstrip(":") == note


def test_a_full_object_store_is_told_with_what_to_do():
    # As Ray wraps what it meets while it stores the result of a call.
    full = RayTaskError("run", "a traceback", ObjectStoreFullError("no room"))
    with pytest.raises(RemoteCallError, match=r"ObjectStoreFullError.*--object-store-memory"):
        raise_cause(full, [], "training")


def test_a_result_that_cannot_be_read_here_names_its_call(second):
    future = second.call_rank(0, Toy.foreign)
    with pytest.raises(RemoteCallError, match=r"foreign\(\) of second rank 0 .*No module named"):
        second.fetch([future], WAIT_S, "training")


def test_an_error_of_the_factory_keeps_its_type_and_is_told_to_whoever_does_not_wait(placement):
    with RayWorkerGroup("broken", make_nothing, (), placement, pool="doomed") as group:
        with pytest.raises(NonFiniteError, match="a toy"):
            group.wait_ready(WAIT_S)
        asked = group.call_rank(0, Toy.history)
        with pytest.raises(ClusterError, match=r"building it has failed: NonFiniteError: .*a toy"):
            group.fetch([asked], WAIT_S, "reading")


def test_receivers_of_one_tensor_cannot_see_each_other_write(first, second):
    shared = second.call_rank(0, Toy.tensor, 500_000)
    written = first.call(Toy.overwrite, shared) + second.call(Toy.overwrite, shared)
    assert first.fetch(written, WAIT_S, "writing") == [500_000.0] * 3


def test_a_rank_gets_the_openmp_threads_of_its_cpus(second):
    assert second.fetch(second.call(Toy.threads), WAIT_S, "reading") == ["1"]


def test_a_plain_tensor_argument_travels_too(second):
    total = second.call(Toy.overwrite, torch.ones(3))
    assert second.fetch(total, WAIT_S, "writing") == [6.0]


def test_results_are_rounded_on_the_way_where_the_group_was_told_to(placement, second):
    with RayWorkerGroup(
        "narrow", make_toy, (0,), placement, pool="doomed", bf16_kinds=frozenset({"value"})
    ) as narrow:
        answers = [
            second.call_rank(0, Toy.weigh, narrow.call_rank(0, Toy.scales, 1 + 2**-12)),
            second.call_rank(0, Toy.weigh, second.call_rank(0, Toy.scales, 1 + 2**-12)),
        ]
        rounded, exact = second.fetch(answers, WAIT_S, "weighing")
    assert rounded == ("torch.float32", 1.0, 1 + 2**-12)
    assert exact == ("torch.float32", 1 + 2**-12, 1 + 2**-12)
