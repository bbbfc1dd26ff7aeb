"""A file or a folder is the old one or the new one, whatever ends the writer."""

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest

from cluster import files
from cluster.errors import StorageError, StoreRefusedError
from cluster.files import whole_file, whole_folder, write_whole
from cluster.folders import whole_folder_at
from cluster.storage_errors import storage_errors
from cluster.stores import open_store
from sgmd_core.errors import ConfigError

_DIE_HALF_WAY = """
import os, signal, sys
from cluster.files import whole_file, whole_folder
kind, path = sys.argv[1:]
with (whole_file if kind == "file" else whole_folder)(path) as draft:
    ((draft if kind == "file" else draft / "part")).write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Makes the system refuse to write more into one file, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill(folder: Path, text: str) -> None:
    with whole_folder(folder) as draft:
        (draft / "inner").mkdir()
        for name in ("a", "inner/b"):
            (draft / name).write_text(text)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("address", ["s4://b/x", "S3://b/x", "nowhere://x"])
def test_an_unknown_protocol_is_a_wrong_request_and_no_matter_of_keys(address):
    with (
        pytest.raises(ConfigError, match=r"the protocol .*Correct the address") as caught,
        storage_errors(f"reading {address}"),
    ):
        open_store(address)
    assert "AWS" not in str(caught.value)


@pytest.mark.parametrize(
    ("attempted", "words"),
    [
        ("reading /mnt/x", "Check the path and the rights"),
        ("reading file:///mnt/x", "Check the path and the rights"),
        ("reading s3://b/x", "AWS_ENDPOINT_URL"),
        ("reading memory://x", "Check the address, the network"),
    ],
)
def test_a_remedy_is_that_of_the_store_which_was_asked(attempted, words):
    with pytest.raises(StorageError, match=words), storage_errors(attempted):
        raise OSError("it failed")


def test_a_file_is_written_with_its_folders_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    write_whole(path, b"one")
    write_whole(str(path), b"two")
    assert path.read_bytes() == b"two"
    assert names_in(path.parent) == ["file"]


def test_a_large_object_of_a_store_arrives_whole():
    store = fsspec.filesystem("memory")
    write_whole("memory://whole/small", b"x")
    write_whole("/whole/second", b"xy", store)
    assert (store.cat_file("/whole/small"), store.cat_file("/whole/second")) == (b"x", b"xy")


def test_a_full_disk_leaves_the_old_file_and_no_draft(tmp_path):
    path = tmp_path / "file"
    write_whole(path, b"old")
    with files_of_at_most(1000), pytest.raises(OSError, match="File too large"):
        write_whole(path, b"new" * 1000)
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["file"]


def test_a_full_disk_leaves_the_old_folder_and_no_draft(tmp_path):
    fill(tmp_path / "folder", "old")
    with files_of_at_most(1000), pytest.raises(OSError, match="File too large"):
        fill(tmp_path / "folder", "new" * 1000)
    assert (tmp_path / "folder" / "inner" / "b").read_text() == "old"
    assert names_in(tmp_path) == ["folder"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_killed_writer_leaves_the_old_version(kind, tmp_path):
    target = tmp_path / "target"
    if kind == "file":
        write_whole(target, b"old")
    else:
        fill(target, "old")
    killed = subprocess.run([sys.executable, "-c", _DIE_HALF_WAY, kind, str(target)])
    assert killed.returncode == -9
    assert (target if kind == "file" else target / "a").read_text() == "old"


@pytest.mark.slow
def test_the_draft_of_a_killed_writer_goes_away_with_the_next_folder(tmp_path):
    target = tmp_path / "target"
    subprocess.run([sys.executable, "-c", _DIE_HALF_WAY, "folder", str(target)])
    assert len(names_in(tmp_path)) == 1
    with whole_folder(target) as own:
        own.joinpath("a").write_text("of a writer that lives")
        fill(target, "new")
        assert own.exists()
    assert names_in(tmp_path) == ["target"]


@pytest.mark.slow
def test_a_reader_finds_one_whole_folder_at_any_moment(tmp_path):
    target, done = tmp_path / "folder", threading.Event()
    fill(target, "0")

    def write() -> None:
        for number in range(1, 40):
            fill(target, str(number))
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set[str]()
    while not done.is_set():
        # One open folder is one version; the name must lead to some version at every moment.
        handle = os.open(target, os.O_RDONLY)
        os.close(handle)
        seen.add(str(target.exists()))
    writer.join()
    assert seen == {"True"}
    assert (target / "a").read_text() == "39"
    assert names_in(tmp_path) == ["folder"]


def test_without_an_exchange_the_folder_is_replaced_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    fill(tmp_path / "folder", "old")
    fill(tmp_path / "folder", "new")
    assert (tmp_path / "folder" / "a").read_text() == "new"
    assert names_in(tmp_path) == ["folder"]


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path):
    fill(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    fill(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_text() == "new"


def test_a_folder_does_not_take_the_place_of_a_file(tmp_path):
    write_whole(tmp_path / "name", b"a file")
    with pytest.raises(NotADirectoryError):
        fill(tmp_path / "name", "x")
    assert names_in(tmp_path) == ["name"]


def test_every_byte_and_every_name_is_flushed_before_and_after_the_rename(tmp_path, monkeypatch):
    flushed: list[str] = []
    real = os.fsync

    def note(handle: int) -> None:
        flushed.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        real(handle)

    monkeypatch.setattr(os, "fsync", note)
    fill(tmp_path / "folder", "x")
    draft = flushed[0].rpartition("/")[0]
    assert {f"{draft}/a", f"{draft}/inner/b", f"{draft}/inner", draft} <= set(flushed)
    assert flushed[-1] == str(tmp_path)
    with whole_file(tmp_path / "file") as path:
        path.write_text("x")
    assert flushed[-2:] == [str(path), str(tmp_path)]


@pytest.mark.parametrize("place", ["model", "memory://full/model"])
def test_a_disk_that_fills_while_a_library_writes_a_folder_is_told_and_nothing_is_left(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)

    def fill(draft: Path) -> None:
        (draft / "weights").symlink_to("/dev/full")
        (draft / "weights").write_bytes(b"1")

    told = "Expected room on the disk"
    with pytest.raises(StoreRefusedError, match=told), whole_folder_at(place) as draft:
        fill(draft)
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match="a fault of ours"), whole_folder_at(place):
        raise TypeError("a fault of ours")
