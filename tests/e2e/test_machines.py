"""A team's cluster of machines with disks of their own, driven from a laptop beside it."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.distillation.run import distill
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.run.opened_copy import run_copy
from tests.e2e.conftest import MakeRecipe
from tests.e2e.processes import ROOT
from tests.helpers.machines import Machines, some_machines, why_no_machines
from tests.helpers.s3_server import S3Access, serve_s3, use_server

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(540)]
POOLS = (
    "topology.pools={learn: {cpus: 0.5, labels: {ray.io/gpu-domain: rack-1}}, "
    "score: {cpus: 0.5, labels: {ray.io/gpu-domain: rack-2}}}"
)
NUM_ITERATIONS = 28


@pytest.fixture(scope="module")
def machines(
    world: Path, wan_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machines]:
    """A head and two racks of one machine each, and a bucket with captions and networks."""
    if why := why_no_machines():
        pytest.skip(why)
    buckets = tmp_path_factory.mktemp("buckets")
    shutil.copytree(world, buckets / "team" / "shapes")
    shutil.copytree(wan_folder, buckets / "team" / "wan")
    with some_machines() as cluster, serve_s3(buckets, S3Access(host=cluster.host)) as server:
        cluster.environment |= server.environment
        cluster.add("head", {"side": "head"}, 2)
        cluster.wait_for_head()
        cluster.add("left", {"ray.io/gpu-domain": "rack-1"}, 2)
        cluster.add("right", {"ray.io/gpu-domain": "rack-2"}, 2)
        yield cluster


@pytest.fixture(autouse=True)
def keys(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this process that of a user who has keys for the bucket."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    use_server(machines.environment, monkeypatch)


@pytest.fixture
def laptop() -> Callable[..., object]:
    """Runs the command line in a process with an environment of its own."""

    def sgmd(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pipelines.cli", *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    return sgmd


def here(*arguments: str | Path) -> Result:
    """The command line in this process, which has its libraries."""
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_a_run_goes_on_while_machines_leave_and_join(
    machines: Machines,
    recipe_file: Path,
    make_recipe: MakeRecipe,
) -> None:
    settings = [f"iterations={NUM_ITERATIONS}", "checkpoint.every=10"]
    there = ["data.train=s3://team/shapes/train", "data.validation=s3://team/shapes/held_out"]
    there += ["model.folder=s3://team/wan", "topology.mode=map", POOLS]
    place = ["--address", machines.dashboard, "--output-root", "s3://team"]
    sent = here("submit", recipe_file, *settings, *there, *place, "--detach", "--json")
    assert sent.exit_code == 0, sent.output
    job = json.loads(sent.stdout)["job_id"]
    # The bucket is the only place that all machines reach; the command works on the head's disk.
    copies = machines.files("head") / "cache" / "sgmd" / "runs"
    end = time.monotonic() + 200
    while sum(len(read_jsonl(path)) for path in copies.glob("small*/metrics.jsonl")) < 12:
        assert time.monotonic() < end, machines.log("head")
        time.sleep(0.2)
    machines.cut_off("right")
    machines.add("new", {"ray.io/gpu-domain": "rack-2"}, 2)

    back = here("submit", "--follow", job, "--address", machines.dashboard)
    assert back.exit_code == 0, back.output
    assert f"iteration {NUM_ITERATIONS}/{NUM_ITERATIONS}" in back.stderr
    assert back.stdout.splitlines()[-1] == "report: s3://team/runs/small/report.html"
    assert not [*copies.glob("small*")]
    with run_copy("s3://team/runs/small") as root:
        run = RunFolder(root)
        kinds = [event["kind"] for event in read_jsonl(run.events)]
        losses = [line["losses"] for line in read_jsonl(run.metrics)]
        assert (root / "report.html").is_file()
    assert "node_died" in kinds, kinds
    # Every machine that computed has copied the model from the bucket to its own disk.
    models = {
        name: [*machines.files(name).glob("cache/sgmd/models/wan-*")]
        for name in ("head", "left", "right", "new")
    }
    assert all(len(found) == 1 for found in models.values()), models

    calm = make_recipe("name=calm", *settings)
    distill(calm)
    assert losses == [line["losses"] for line in read_jsonl(RunFolder(calm.run_folder).metrics)]


def test_who_has_another_token_is_refused_in_one_sentence(
    machines: Machines, laptop: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    wrong = {"RAY_AUTH_TOKEN": "0" * 64}
    data = ["data.train=s3://team/shapes/train", "data.validation=s3://team/shapes/held_out"]
    data.append("validation.num_captions=8")
    output = f"output={tmp_path}"
    sent = laptop("submit", "tiny", *data, output, "--address", machines.dashboard, **wrong)
    joined = laptop("distill", "tiny", *data, output, f"topology.address={machines.gcs}", **wrong)
    for refused in (sent, joined):
        assert refused.returncode == 1
        said = refused.stderr.splitlines()[-1]
        assert re.search(r"refuses this token|Unauthorized|token", said), refused.stderr
        assert len(said) < 700
        assert "Traceback" not in refused.stderr
    stranger = machines.add("stranger", {}, 1, variables=wrong)
    assert stranger.wait(timeout=60) != 0
    assert "oken" in machines.log("stranger")
