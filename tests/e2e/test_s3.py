"""Captions streamed from a real S3 server on loopback."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from cluster.s3.settings import S3Settings
from cluster.storage import file_sizes
from pipelines.data.stream.feed import Feed, FeedProgress, StreamSettings
from pipelines.data.stream.ledger import Ledger
from pipelines.data.stream.source import Source
from pipelines.distillation.run import distill, dry_run
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.run.observer import RunObserver
from pipelines.run.opened_copy import working_copy
from pipelines.run.records import IterationRecord
from sgmd_core.errors import DataError
from tests.e2e.conftest import MakeRecipe
from tests.helpers.s3_server import S3Access, S3Process, use_server


@pytest.fixture(scope="module")
def bucket(
    world: Path, tmp_path_factory: pytest.TempPathFactory, s3_access: S3Access
) -> Iterator[S3Process]:
    """A server whose bucket `clips` holds the shards of the world."""
    root = tmp_path_factory.mktemp("s3")
    shutil.copytree(world, root / "clips" / "shapes")
    process = S3Process(root, s3_access)
    process.start()
    yield process
    process.stop()


@pytest.fixture
def s3(bucket: S3Process, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of the shards, reachable through the usual variables."""
    use_server(bucket.server.environment, monkeypatch)
    return "s3://clips/shapes"


@pytest.mark.slow
def test_a_bucket_is_read_like_a_folder(s3: str, world: Path) -> None:
    remote, local = (
        Feed(StreamSettings(Source(url), seed=0), FeedProgress(), 48).take(48)
        for url in (f"{s3}/train", str(world / "train"))
    )
    assert remote == local
    assert len(set(remote.sample_ids)) == 48


@pytest.mark.slow
def test_a_run_from_s3_makes_the_losses_of_a_run_from_disk(
    s3: str, make_recipe: MakeRecipe
) -> None:
    disk = make_recipe("name=disk", "iterations=2")
    cloud = make_recipe("name=cloud", "iterations=2", f"data.train={s3}/train")
    distill(disk)
    distill(cloud)
    losses = [
        [line["losses"] for line in read_jsonl(RunFolder(config.run_folder).metrics)]
        for config in (disk, cloud)
    ]
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_missing_prefix_is_told(s3: str, make_recipe: MakeRecipe) -> None:
    with pytest.raises(DataError, match=r"s3://clips/elsewhere"):
        dry_run(make_recipe("data.train=s3://clips/elsewhere"))


@pytest.mark.slow
def test_wrong_keys_are_told_and_never_shown(
    s3: str, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-key")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(
        DataError, match=r"opening the data folder s3://clips/shapes/train"
    ) as caught:
        dry_run(make_recipe(f"data.train={s3}/train"))
    assert "not-the-secret-key" not in str(caught.value)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_roles_on_ray_stream_from_s3_and_write_the_run_to_it_though_it_dies_and_comes_back(
    bucket: S3Process, s3: str, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Files of the run are given up soon, so that the outage is noticed; the roles' states are not.
    patience = S3Settings(read_budget_s=0.5, read_timeout_s=0.5, max_attempts=1)
    monkeypatch.setattr("pipelines.run.working_copy.PATIENCE", patience)
    monkeypatch.setattr("pipelines.run.publisher._EVERY_S", 0.1)
    common = (f"data.train={s3}/train", "iterations=6", "checkpoint.every=3")
    local = make_recipe("name=local", *common)
    ray_data = ("topology.mode=pools", "data.read_ahead.readers=2")
    pools = make_recipe(*common, *ray_data, "output=s3://clips/runs")
    distill(local)
    # A state is due meanwhile.
    outage = Outage(bucket, first=1, last=4)
    summary = distill(pools, observer=outage)
    assert outage.meanwhile == [2, 3, 4], "training went on"
    assert (summary["iterations"], summary["samples_seen"]) == (6, 24)
    with working_copy(pools.run_folder):
        folders = [RunFolder(config.run_folder) for config in (local, pools)]
        used = [[entry.sample_ids for entry in Ledger(one.ledger).entries()] for one in folders]
        losses = [[line["losses"] for line in read_jsonl(one.metrics)] for one in folders]
        kinds = [event["kind"] for event in read_jsonl(folders[1].events)]
    assert used[0] == used[1]
    assert losses[0] == losses[1]
    assert kinds == ["storage_lost", "storage_back"]
    there = file_sizes("s3://clips/runs/small")
    assert {"checkpoints/step-000006/manifest.json", "generator/model_index.json"} <= there.keys()


class Outage(RunObserver):
    """Stops a server after one iteration of a run, and starts it again after another."""

    def __init__(self, server: S3Process, first: int, last: int) -> None:
        self._server, self._first, self._last = server, first, last
        self.meanwhile: list[int] = []

    def iteration(self, record: IterationRecord) -> None:
        if record.iteration == self._first:
            self._server.stop()
        if self._first < record.iteration <= self._last:
            self.meanwhile.append(record.iteration)
            time.sleep(1.0)
        if record.iteration == self._last:
            self._server.start()
