"""Ends a rank's process when what it was started for is gone: its parent, or its machine's raylet.

A driver that is killed takes the raylet of its private cluster with it. Ray's own processes notice
after up to a minute, and hold their GPUs until then. In a private cluster the kernel ends them at
once, with their parent (`cluster.ray.fork_client`); the thread of this file also serves clusters
that others have started, and a worker of a fork server whose raylet alone is gone.
"""

import os
import threading
import time

from cluster.procfs import born, is_running

_EVERY_S = 1.0


def end_with_parent() -> None:
    """Ends this process within seconds of the end of its parent or raylet, whatever it does.

    Ray names the raylet in the environment of its workers.
    """
    parent, raylet = os.getppid(), int(os.environ.get("RAY_RAYLET_PID") or 0)
    since = born(raylet) if raylet else 0

    def watch() -> None:
        while os.getppid() == parent and (not since or is_running(raylet, since)):
            time.sleep(_EVERY_S)
        # Nobody is left who could read results or logs.
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
