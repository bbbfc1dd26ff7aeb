"""What pools do on a cluster of two machines; a program, because a process joins one cluster only.

Prints one JSON object. Both machines are this one: two raylets with resources and labels of their
own. Their workers are forked, as those of a private cluster are, and Ray looks more often than it
does by default whether a machine is there: both save a minute, and are not part of what is tried.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import ray
from ray._private.node import Node
from ray.cluster_utils import Cluster
from ray.experimental.internal_kv import _internal_kv_list

from cluster.errors import ClusterError, NodeLostError, WorkerDiedError
from cluster.inventory import memory_bytes
from cluster.procfs import raylet_of
from cluster.ray.capacity import capacities_of
from cluster.ray.fork_server import serve_forks
from cluster.ray.group import RayWorkerGroup
from cluster.ray.pools import Pool
from cluster.ray.topology import reserve
from cluster.ray.watch import watch_processes
from cluster.ray.watch_rules import WatchLimits
from cluster.runtime import start_ray
from tests.cluster.toys import WAIT_S, Singer, Toy, make_singer, make_toy

MODULES = ("cluster.ray.rendezvous", "cluster.transfer", "cluster.joined", "numpy.random")
CPUS = 3
LIGHT = 0.5
# By default a machine whose raylet has ended counts as lost after 14 s; a frozen one still does not
# before the watch has ended its raylet.
HEALTH_CHECK = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
# Workers are started when they are asked for, and not a core one before.
SYSTEM = {**HEALTH_CHECK, "prestart_worker_first_driver": False}
# Nobody reads what these processes of the head would tell.
UNUSED = ("start_api_server", "start_monitor", "start_log_monitor")
SILENCE_S = 5.0


class Tourist(Toy):
    """Knows where it is."""

    def where(self) -> str:
        return next(
            node["Labels"]["side"]
            for node in ray.nodes()
            if node["NodeID"] == ray.get_runtime_context().get_node_id()
        )


def make_tourist() -> Tourist:
    return Tourist()


def places_of(pools: Sequence[Pool]) -> dict[str, list[str]]:
    """Where the ranks of each pool come to be."""
    with reserve(pools, WAIT_S) as placement, ExitStack() as stack:
        groups = [
            stack.enter_context(RayWorkerGroup(pool.name, make_tourist, (), placement))
            for pool in pools
        ]
        for group in groups:
            group.wait_ready(WAIT_S)
        return {
            group.name: group.fetch(group.call(Tourist.where), WAIT_S, "asking") for group in groups
        }


def refusal(pools: Sequence[Pool]) -> str:
    """The words in which pools are refused."""
    try:
        reserve(pools, 1.0)
    except ClusterError as error:
        return " ".join(str(error).split())
    return "nothing was refused"


def free_again() -> bool:
    """Whether every core is free within a while; Ray takes a moment to count."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        if ray.available_resources().get("CPU", 0.0) == 2 * CPUS:
            return True
        time.sleep(0.2)
    return False


def after_a_rank_was_killed() -> str:
    """The error of a run one of whose ranks dies while it holds its pools."""
    try:
        with (
            reserve([Pool("a", cpus_per_rank=LIGHT)], WAIT_S) as placement,
            RayWorkerGroup("a", make_toy, (1,), placement) as group,
        ):
            group.wait_ready(WAIT_S)
            os.kill(group.process_ids()[0], signal.SIGKILL)
            group.fetch(group.call(Toy.history), WAIT_S, "reading")
    except ClusterError as error:
        return type(error).__name__
    return "nothing happened"


def reports() -> list[str]:
    """Keys of everything that processes of other jobs have reported to the control service."""
    own = ray.get_runtime_context().get_job_id()
    keys = [key for space in (None, b"fun") for key in _internal_kv_list(b"", namespace=space)]
    names = [key.decode(errors="replace") for key in keys if b"sgmd/" in key]
    return [name for name in names if own not in name]


