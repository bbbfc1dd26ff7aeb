"""Tune's files at an address: sent once for each content, and without the keys of the store."""

import os
import pickle
from pathlib import Path

import fsspec
import pyarrow.fs
import pytest

from cluster.errors import LeaseError, StorageError
from pipelines.sweeping.trial import _once_free
from pipelines.sweeping.tune_store import tune_store
from tests.helpers.s3_server import S3Server, use_server


def test_files_arrive_as_they_are_and_only_those_that_have_changed_are_sent_again(tmp_path: Path):
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    files, path = tune_store("memory://sweeps/x/tune")
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


def test_what_is_written_down_of_a_store_has_no_keys_and_opens_it_again(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
):
    use_server(server.environment, monkeypatch)
    files, path = tune_store("s3://runs/tune-store")
    with files.open_output_stream(f"{path}/a") as file:
        file.write(b"1")
    written = pickle.dumps(files)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert os.environ[name].encode() not in written
    assert pickle.loads(written).open_input_stream(f"{path}/a").readall() == b"1"
    missing, path = tune_store("s3://no-such-bucket/tune")
    with (
        pytest.raises(StorageError, match="s3://no-such-bucket/tune/a"),
        missing.open_output_stream(f"{path}/a") as file,
    ):
        file.write(b"1")


def test_a_folder_that_a_lost_process_holds_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipelines.sweeping.trial._AGAIN_S", 0.01)
    tries: list[int] = []

    def work() -> None:
        tries.append(len(tries))
        if len(tries) < 3:
            raise LeaseError("writing", "it is held", "nobody", "Wait")

    _once_free(work, patience_s=60.0)
    assert len(tries) == 3
    tries.clear()
    with pytest.raises(LeaseError):
        _once_free(work, patience_s=0.0)
