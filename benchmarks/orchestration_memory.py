"""Object store and controller over many iterations: what is used must be free again."""

import os
import time
from pathlib import Path
from typing import Any

from harness import Setting, rehearse_setting, sleepers
from store_use import store_use

from pipelines.config.roles import FAKE_SCORE, GENERATOR, TEACHER

SETTING = Setting("memory", (1, 1, 1), (0, 0, 0, 0, 0), 2, 2, megabytes=0.2)
"""0.2 MB a result: above the size from which Ray keeps results in the store."""
SETTLE_S = 10.0


def measure_memory(num_iterations: int) -> dict[str, Any]:
    """Bytes in the store and of this process, ten times on the way, and at the end."""
    rows = []
    with sleepers({GENERATOR: 1, TEACHER: 1, FAKE_SCORE: 1}) as groups:
        for number in range(num_iterations):
            if number % max(1, num_iterations // 10) == 0:
                rows.append({"iteration": number, **_now()})
            rehearse_setting(SETTING, groups, 1)
        waited_until = time.monotonic() + SETTLE_S
        while store_use().num_objects and time.monotonic() < waited_until:
            time.sleep(0.1)
        rows.append({"iteration": num_iterations, **_now()})
    results = 4 * SETTING.micro_batches * num_iterations
    return {"rows": rows, "megabytes_made": SETTING.megabytes * results}


def _now() -> dict[str, float]:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    use = store_use()
    return {
        "store_mb": use.num_bytes / 1e6,
        "store_objects": use.num_objects,
        "controller_mb": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
    }