def kill_a_run(address: str) -> int:
    """Starts another run that reserves pools, and kills its process without warning.

    Returns:
        How many of its processes have reported.
    """
    code = f"""
import time
from cluster.ray.group import RayWorkerGroup
from cluster.ray.pools import Pool
from cluster.runtime import start_ray
from cluster.ray.topology import reserve
from tests.cluster.toys import Toy, make_toy
with start_ray({address!r}):
    pools = [Pool("a", {CPUS - 1}), Pool("b", 2, strategy="STRICT_SPREAD")]
    placement = reserve(pools, {WAIT_S})
    group = RayWorkerGroup("b", make_toy, (1,), placement)
    group.wait_ready({WAIT_S})
    print("reserved", flush=True)
    time.sleep(600)
"""
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert run.stdout is not None
        assert run.stdout.readline().strip() == "reserved"
        assert ray.available_resources().get("CPU", 0.0) < 2 * CPUS
        end_s = time.monotonic() + WAIT_S
        while len(reports()) < 2 and time.monotonic() < end_s:
            time.sleep(0.1)
        return len(reports())
    finally:
        run.kill()
        run.wait()


def capacities_in_words() -> list[str]:
    """Both raylets of this host, by their names; one of them is asked through a process there."""
    nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
    found, failed = capacities_of(nodes, WAIT_S)
    assert sorted(found) == nodes, failed
    assert {one.memory_bytes for one in found.values()} == {memory_bytes()[0]}
    return sorted(one.name for one in found.values())


def no_reports() -> list[str]:
    """What is left of reports after a while, which is nothing."""
    end_s = time.monotonic() + WAIT_S / 4
    while reports() and time.monotonic() < end_s:
        time.sleep(0.2)
    return reports()


def after_a_far_partner_was_killed() -> dict[str, Any]:
    """The error of a collective whose rank on the other machine dies."""
    pools = [Pool("choir", 2, LIGHT, strategy="STRICT_SPREAD")]
    with (
        reserve(pools, WAIT_S) as placement,
        RayWorkerGroup("choir", make_singer, (), placement, replicas=1) as choir,
    ):
        choir.wait_ready(WAIT_S)
        places = ray.get([choir.pools[0].places[rank] for rank in range(2)])
        own = places.index(ray.get_runtime_context().get_node_id())
        pid = choir.process_ids()[1 - own]
        waiting = choir.call_rank(own, Singer.chord, 1.0)
        os.kill(pid, signal.SIGKILL)
        try:
            choir.fetch([waiting], WAIT_S, "singing")
        except WorkerDiedError as error:
            return {"is far": error.rank == 1 - own, "pid": error.pid == pid, "cause": error.cause}
    return {}


def after_a_killed_raylet(add: Callable[..., Any]) -> dict[str, Any]:
    """Kills the raylet of a third machine; nothing watches."""
    add(labels={"side": "far"})
    known = {node["NodeID"] for node in ray.nodes() if node["Labels"].get("side") != "far"}
    (far,) = {node["NodeID"] for node in ray.nodes()} - known
    pools = [Pool(name, 1, LIGHT, labels={"side": "far"}) for name in ("painter", "judge")]
    with reserve(pools, WAIT_S) as placement:
        painter, judge = (RayWorkerGroup(one.name, make_toy, (1,), placement) for one in pools)
        for group in (painter, judge):
            group.wait_ready(WAIT_S)
        return lost(painter, raylet_of(far), signal.SIGKILL)


def lost(group: RayWorkerGroup[Toy], raylet: int, number: int = signal.SIGSTOP) -> dict[str, Any]:
    """Freezes or kills a raylet while a call is under way; returns what the error says."""
    call = group.call_rank(0, Toy.sleep, WAIT_S)
    os.kill(raylet, number)
    try:
        group.fetch([call], WAIT_S, "painting")
    except NodeLostError as error:
        return {"lost": sorted(error.lost), "cause": error.cause}
    except ClusterError as error:
        return {"other": f"{type(error).__name__}: {error}"}
    return {}


