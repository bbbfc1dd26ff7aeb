"""Past the object store: what is made ready for it, and where it is refused."""

from contextlib import ExitStack
from importlib.util import find_spec

import pytest
import torch

from benchmarks.store_use import store_use
from cluster.errors import TransferError
from cluster.ray.direct import NIXL, Direct, ready_to_hand_over, require_transport
from cluster.ray.group import RayWorkerGroup
from cluster.ray.pools import Pool
from cluster.ray.topology import reserve
from tests.cluster.toys import WAIT_S, Colour, Parcel, Toy, make_toy


def test_tensors_keep_their_values_and_become_contiguous_wherever_they_are():
    strided = torch.arange(24.0).reshape(4, 6).t()
    parcel = Toy().parcel("float32", 4)
    ready = ready_to_hand_over({"a": [strided, 1.5], "b": (parcel, None)})
    tensor, number = ready["a"]
    assert tensor.is_contiguous()
    assert torch.equal(tensor, strided)
    assert number == 1.5
    copy, nothing = ready["b"]
    assert type(copy) is Parcel
    assert (copy.colour, copy.sizes, copy.volume) == (Colour.RED, (1, 4), 4)
    assert torch.equal(copy.payload, parcel.payload)
    assert nothing is None


def test_a_graph_is_refused_with_its_place():
    with pytest.raises(TransferError, match=r"result\['a'\]\[1\] is part of an autograd graph"):
        ready_to_hand_over({"a": (1, torch.ones(1, requires_grad=True))}, "result")


@pytest.mark.skipif(find_spec("nixl") is not None, reason="NIXL is installed here")
def test_without_the_package_nixl_is_refused_with_what_to_do():
    with pytest.raises(TransferError) as refused:
        require_transport(NIXL, "generator rank 0")
    words = str(refused.value)
    assert "generator rank 0" in words
    assert "pip install nixl" in words
    assert "topology.transport=object_store" in words


@pytest.mark.ray
def test_results_go_from_process_to_process_past_the_store(ray_cluster):
    """With gloo in NIXL's place, which needs no GPU; the calls are the same."""
    from ray.experimental.collective import create_collective_group

    pools = [Pool("maker", cpus_per_rank=0.1), Pool("taker", cpus_per_rank=0.1)]
    direct = Direct("gloo", frozenset({"parcel"}))
    with reserve(pools, timeout_s=WAIT_S) as placement, ExitStack() as stack:
        maker, taker = (
            stack.enter_context(RayWorkerGroup(pool.name, make_toy, (0,), placement, direct=direct))
            for pool in pools
        )
        for group in (maker, taker):
            group.wait_ready(WAIT_S)
        actors = [seat.actor for group in (maker, taker) for seat in group._seats]
        create_collective_group(actors, backend="gloo")
        objects = store_use().num_objects
        parcel = maker.call_rank(0, Toy.parcel, "float32", 100_000)
        told = taker.call_rank(0, Toy.describe, parcel)
        assert taker.fetch([told], WAIT_S, "describing") == [
            Toy().describe(Toy().parcel("float32", 100_000))
        ]
        assert store_use().num_objects == objects
        # What is not named goes through the store as ever.
        assert taker.fetch([maker.call_rank(0, Toy.note, 3)], WAIT_S, "noting") == [2]


@pytest.mark.ray
@pytest.mark.skipif(find_spec("nixl") is not None, reason="NIXL is installed here")
def test_a_group_that_should_use_nixl_does_not_start_without_it(ray_cluster):
    with (
        reserve([Pool("maker", cpus_per_rank=0.1)], timeout_s=WAIT_S) as placement,
        RayWorkerGroup(
            "maker", make_toy, (0,), placement, direct=Direct(NIXL, frozenset({"parcel"}))
        ) as group,
        pytest.raises(TransferError, match="maker rank 0 to send tensors with NIXL"),
    ):
        group.wait_ready(WAIT_S)
