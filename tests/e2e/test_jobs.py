"""`ray job submit` as an operator does it, on a cluster that asks for a token."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from diffusers import WanPipeline
from ray.job_submission import JobSubmissionClient
from ray.util.state import list_actors
from typer.testing import CliRunner

from cluster.errors import JobError
from cluster.jobs import follow_job, submit_job
from cluster.lease import LEASE_FILE
from pipelines.cli import app
from pipelines.run.folder import read_jsonl
from pipelines.submitting.request import TRAVELLING
from tests.cluster.toys import WAIT_S
from tests.e2e.processes import ROOT
from tests.helpers import tiny_wan
from tests.helpers.secrets import files_with, plant

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_submitted_job_distils_and_leaves_its_run_behind(
    ray_head: str, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", ray_head]
    distil = ["python", "-m", "pipelines.cli", "distill", str(recipe_file)]
    settings = ["iterations=2", "topology.mode=fused", f"output={tmp_path / 'runs'}"]
    excludes = {"excludes": [".git/", ".venv/", "/runs/", "/data/"]}
    result = subprocess.run(
        [
            *ray,
            "--working-dir",
            str(ROOT),
            "--runtime-env-json",
            json.dumps(excludes),
            "--",
            *distil,
            *settings,
        ],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env=os.environ.copy(),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    run = tmp_path / "runs" / "small"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["iterations"] == 2
    assert summary["topology"] == "fused"
    assert (run / "checkpoints" / "step-000002" / "manifest.json").exists()
    assert WanPipeline.from_pretrained(run / "generator").transformer.config.num_layers == 2


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The packages alone: what a job has where `sgmd` is not installed."""
    folder = tmp_path / "tree"
    folder.mkdir()
    for name in ("sgmd", "pipelines", "workers", "cluster", "sgmd_core"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def sgmd_submit(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.Popen[str]:
    """The command line, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "submit", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background of a shell ignore it, and their children would.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def sgmd_submit_here(*arguments: str | Path) -> Result:
    """The command line in this process, which has its libraries."""
    return CliRunner().invoke(app, ["submit", *map(str, arguments)])


def wait_until(
    is_there: Callable[[], object], process: subprocess.Popen[str] | None = None
) -> None:
    end = time.monotonic() + 200
    while not is_there():
        assert time.monotonic() < end
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.1)


def test_a_job_outlives_its_terminal_and_its_process_and_leaves_no_secret_anywhere(
    ray_head: str,
    ray_folder: Path,
    recipe_file: Path,
    tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Submitted from elsewhere, left with Ctrl-C, killed, resumed by itself, come back to."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    secrets = plant(monkeypatch)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "own.yaml").write_text(recipe_file.read_text())
    (mine / "prompts.txt").write_text("a red circle moves left quickly\n" * 64)
    settings = ["name=lasting", "iterations=40", "data.train=prompts.txt", "checkpoint.every=5"]
    place = ["--address", ray_head, "--working-dir", tree, "--output-root", tmp_path]
    terminal = sgmd_submit("own.yaml", *settings, *place, "--retries", "1", cwd=mine)
    run = tmp_path / "runs" / "lasting"
    wait_until(lambda: [*run.glob("checkpoints/step-*/manifest.json")], terminal)
    terminal.send_signal(signal.SIGINT)
    os.kill(json.loads((run / LEASE_FILE).read_text())["pid"], signal.SIGKILL)
    _, said = terminal.communicate(timeout=60)
    assert terminal.returncode == 130
    assert f"goes along        prompts.txt as {TRAVELLING}/data.train/prompts.txt" in said
    assert "goes on without this terminal" in said
    (job,) = set(re.findall(r"sgmd submit --follow (\S+) --address", said))

    back = sgmd_submit("--follow", job, "--address", ray_head)
    printed, log = back.communicate(timeout=300)
    assert back.returncode == 0, log
    assert "killed by SIGKILL; attempt 2 of 2 in 5 s" in log
    assert "restarted" in [event["kind"] for event in read_jsonl(run / "events.jsonl")]
    assert "WebSocket" not in log
    starts = [line for line in read_jsonl(run / "log.jsonl") if line["message"] == "started"]
    assert log.count("iteration 40/40") == 1
    assert printed.splitlines()[-1] == f"report: {run}/report.html"
    assert (run / "report.html").is_file()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["iterations"] == 40
    assert [line["command"] for line in starts] == [summary["command"]] * 2
    assert "cli.py submit own.yaml name=lasting" in summary["command"]
    assert summary["git_revision"]
    # The endpoint went along, without its user.
    record = str(JobSubmissionClient(ray_head).get_job_info(job))
    assert "127.0.0.1:9" in record
    assert [secret for secret in secrets if secret in record + said + printed + log] == []
    assert files_with(secrets, tmp_path, ray_folder / "head") == []

    monkeypatch.chdir(mine)
    again = sgmd_submit_here("own.yaml", *settings, *place, "--wait")
    assert again.exit_code == 2, again.output
    assert "Its output says why" in again.stderr
    assert len(again.stderr) < 3000


_LIST_SOURCES = """
from pathlib import Path
for package in ("sgmd", "pipelines", "workers", "cluster", "sgmd_core"):
    for path in Path(package).rglob("*.[pyj]*"):
        print("source", path.as_posix())
"""


def sources_in(listed: str) -> set[str]:
    found = re.findall(r"^source (.+)$", listed, re.MULTILINE)
    return {name for name in found if not name.endswith(".pyc")}


def test_all_of_the_sources_travel(ray_head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation beside these tests would stand in for what was left at home."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    printed: list[str] = []
    job = submit_job(ray_head, ["python", "-c", _LIST_SOURCES], ROOT)
    follow_job(ray_head, job, printed.append)
    # Jobs before it have left compiled files: Ray unpacks the same sources once.
    arrived = sources_in("".join(printed))
    here = subprocess.run(
        [sys.executable, "-c", _LIST_SOURCES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert arrived == sources_in(here.stdout)
    assert "pipelines/data/stream/feed.py" in arrived


def test_actors_that_encode_share_a_gpu(
    ray_head: str, world: Path, wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    clip = ("--num-frames", tiny_wan.NUM_FRAMES, "--height", tiny_wan.HEIGHT)
    clip += ("--width", tiny_wan.WIDTH, "--fps", 8, "--text-length", tiny_wan.TEXT_LENGTH)
    shares = ("--video-gpus", 0.5, "--text-gpus", 0.5)
    command = ("encode", world / "held_out", tmp_path / "set", "--model", wan_folder)
    argv = ["python", "-m", "pipelines.cli", *map(str, (*command, *clip, *shares))]
    printed: list[str] = []
    follow_job(ray_head, submit_job(ray_head, argv, ROOT), printed.append)
    assert (tmp_path / "set" / "_index.json").exists(), "".join(printed)
    granted = [
        (stage, actor.required_resources["GPU"])
        for actor in list_actors(address=ray_head, detail=True, limit=1000)
        for stage in ("EncodeVideos", "EncodeCaptions")
        if stage in actor.class_name
    ]
    assert sorted(granted) == [("EncodeCaptions", 0.5), ("EncodeVideos", 0.5)]


def test_a_sweep_and_an_evaluation_are_jobs_too(
    ray_head: str, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    settings = ("sweep.grid={objective.lambda_nr: [0.1]}", "sweep.iterations=1")
    # As a retry has it whose first attempt died before it wrote anything.
    sent = sgmd_submit_here(
        *("--command", "sweep", "--address", ray_head, recipe_file),
        *(*settings, f"output={tmp_path}", "--", "--resume-auto"),
    )
    assert sent.exit_code == 0, sent.output
    folder = tmp_path / "small-sweep"
    assert sent.stdout.splitlines()[-1] == f"report: {folder}/report.html"
    assert "trials: 1/1" in sent.stderr
    (trial,) = json.loads((folder / "trials.json").read_text())["trials"]
    assert trial["state"] == "done"
    assert (folder / "report.html").is_file()

    sent = sgmd_submit_here(
        *("--command", "evaluate", "--address", ray_head, trial["run_folder"], "--"),
        *("--num-captions=8", "--teacher-steps=2", "--batch-size=8"),
    )
    assert sent.exit_code == 0, sent.output
    assert sent.stdout.splitlines()[-1] == f"results: {trial['run_folder']}"
    found = json.loads(Path(trial["run_folder"], "evaluation.json").read_text())
    assert found["num_captions"] == 8


PROGRAM = """
import os, sys
from pathlib import Path
import ray
from cluster.runtime import start_ray

with start_ray():
    print("word", sys.argv[1], "cpus", int(ray.cluster_resources()["CPU"]))
print("variable", os.environ["COLOUR"], "ignored", Path("runs").exists())
print("uploaded", sorted(path.name for path in Path().rglob("*") if path.is_file()))
sys.exit(int(sys.argv[2]))
"""

SAVES_ON_STOP = """
import pathlib, signal, sys, time

def save(*_):
    time.sleep(4)
    pathlib.Path(sys.argv[1]).touch()
    sys.exit()

signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1] + ".began").touch()
time.sleep(300)
"""


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.1)


def test_a_job_runs_in_the_uploaded_folder_and_its_output_and_fate_come_back(
    ray_head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "large").write_text("stays at home")
    for secret in (".env", "prod.env", "key.pem", "keys/id_ed25519", "deep/.aws/credentials"):
        (tmp_path / secret).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / secret).write_text("top-secret")
    variables = {"COLOUR": "red", "PYTHONPATH": str(ROOT)}
    output: list[str] = []

    argv = [sys.executable, "program.py", "two words", "3"]
    job = submit_job(ray_head, argv, tmp_path, variables)
    with pytest.raises(JobError, match=r"FAILED.*exit code 3"):
        follow_job(ray_head, job, output.append, WAIT_S)
    assert "word two words cpus 4" in "".join(output)
    assert "variable red ignored False" in "".join(output)
    assert "uploaded ['program.py']" in "".join(output)

    stopping = [sys.executable, "-c", SAVES_ON_STOP, str(tmp_path / "saved")]
    job = submit_job(ray_head, stopping, tmp_path, variables)
    with pytest.raises(JobError, match="has not ended within 1 s"):
        follow_job(ray_head, job, output.append, 1)
    wait_for(tmp_path / "saved.began")
    JobSubmissionClient(ray_head).stop_job(job)
    # Ray itself leaves a job three seconds.
    wait_for(tmp_path / "saved")
