"""What pools do on a cluster of two machines; a program, because a process joins one cluster only.

Prints one JSON object. Both machines are this one: two raylets with resources and labels of their
own.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray.cluster_utils import Cluster

from cluster.errors import ClusterError, NodeLostError
from cluster.procfs import raylet_of
from cluster.ray.group import RayWorkerGroup
from cluster.ray.pools import Pool
from cluster.ray.topology import reserve
from cluster.ray.watch import watch_processes
from cluster.ray.watch_rules import WatchLimits
from cluster.runtime import start_ray
from tests.cluster.toys import WAIT_S, Toy, make_toy

CPUS = 3
LIGHT = 0.5
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


def kill_a_run(address: str) -> None:
    """Starts another run that reserves pools, and kills its process without warning."""
    code = (
        "import time\n"
        "from cluster.ray.pools import Pool\n"
        "from cluster.runtime import start_ray\n"
        "from cluster.ray.topology import reserve\n"
        f"with start_ray({address!r}):\n"
        f"    reserve([Pool('a', {CPUS - 1}), Pool('b', 2, strategy='STRICT_SPREAD')], {WAIT_S})\n"
        "    print('reserved', flush=True)\n"
        "    time.sleep(600)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert run.stdout is not None
        assert run.stdout.readline().strip() == "reserved"
        assert ray.available_resources().get("CPU", 0.0) < 2 * CPUS
    finally:
        run.kill()
        run.wait()


def lost(group: RayWorkerGroup[Toy], raylet: int) -> dict[str, Any]:
    """Freezes a raylet while a call is under way; returns what the error says."""
    call = group.call_rank(0, Toy.sleep, WAIT_S)
    os.kill(raylet, signal.SIGSTOP)
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
    other = next(node["NodeID"] for node in ray.nodes() if node["NodeID"] != own)
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
    node = {"num_cpus": CPUS, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "labels": {"side": "left"}})
    cluster.add_node(**node, resources={"fast": 1.0}, labels={"side": "right"})
    found: dict[str, object] = {}
    try:
        with start_ray(cluster.address):
            found["places"] = places_of(
                [
                    Pool("labelled", 1, LIGHT, labels={"side": "right"}),
                    Pool("not labelled", 1, LIGHT, labels={"side": "!right"}),
                    Pool("fast", 1, LIGHT, resources={"fast": 1.0}),
                    Pool("together", 2, LIGHT, strategy="STRICT_PACK"),
                    Pool("apart", 2, LIGHT, strategy="STRICT_SPREAD"),
                ]
            )
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
            kill_a_run(cluster.address)
            found["free after a killed run"] = free_again()
            found["frozen raylets"] = after_frozen_raylets()
    finally:
        cluster.shutdown()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
