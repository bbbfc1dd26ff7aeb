"""Ranks of a group meet: no port is lost on the way, nobody outside is heard, lateness ends."""

import socket

import pytest
import torch.distributed as dist

from cluster.ray.group import RayWorkerGroup
from cluster.ray.rendezvous import join_rendezvous, open_rendezvous
from cluster.ray.topology import Pool, reserve
from tests.cluster.toys import WAIT_S, Singer, make_singer


def test_a_meeting_on_one_machine_is_open_to_the_loopback_interface_alone():
    store, rendezvous = open_rendezvous(2, "192.0.2.9", on_one_machine=True, timeout_s=5)
    socket.create_connection((rendezvous.host, rendezvous.port), 5).close()
    # The whole of 127/8 is this machine; a store on all interfaces would answer there, too.
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", rendezvous.port), 5)
    assert rendezvous.on_one_machine
    del store


def test_many_meetings_at_once_get_ports_of_their_own():
    opened = [open_rendezvous(1, "", on_one_machine=True, timeout_s=5) for _ in range(20)]
    assert len({rendezvous.port for _, rendezvous in opened}) == 20


def test_a_rank_that_does_not_come_is_not_waited_for_forever():
    store, rendezvous = open_rendezvous(2, "", on_one_machine=True, timeout_s=1)
    with pytest.raises(dist.DistError):
        join_rendezvous(rendezvous, 0, 1.0, store)
    assert not dist.is_initialized()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_two_groups_run_collectives_each_among_its_own_ranks():
    pools = [Pool(name, 2, cpus_per_rank=0.1) for name in ("altos", "basses")]
    with reserve(pools, timeout_s=WAIT_S) as placement:
        groups = [
            RayWorkerGroup(pool.name, make_singer, (), placement, replicas=1) for pool in pools
        ]
        for number, group in enumerate(groups):
            group.wait_ready(WAIT_S)
            places = group.fetch(group.call(Singer.place), WAIT_S, "counting")
            assert places == [(0, 2), (1, 2)]
            notes = group.map(Singer.chord, [1.0, 10.0 * (number + 1)])
            assert group.fetch(notes, WAIT_S, "singing") == [11.0 + 10.0 * number] * 2
            group.close()
