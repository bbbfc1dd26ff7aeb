"""The JSON that a benchmark writes: what was measured, on which machine, with what, and when."""

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from pipelines.run.revision import git_revision, versions


def write_document(benchmark: str, measured: dict[str, Any], output: Path | None) -> None:
    """Writes the figures with machine, versions, git revision and date.

    Args:
        benchmark: Its name.
        measured: Its settings and `results`.
        output: The file; None: standard output.
    """
    document = {
        "benchmark": benchmark,
        **measured,
        "machine": {
            "cores": os.cpu_count(),
            "processor": platform.machine(),
            "load": os.getloadavg()[0],
        },
        "versions": versions(),
        "git_revision": git_revision(),
        "date": time.strftime("%Y-%m-%d"),
    }
    text = json.dumps(document, indent=2) + "\n"
    if output:
        output.write_text(text)
    else:
        sys.stdout.write(text)
