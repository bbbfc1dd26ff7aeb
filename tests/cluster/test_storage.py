"""A checkpoint exists or it does not, on a disk and on an object store alike."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from cluster.errors import StorageError
from cluster.storage import Checkpoints, read_json, read_text, write_json, write_text


@pytest.fixture(scope="module")
def s3_bucket() -> Iterator[str]:
    """A bucket on an S3 server in this process."""
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as environment:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "test-key")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("runs")
        yield "s3://runs"
        server.stop()


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "checkpoints")
    return f"{request.getfixturevalue('s3_bucket')}/{tmp_path.name}"


def save(checkpoints: Checkpoints, step: int, *, commit: bool = True) -> None:
    write_text(f"{checkpoints.folder(step)}/role/weights", "w" * step)
    if commit:
        checkpoints.commit(step, {"iteration": step})


def test_an_empty_run_has_no_checkpoint(root):
    assert Checkpoints(root).latest() is None
    assert Checkpoints(root).steps() == []


def test_a_folder_without_manifest_is_no_checkpoint(root):
    checkpoints = Checkpoints(root)
    save(checkpoints, 10)
    save(checkpoints, 20, commit=False)
    assert checkpoints.latest() == 10
    assert checkpoints.manifest(10) == {"iteration": 10, "files": {"role/weights": 10}}
    save(checkpoints, 20)
    assert checkpoints.latest() == 20


def test_a_part_torn_or_lost_after_the_commit_is_noticed(root):
    checkpoints = Checkpoints(root)
    for step in (10, 20, 30):
        save(checkpoints, step)
    write_text(f"{checkpoints.folder(20)}/role/weights", "w")
    files, path = fsspec.core.url_to_fs(f"{checkpoints.folder(30)}/role/weights")
    files.rm_file(path)
    assert checkpoints.steps() == [10]
    assert checkpoints.latest() == 10


def test_nothing_can_be_committed_before_its_parts(root):
    with pytest.raises(StorageError, match="no files in"):
        Checkpoints(root).commit(10, {})


def test_pruning_keeps_the_newest_and_what_is_being_written(root):
    checkpoints = Checkpoints(root)
    for step in (10, 20, 30, 40):
        save(checkpoints, step)
    save(checkpoints, 15, commit=False)
    save(checkpoints, 50, commit=False)
    checkpoints.prune(keep=2)
    assert checkpoints.steps() == [30, 40]
    assert read_text(f"{checkpoints.folder(50)}/role/weights") == "w" * 50
    with pytest.raises(StorageError):
        read_text(f"{checkpoints.folder(15)}/role/weights")


def test_pruning_spares_what_it_is_told_to(root):
    checkpoints = Checkpoints(root)
    for step in (10, 20, 30, 40):
        save(checkpoints, step)
    checkpoints.prune(keep=1, spared={20, 99})
    assert checkpoints.steps() == [20, 40]


def test_steps_are_ordered_as_numbers(root):
    checkpoints = Checkpoints(root)
    for step in (999_999, 1_000_000):
        write_text(f"{checkpoints.folder(step)}/part", "x")
        checkpoints.commit(step, {})
    assert checkpoints.latest() == 1_000_000


def test_a_file_is_replaced_as_a_whole(root):
    write_json(f"{root}/a.json", {"value": 1})
    write_json(f"{root}/a.json", {"value": 2})
    assert read_json(f"{root}/a.json") == {"value": 2}
    files, path = fsspec.core.url_to_fs(root)
    files.invalidate_cache()
    assert len(files.ls(path)) == 1


def test_what_cannot_be_read_says_so(root):
    with pytest.raises(StorageError, match=r"reading .*absent\.json: FileNotFoundError"):
        read_json(f"{root}/absent.json")
    write_text(f"{root}/broken.json", "{")
    with pytest.raises(StorageError, match=r"broken\.json: no JSON"):
        read_json(f"{root}/broken.json")


def test_a_missing_bucket_is_an_error_and_stays_missing(s3_bucket):
    with pytest.raises(StorageError, match="bucket exists"):
        write_text("s3://elsewhere/run/config.yaml", "x")
    assert "elsewhere" not in fsspec.filesystem("s3", skip_instance_cache=True).ls("")
