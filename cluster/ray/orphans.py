"""Ends a rank's process when the machine's raylet, which started it, is gone.

A driver that is killed takes the raylet of its private cluster with it. Ray's own processes notice
after up to a minute, and hold their GPUs until then.
"""

import os
import threading
import time

_EVERY_S = 1.0


def end_with_parent() -> None:
    """Ends this process within seconds once its parent has ended, whatever it is doing."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_EVERY_S)
        # Nobody is left who could read results or logs.
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
