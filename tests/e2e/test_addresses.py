"""Runs whose folder is an address: trained, killed, resumed, judged and shown from an S3 server."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.checkpoints import Checkpoints
from cluster.errors import StorageError
from cluster.s3.settings import S3Settings
from cluster.storage import file_sizes
from cluster.stores import open_store
from pipelines.config.recipe import DistillConfig
from pipelines.distillation.audit import audit
from pipelines.distillation.run import distill
from pipelines.evaluation.plan import EvaluationOptions
from pipelines.evaluation.run import evaluate
from pipelines.exporting.export import ExportOptions, export
from pipelines.generate import generate
from pipelines.reporting.page import write_report
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.run.observer import RunObserver
from pipelines.run.opened_copy import working_copy
from pipelines.run.places import shared_place
from pipelines.run.records import IterationRecord
from tests.e2e.conftest import MakeRecipe
from tests.e2e.test_stopping import run
from tests.helpers.faulty_proxy import ProxyBook, Trouble
from tests.helpers.forked_python import kill
from tests.helpers.s3_server import S3Server, use_server

FILES = ("metrics.jsonl", "validation.jsonl", "ledger/000000000.jsonl", "shards.jsonl")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test leaves files in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sgmd" / "runs"


def lines(config: DistillConfig) -> dict[str, list[dict[str, object]]]:
    """Logs of a run anywhere, without what differs from run to run: seconds."""
    with working_copy(config.run_folder):
        folder = RunFolder(config.run_folder)
        metrics = [
            {key: line[key] for key in ("iteration", "losses", "grad_norms", "cursor")}
            for line in read_jsonl(folder.metrics)
        ]
        figures = [line["figures"] for line in read_jsonl(folder.validation)]
        return {"metrics": metrics, "figures": figures}


@pytest.mark.slow
def test_a_run_at_an_address_is_that_of_a_folder_and_is_all_there(
    server: S3Server, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    use_server(server.environment, monkeypatch)
    settings = (
        "iterations=4",
        "checkpoint.every=2",
        "validation.every=2",
        "checkpoint.keep_best=1",
    )
    disk, cloud = (
        make_recipe("name=one", *settings),
        make_recipe("name=one", *settings, "output=s3://runs/first"),
    )
    distill(disk)
    summary = distill(cloud)
    assert lines(cloud) == lines(disk)
    there = server.root / "runs" / "first" / "one"
    found = {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()}
    local = {
        path.relative_to(disk.run_folder).as_posix()
        for path in disk.run_folder.rglob("*")
        if path.is_file()
    }
    assert found == local
    assert (summary["run_folder"], summary["generator"]) == (
        "s3://runs/first/one",
        "s3://runs/first/one/generator",
    )
    assert list(own_cache.iterdir()) == []


class Outage(RunObserver):
    """Lets the store fail while a run makes some iterations."""

    def __init__(self, book: ProxyBook, first: int, last: int) -> None:
        self.book, self.first, self.last = book, first, last
        self.meanwhile: list[int] = []

    def iteration(self, record: IterationRecord) -> None:
        if record.iteration == self.first:
            self.book.plan = lambda number: Trouble.SLOW_DOWN
        if self.first < record.iteration <= self.last:
            self.meanwhile.append(record.iteration)
            time.sleep(0.5)
        if record.iteration == self.last:
            self.book.plan = lambda number: Trouble.NONE


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are given up, and files published, within a second."""
    patience = S3Settings(read_budget_s=1.0, read_timeout_s=1.0, max_attempts=1, backoff_s=0.05)
    monkeypatch.setattr("cluster.s3.filesystem.RUNS", patience)
    monkeypatch.setattr("pipelines.run.working_copy.PATIENCE", patience)
    monkeypatch.setattr("pipelines.run.publisher._EVERY_S", 0.1)