def after_frozen_raylets() -> dict[str, Any]:
    """Freezes the other machine's raylet, then that of this process."""
    own = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != own]
    other = others[0]["NodeID"]
    sides = {"painter": "right", "judge": "right", "teacher": "left"}
    pools = [Pool(name, 1, LIGHT, labels={"side": side}) for name, side in sides.items()]
    events: list[list[str]] = []
    with reserve(pools, WAIT_S) as placement:
        groups = {name: RayWorkerGroup(name, make_toy, (1,), placement) for name in sides}
        opened = list(groups.values())
        for group in opened:
            group.wait_ready(WAIT_S)
        limits = WatchLimits(SILENCE_S, first_call_s=WAIT_S, start_s=WAIT_S)

        def machine(address: str, cause: str, workers: Sequence[str]) -> None:
            events.append(sorted(workers))

        with (
            TemporaryDirectory() as stacks,
            watch_processes(lambda: opened, limits, Path(stacks), lambda frozen: None, machine),
        ):
            found = {
                "other": lost(groups["painter"], raylet_of(other)),
                "own": lost(groups["teacher"], raylet_of(own)),
            }
    return found | {"events": events}


def main() -> None:
    """Tries everything on one cluster."""
    with two_machines() as (cluster, add), start_ray(cluster.address):
        found = tried(cluster.address, add)
    sys.stdout.write(json.dumps(found) + "\n")


def leave_out_unused(patch: pytest.MonkeyPatch) -> None:
    """Has the machines that are added next start nothing that is not looked at."""
    for name in UNUSED:
        patch.setattr(Node, name, lambda *_arguments, **_options: None)


@contextmanager
def two_machines(
    modules: Sequence[str] = MODULES,
) -> Iterator[tuple[Cluster, Callable[..., Any]]]:
    """The cluster and a way to add a machine; `side` is a label of each, left that of the head.

    Args:
        modules: What their workers are forked with.
    """
    node = {"num_cpus": CPUS, "object_store_memory": 100 * 2**20}
    head = {**node, "labels": {"side": "left"}, "_system_config": SYSTEM}
    with serve_forks(modules) as python:
        cluster = Cluster()

        def add(**settings: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                # Ray writes it into the commands that its raylets start workers by.
                patch.setattr(sys, "executable", str(python))
                leave_out_unused(patch)
                return cluster.add_node(**{**node, **settings})

        add(**head)
        add(resources={"fast": 1.0}, labels={"side": "right"})
        try:
            yield cluster, add
        finally:
            cluster.shutdown()


def tried(address: str, add: Callable[..., Any]) -> dict[str, object]:
    """What everything has come to."""
    found: dict[str, object] = {}
    found["places"] = places_of(
        [
            Pool("labelled", 1, LIGHT, labels={"side": "right"}),
            Pool("not labelled", 1, LIGHT, labels={"side": "!right"}),
            Pool("fast", 1, LIGHT, resources={"fast": 1.0}),
            Pool("together", 2, LIGHT, strategy="STRICT_PACK"),
            Pool("apart", 2, LIGHT, strategy="STRICT_SPREAD"),
        ]
    )
    found["capacities"] = capacities_in_words()
    found["free after use"] = free_again()
    fits = Pool("fits", 1, LIGHT)
    found["refusals"] = {
        "labels": refusal([fits, Pool("lost", 1, LIGHT, labels={"side": "middle"})]),
        "resources": refusal([fits, Pool("greedy", 2, LIGHT, resources={"fast": 1.0})]),
        "strategy": refusal([fits, Pool("apart", 3, LIGHT, strategy="STRICT_SPREAD")]),
    }
    found["free after refusals"] = free_again()
    found["killed rank"] = after_a_rank_was_killed()
    found["free after a killed rank"] = free_again()
    found["reports of a run"] = kill_a_run(address)
    found["free after a killed run"] = free_again()
    found["reports after a killed run"] = no_reports()
    found["killed partner"] = after_a_far_partner_was_killed()
    found["killed raylet"] = after_a_killed_raylet(add)
    found["frozen raylets"] = after_frozen_raylets()
    return found


if __name__ == "__main__":
    main()
