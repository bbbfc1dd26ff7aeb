"""The Slurm script that `sgmd plan` prints, run by bash with Ray itself.

Of Slurm there are two stand-ins, which do what it would do on one node: `srun` runs a command, and
`scontrol` names the node and notes what is to go back to the queue.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.run.folder import RunFolder, read_jsonl
from tests.e2e.processes import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SRUN = '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
SCONTROL = """#!/bin/bash
case $1 in
    show) echo "$3" ;;
    requeue) echo "$2" >>"$REQUEUED" ;;
esac
"""
WAIT_S = 240


@pytest.fixture
def script(recipe_file: Path, tmp_path: Path) -> Path:
    settings = ["topology.mode=fused", "iterations=100000", f"output={tmp_path / 'runs'}"]
    options = ["--gpus", "1", "--emit", "slurm", "--with", "time=00:10:00"]
    done = CliRunner().invoke(app, ["plan", str(recipe_file), *settings, *options])
    assert done.exit_code == 0, done.output
    (tmp_path / "run.sh").write_text(done.stdout)
    return tmp_path / "run.sh"


@pytest.fixture
def submit(script: Path, tmp_path: Path) -> Callable[[], subprocess.Popen[bytes]]:
    """Starts the script as Slurm would; its output goes to the end of one log."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    names = {name for name in os.environ if name.startswith("RAY_")}
    environment = {key: value for key, value in os.environ.items() if key not in names} | {
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node1",
        "TMPDIR": "/tmp",
        "REQUEUED": str(tmp_path / "requeued"),
    }

    def run() -> subprocess.Popen[bytes]:
        with (tmp_path / "log").open("a") as log:
            return subprocess.Popen(
                ["bash", str(script)], cwd=tmp_path, env=environment, stdout=log, stderr=log
            )

    return run


def iterations(tmp_path: Path) -> list[int]:
    metrics = RunFolder(tmp_path / "runs" / "small").metrics
    return [row["iteration"] for row in read_jsonl(metrics)]


def stop_after(
    number: int, job: subprocess.Popen[bytes], tmp_path: Path, with_signal: signal.Signals
) -> int:
    """Sends the batch shell alone a signal once there are so many iterations.

    So does Slurm before the limit (`B:`), and `scancel --batch`; a plain `scancel` does not.
    """
    end_s = time.monotonic() + WAIT_S
    while len(iterations(tmp_path)) < number:
        assert job.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < end_s, (tmp_path / "log").read_text()
        time.sleep(0.2)
    job.send_signal(with_signal)
    return job.wait(WAIT_S)


def test_a_run_is_saved_before_the_limit_requeued_resumed_and_ended(submit, tmp_path: Path):
    # Before its limit: saved, and back to the queue.
    code = stop_after(2, submit(), tmp_path, signal.SIGUSR1)
    assert code == 128 + signal.SIGUSR1, (tmp_path / "log").read_text()
    assert (tmp_path / "requeued").read_text() == "7\n"
    done = iterations(tmp_path)
    # As `scancel --batch --signal=TERM` does it: saved, and not back to the queue.
    code = stop_after(len(done) + 2, submit(), tmp_path, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, (tmp_path / "log").read_text()
    assert (tmp_path / "requeued").read_text() == "7\n"
    # It went on where it was, and nothing was made twice.
    assert iterations(tmp_path) == list(range(len(iterations(tmp_path))))
    assert "asks for no token" not in (tmp_path / "log").read_text()
