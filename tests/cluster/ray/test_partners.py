"""A failed collective is the fault of the rank that has ended, and of nobody where that is open."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("ray")

from cluster.errors import ResultLostError, WorkerDiedError
from cluster.ray.group import RayWorkerGroup
from cluster.ray.partners import Partner, dead_partner
from cluster.ray.pools import Pool
from cluster.ray.progress import ProgressReport, read_report
from cluster.ray.topology import Placement, reserve
from tests.cluster.toys import WAIT_S, Singer, make_singer

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BROKEN = "RuntimeError: Connection closed by peer"


@pytest.fixture(scope="module")
def placement(ray_cluster: None) -> Iterator[Placement]:
    with reserve([Pool("choir", 2, cpus_per_rank=0.1)], WAIT_S) as placement:
        yield placement


def reports(choir: RayWorkerGroup[Singer]) -> list[ProgressReport]:
    found = [read_report(actor._actor_id.hex()) for actor, _ in choir.processes()]
    return [one for one in found if one is not None]


def test_the_rank_that_has_ended_is_named_and_nobody_who_may_live(placement: Placement) -> None:
    with RayWorkerGroup("choir", make_singer, (), placement, replicas=1) as choir:
        choir.wait_ready(WAIT_S)
        assert choir.fetch(choir.call(Singer.chord, 1.0), WAIT_S, "singing") == [2.0, 2.0]
        # Between two calls, too: a rank that has entered fewer collectives is waited for.
        end_s = time.monotonic() + WAIT_S
        while len({one.collectives for one in reports(choir)} - {0}) != 1:
            assert time.monotonic() < end_s, reports(choir)
            time.sleep(0.2)
        assert [one.method for one in reports(choir)] == ["", ""]

        # All live: the error is that of the rank.
        with pytest.raises(RuntimeError, match="out of tune"):
            choir.fetch([choir.call_rank(0, Singer.break_off)], WAIT_S, "singing")

        pid = choir.process_ids()[1]
        partners = {
            actor._actor_id.hex(): Partner(actor, ("choir", rank))
            for rank, (actor, _) in enumerate(choir.processes())
        }
        os.kill(pid, signal.SIGSTOP)
        found = dead_partner(partners, "singing", BROKEN, patience_s=3.0)
        assert isinstance(found, ResultLostError)
        assert f"failed ({BROKEN}), and there is no sign of life of choir rank 1" in found.found
        assert "choir rank 0" not in str(found)
        os.kill(pid, signal.SIGCONT)
        assert dead_partner(partners, "singing", BROKEN) is None

        waiting = choir.call_rank(0, Singer.chord, 1.0)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDiedError) as caught:
            choir.fetch([waiting], WAIT_S, "singing")
        assert (caught.value.group, caught.value.rank, caught.value.pid) == ("choir", 1, pid)
