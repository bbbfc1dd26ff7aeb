"""Captions streamed from a real S3 server on loopback."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from cluster.storage import file_sizes
from pipelines.data.stream.feed import Feed, FeedProgress, StreamSettings
from pipelines.data.stream.ledger import Ledger
from pipelines.data.stream.source import Source
from pipelines.distillation.run import distill, dry_run
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.run.working_copy import working_copy
from sgmd_core.errors import DataError
from tests.e2e.conftest import MakeRecipe
from tests.helpers.s3_server import S3Access, S3Server, serve_s3, use_server


@pytest.fixture(scope="module")
def bucket(
    world: Path, tmp_path_factory: pytest.TempPathFactory, s3_access: S3Access
) -> Iterator[S3Server]:
    """A server whose bucket `clips` holds the shards of the world."""
    root = tmp_path_factory.mktemp("s3")
    shutil.copytree(world, root / "clips" / "shapes")
    with serve_s3(root, s3_access) as server:
        yield server


@pytest.fixture
def s3(bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of the shards, reachable through the usual variables."""
    use_server(bucket.environment, monkeypatch)
    return "s3://clips/shapes"


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
def test_roles_on_ray_stream_from_s3_through_ray_data_and_write_the_run_to_it(
    s3: str, make_recipe: MakeRecipe
) -> None:
    local = make_recipe("name=local", "iterations=2", f"data.train={s3}/train")
    ray_data = ["topology.mode=pools", "data.read_ahead.readers=2"]
    output = "output=s3://clips/runs"
    pools = make_recipe("iterations=2", f"data.train={s3}/train", *ray_data, output)
    distill(local)
    summary = distill(pools)
    assert summary["iterations"] == 2
    assert summary["samples_seen"] == 8
    with working_copy(pools.run_folder):
        used = [
            [entry.sample_ids for entry in Ledger(RunFolder(config.run_folder).ledger).entries()]
            for config in (local, pools)
        ]
    assert used[0] == used[1]
    there = file_sizes("s3://clips/runs/small")
    assert {"checkpoints/step-000002/manifest.json", "generator/model_index.json"} <= there.keys()
