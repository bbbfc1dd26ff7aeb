"""Working copies: who may delete one, what is deleted at the address, names that lead elsewhere."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from cluster.errors import StoreRefusedError
from pipelines.run.held_folder import held_folder
from pipelines.run.opened_copy import copy_at, working_copy
from pipelines.run.places import is_path_inside
from pipelines.run.working_copy import WorkingCopy
from tests.helpers.s3_server import S3Access, use_server

ROOT = Path(__file__).parents[3]
RUN = "memory://runs/x"
NO_PROCESS = 2**22 + 1
KILLED = """
import os
from pipelines.run.held_folder import held_folder
with held_folder("killed") as root:
    print(root, flush=True)
    os._exit(0)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sgmd" / "runs"


@pytest.fixture
def there() -> Iterator[fsspec.AbstractFileSystem]:
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pipe_file("/runs/x/config.yaml", b"name: x\n")
    files.pipe_file("/runs/x/samples/a.json", b"{}")
    yield files
    files.store.clear()


def test_a_copy_is_not_deleted_by_a_container_in_which_its_process_has_no_number(
    there, monkeypatch, cache
):
    with monkeypatch.context() as numbers, working_copy(RUN) as root:
        numbers.setattr(os, "getpid", lambda: NO_PROCESS)
        with working_copy("memory://runs/y") as live:
            assert str(NO_PROCESS) in live.name
            numbers.undo()
            with working_copy("memory://runs/z"):
                assert live.is_dir()
        assert root.is_dir()
    assert list(cache.iterdir()) == []


@pytest.mark.slow
def test_a_copy_of_a_process_that_was_killed_is_deleted(tmp_path):
    command = [sys.executable, "-c", KILLED]
    ended = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    left = Path(ended.stdout.strip())
    assert left.is_dir()
    with held_folder("next"):
        assert not left.exists()


@pytest.mark.parametrize("what", ["config.yaml", "."])
def test_a_copy_that_was_deleted_deletes_nothing_at_the_address(there, what):
    before = dict.fromkeys(there.find("/runs/x"))
    with pytest.raises(StoreRefusedError, match="is gone"), working_copy(RUN) as root:
        subprocess.run(["rm", "-r", root / what if what != "." else root], check=True)
    assert dict.fromkeys(there.find("/runs/x")) == before


def test_a_file_that_is_gone_from_a_copy_stays_at_the_address(there):
    with working_copy(RUN) as root:
        (root / "samples" / "a.json").unlink()
        copy = copy_at(root)
        assert isinstance(copy, WorkingCopy)
        assert copy.changes() == []
    assert there.exists("/runs/x/samples/a.json")


@pytest.mark.parametrize(
    "name", ["", ".", "/a", "//a", "../a", "a/../b", "a//b", "a/", "./a", "\0"]
)
def test_a_key_that_is_no_path_inside_is_known(name):
    assert not is_path_inside(name)
    assert is_path_inside("a/b..c/d e")


@pytest.mark.slow
def test_keys_that_lead_out_of_the_folder_are_left_and_told(tmp_path, monkeypatch, caplog):
    outside = tmp_path / "outside" / "owned"
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        use_server(S3Access(server.get_host_and_port()[1]).environment, monkeypatch)
        files = S3FileSystem()
        files.mkdir("keys")
        keys = [f"x/{outside}", f"x/log.jsonl.parts/{outside}", "x/a//b", "x/a/../../../up"]
        for key in [*keys, f"x/{outside}.jsonl.parts/000000-000000000000", "x/config.yaml"]:
            files.call_s3("put_object", Bucket="keys", Key=key, Body=b"1\n")
        with working_copy("s3://keys/x") as root:
            here = [path.relative_to(root).as_posix() for path in root.rglob("*")]
    finally:
        server.stop()
    assert sorted(here) == [".held", "config.yaml"]
    assert not outside.parent.exists()
    assert "Left 5 objects at keys/x that are not files inside of it" in caplog.text
