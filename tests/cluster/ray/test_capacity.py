"""Machines are looked at by a process that sees them, and told apart at one address."""

import pytest
import ray

import cluster.ray.capacity as capacity
from cluster.ray.capacity import Capacity, capacities_of
from cluster.ray.every_machine import machines_by_id
from cluster.ray.shortage import Machine

HOST = "10.0.0.1"


def machine(node: str, gpus: float) -> Machine:
    """One of several raylets of a host."""
    return Machine(f"{HOST}#{node}", {"CPU": 8.0, "GPU": gpus}, {}, {}, node, HOST)


TABLE = {node: machine(node, gpus) for node, gpus in (("own", 1.0), ("next", 2.0), ("far", 0.0))}


def looked_at(nodes, seen: tuple[int, ...], monkeypatch) -> tuple[dict, dict, list[str]]:
    """What is found where this process sees some GPUs and `far` does not answer; who was asked."""
    asked: list[str] = []
    monkeypatch.setattr(capacity, "capacity_here", lambda: Capacity(64, seen))

    def ask(others):
        asked.extend(others)
        silent = {one.name: "no answer" for one in others.values() if one.node == "far"}
        answers = {
            node: Capacity(32, (80,) * int(one.total["GPU"])).of(one)
            for node, one in others.items()
            if node != "far"
        }
        return answers, silent

    return *capacity.look_at_machines(nodes, TABLE, "own", ask), asked


def test_nodes_of_one_address_keep_a_capacity_each(monkeypatch):
    found, failed, asked = looked_at(["own", "next", "far"], (80,), monkeypatch)
    assert found == {
        "own": Capacity(64, (80,), f"{HOST}#own", 1.0),
        "next": Capacity(32, (80, 80), f"{HOST}#next", 2.0),
    }
    assert failed == {f"{HOST}#far": "no answer"}
    assert asked == ["next", "far"]


def test_this_process_is_asked_only_about_its_own_machine_with_all_gpus_in_sight(monkeypatch):
    found, _, asked = looked_at(["own"], (), monkeypatch)
    assert asked == ["own"]
    assert found["own"].gpu_bytes == (80,)
    found, _, asked = looked_at(["next"], (80,), monkeypatch)
    assert list(found) == asked == ["next"]
    found, failed, asked = looked_at(["own", "lost"], (80,), monkeypatch)
    assert (list(found), asked) == (["own"], [])
    assert failed == {"lost": "it has left the cluster"}


def test_of_a_gpu_in_instances_not_all_are_in_sight():
    assert not Capacity(64, (20,), num_gpus=7.0).sees_all_gpus
    assert Capacity(64, (80,), num_gpus=0.5).sees_all_gpus
    assert Capacity(64).sees_all_gpus


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_process_on_a_machine_finds_what_this_one_does():
    (node,) = nodes = machines_by_id()
    found, failed = capacity.ask_machines(nodes, 60.0)
    assert failed == {}
    assert found == capacities_of([node])[0]
    assert found[node].name == nodes[node].address == ray.util.get_node_ip_address()
    assert found[node].memory_bytes > 2**30
