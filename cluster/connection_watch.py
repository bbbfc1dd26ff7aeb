"""Watches the processes of Ray that a driver depends on, and says when one is gone."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

from cluster.background import in_background
from cluster.procfs import born, is_running, raylet_of
from cluster.tokens import PROBE_TIMEOUT_S

_RAYLET_LOOK_EVERY_S, _GCS_PROBE_EVERY_S = 0.5, 3.0


@contextmanager
def watch_cluster(tell: Callable[[str], None], limit_s: float = 15.0) -> Iterator[None]:
    """Watches the two processes of Ray without which this one cannot go on, while it is connected.

    They are its control service (GCS), and the raylet of this machine. Ray ends a driver 60 s after
    the one has gone, and some seconds after the other, and this program can write nothing then. So
    the sentence comes before.

    Args:
        tell: Called with one sentence, once, when one has ended, or the service has not answered
            for so long.
        limit_s: Silence that is worth the sentence.
    """
    if not ray.is_initialized():
        yield
        return
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    raylet = raylet_of(ray.get_runtime_context().get_node_id())
    since = born(raylet)

    def watch(over: threading.Event) -> None:
        asked_s = answered_s = time.monotonic()
        while not over.wait(_RAYLET_LOOK_EVERY_S):
            if raylet and not is_running(raylet, since):
                tell(
                    f"the raylet of this machine, Ray's daemon (process {raylet}), has ended, as "
                    "after SIGKILL or when memory runs out; Ray will end this process within a "
                    "minute. Go on with --resume; start a cluster that it has joined again before"
                )
                return
            if time.monotonic() - asked_s < _GCS_PROBE_EVERY_S:
                continue
            asked_s = time.monotonic()
            try:
                socket.create_connection((host, int(port)), PROBE_TIMEOUT_S).close()
                answered_s = time.monotonic()
            except OSError:
                if time.monotonic() - answered_s > limit_s:
                    tell(
                        f"Ray's control service at {host}:{port} does not answer (it has ended, or "
                        "its machine is gone); Ray will end this process within a minute. Start "
                        "the cluster again and go on with --resume"
                    )
                    return

    with in_background("watch-cluster", watch):
        yield