def state(folder: Path, step: int) -> dict[str, bytes]:
    """Every file of a checkpoint but its manifest."""
    root = folder / "checkpoints" / f"step-{step:06d}"
    files = [path for path in root.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_a_run_goes_on_after_kill_9_and_through_an_outage_with_the_same_bits(
    server: S3Server,
    make_recipe: MakeRecipe,
    through: Callable[..., ProxyBook],
    tmp_path: Path,
) -> None:
    book = through(lambda number: Trouble.NONE)
    settings = ("name=run", "checkpoint.every=2")
    there = server.root / "runs" / "second" / "run"
    endless = make_recipe(*settings, "iterations=100000", "output=s3://runs/second")
    process = run(endless, tmp_path)
    manifest = there / "checkpoints" / "step-000002" / "manifest.json"
    deadline = time.monotonic() + 200
    while not manifest.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill(process)
    start = max(Checkpoints(str(there / "checkpoints")).steps())
    end = f"iterations={start + 8}"
    cloud = make_recipe(*settings, end, "output=s3://runs/second")
    outage = Outage(book, start + 1, start + 4)
    summary = distill(cloud, resume=True, observer=outage)
    assert summary["iterations"] == start + 8
    assert outage.meanwhile == [start + 2, start + 3, start + 4], "training went on"
    disk = make_recipe(*settings, end)
    distill(disk)
    assert lines(cloud) == lines(disk)
    assert state(there, start + 8) == state(disk.run_folder, start + 8)
    events = [json.loads(line) for line in (there / "events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events] == ["restarted", "storage_lost", "storage_back"]
    assert "reduce your request rate" in events[1]["cause"]
    assert not list(there.rglob("*.parts"))


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_a_store_that_stays_away_ends_the_run_and_the_error_names_what_is_here_alone(
    server: S3Server, make_recipe: MakeRecipe, through: Callable[..., ProxyBook], own_cache: Path
) -> None:
    book = through(lambda number: Trouble.NONE)
    config = make_recipe(
        "name=away", "iterations=100000", "output=s3://runs/third", "recovery.storage_outage_s=1"
    )
    with pytest.raises(StorageError, match="its store has failed for") as caught:
        distill(config, observer=Outage(book, 1, 100_000))
    (kept,) = own_cache.iterdir()
    notes = "".join(caught.value.__notes__)
    assert f"only in {kept}: " in notes
    assert "metrics.jsonl" in notes
    assert len(read_jsonl(kept / "metrics.jsonl")) >= 2


@pytest.fixture
def moto(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of another server, with conditional requests, in this process."""
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret"}
    use_server(
        {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1", **keys},
        monkeypatch,
    )
    open_store("s3://made")[0].mkdir("made")
    yield "s3://made"
    running.stop()


@pytest.mark.slow
def test_the_commands_read_a_run_at_an_address_and_put_their_results_there(
    moto: str, make_recipe: MakeRecipe, tmp_path: Path, own_cache: Path
) -> None:
    config = make_recipe("name=one", "iterations=2", f"output={moto}/runs")
    place = f"{moto}/runs/one"
    distill(config)
    options = EvaluationOptions(num_captions=8, teacher_steps=2, batch_size=8)
    found = evaluate(place, options=options)
    assert found.generator == f"{place}/generator"
    assert audit(place).is_clean
    assert shared_place(write_report([place])) == f"{place}/report.html"
    (clip,) = generate(place, ["a red circle"], output=f"{place}/clips", formats=["gif"])
    exported = export(place, options=ExportOptions(dtype="fp32", components="none"))
    assert shared_place(exported.folder) == f"{place}/exports/diffusers"
    sizes = file_sizes(place)
    assert {
        "evaluation.json",
        "samples/evaluation.png",
        "samples/evaluation.gif",
        "report.html",
        f"clips/{clip.paths[0].name}",
        "exports/diffusers/model_index.json",
        "exports/diffusers/README.md",
    } <= sizes.keys()
    assert not [name for name in sizes if "_lease" in name or ".parts" in name]
    assert list(own_cache.iterdir()) == []
