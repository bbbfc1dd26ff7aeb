"""Runs the command line as a user does: another process, JSON on its standard output."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 300


def run_cli(*arguments: str, cwd: Path = ROOT) -> Any:
    """What a command returns with --json; fails the test with all it printed otherwise."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *arguments, "--json"],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    said = f"{result.stdout}\n{result.stderr}\nended with {result.returncode}"
    assert result.returncode == 0, said
    return json.loads(result.stdout)
