"""Tune's files at an address: sent once for each content, and without the keys of the store."""

import io
import os
import pickle
from contextlib import suppress
from pathlib import Path

import fsspec
import pyarrow.fs
import pytest
from pyarrow.lib import PythonFile

from cluster.errors import StorageError
from pipelines.run.ray_store import ray_store
from tests.helpers.s3_server import S3Server, use_server


def test_files_arrive_as_they_are_and_only_those_that_have_changed_are_sent_again(tmp_path: Path):
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    files, path = ray_store("memory://sweeps/x/tune")
    (tmp_path / "trial").mkdir()
    (tmp_path / "trial" / "result.json").write_text("{}")
    (tmp_path / "state.json").write_text("first")

    def send() -> dict[str, object]:
        pyarrow.fs.copy_files(str(tmp_path), path, destination_filesystem=files)
        return {name: memory.created(name) for name in memory.find(path)}

    before = send()
    (tmp_path / "state.json").write_text("second")
    after = send()
    assert {name for name in after if after[name] != before[name]} == {f"{path}/state.json"}
    assert memory.cat_file(f"{path}/state.json") == b"second"
    taken = tmp_path / "taken"
    pyarrow.fs.copy_files(path, str(taken), source_filesystem=files)
    assert (taken / "trial" / "result.json").read_text() == "{}"
    assert files.get_file_info(f"{path}/nothing").type == pyarrow.fs.FileType.NotFound
    # What was deleted is sent again, though it has the content from before.
    files.delete_file(f"{path}/state.json")
    files.delete_dir(f"{path}/trial")
    assert send().keys() >= before.keys()


@pytest.mark.slow
def test_what_is_written_down_of_a_store_has_no_keys_and_opens_it_again(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
):
    use_server(server.environment, monkeypatch)
    files, path = ray_store("s3://runs/tune-store")
    with files.open_output_stream(f"{path}/a") as file:
        file.write(b"1")
    written = pickle.dumps(files)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert os.environ[name].encode() not in written
    assert pickle.loads(written).open_input_stream(f"{path}/a").readall() == b"1"
    missing, path = ray_store("s3://no-such-bucket/tune")
    with (
        pytest.raises(StorageError, match="s3://no-such-bucket/tune/a"),
        missing.open_output_stream(f"{path}/a") as file,
    ):
        file.write(b"1")


class Torn(pyarrow.fs.FSSpecHandler):
    """A disk on which a file of a hundred bytes cannot be read to its end."""

    def open_input_stream(self, path: str) -> PythonFile:
        return PythonFile(TornFile(), mode="r")


class TornFile(io.BytesIO):
    """A file that ends in an error."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell():
            raise OSError("torn")
        self.seek(50)
        return b"x" * 50


def test_a_file_that_was_interrupted_on_the_way_is_not_sent(tmp_path: Path):
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    files, path = ray_store("memory://sweeps/torn")
    (tmp_path / "a").write_bytes(b"x" * 100)
    torn = pyarrow.fs.PyFileSystem(Torn(fsspec.filesystem("file")))

    def copy(source: pyarrow.fs.FileSystem) -> None:
        ways = {"source_filesystem": source, "destination_filesystem": files}
        pyarrow.fs.copy_files(str(tmp_path / "a"), f"{path}/a", chunk_size=50, **ways)

    with pytest.raises(OSError, match="torn"):
        copy(torn)
    with suppress(KeyError), files.open_output_stream(f"{path}/a") as file:
        file.write(b"half")
        raise KeyError
    assert memory.find(path) == []
    try:
        raise KeyError
    except KeyError:
        # An error from before is not a reason.
        copy(pyarrow.fs.LocalFileSystem())
    assert memory.cat_file(f"{path}/a") == b"x" * 100
