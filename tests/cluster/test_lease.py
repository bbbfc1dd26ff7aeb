"""One writer at a time: leases on folders and on object stores, held, freed, taken over, lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from s3fs import S3FileSystem

from cluster import lease as leases
from cluster.errors import LeaseError, LeaseLostError, StorageError
from cluster.files import whole_folder
from cluster.folders import whole_folder_at
from cluster.lease import LEASE_FILE, LEASE_OBJECT, hold, hold_replaced
from cluster.stores import open_store
from tests.helpers.s3_server import use_server

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from cluster.lease import hold
with hold(sys.argv[1], "a test"):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds `tmp_path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


class TestReplacedFolders:
    def test_a_folder_stays_held_while_it_is_exchanged_whole(self, tmp_path):
        model = tmp_path / "model"
        with hold_replaced(str(model), "a test"):
            assert not model.exists()
            for _ in range(2):
                with whole_folder(model) as draft:
                    (draft / "weights").touch()
                again = hold_replaced(str(model), "another test")
                with pytest.raises(LeaseError, match=rf"{model}: .*a test"), again:
                    pass
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        assert [path.name for path in model.iterdir()] == ["weights"]

    def test_so_does_one_at_an_address(self, monkeypatch):
        monkeypatch.setattr(leases, "_SETTLE_S", 0.05)
        memory = fsspec.filesystem("memory")
        memory.store.clear()
        with hold_replaced("memory://models/model", "a test"):
            for _ in range(2):
                with whole_folder_at("memory://models/model") as draft:
                    (draft / "weights").touch()
                again = hold_replaced("memory://models/model", "another test")
                with pytest.raises(LeaseError, match=r"memory://models/model: .*a test"), again:
                    pass
        assert memory.find("/models") == ["/models/model/weights"]

    def test_two_spellings_are_one_folder(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "model")
        again = hold_replaced(str(tmp_path / "link"), "another test")
        with hold_replaced(str(tmp_path / "model"), "a test"), pytest.raises(LeaseError), again:
            pass


class TestDisk:
    @pytest.mark.slow
    def test_a_second_process_is_refused_and_told_who_holds_the_folder(self, tmp_path, holder):
        with pytest.raises(LeaseError) as caught, hold(str(tmp_path), "another test"):
            pass
        text = str(caught.value)
        assert f"process {holder.pid}" in text
        assert ": a test" in text

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_a_folder_is_free_as_soon_as_its_holder_is_dead(self, tmp_path, holder, number):
        holder.send_signal(number)
        holder.wait()
        with hold(str(tmp_path), "another test"):
            assert json.loads((tmp_path / LEASE_FILE).read_text())["pid"] == os.getpid()

    @pytest.mark.slow
    def test_a_holder_that_is_paused_keeps_the_folder(self, tmp_path, holder):
        holder.send_signal(signal.SIGSTOP)
        with pytest.raises(LeaseError), hold(str(tmp_path), "another test"):
            pass

    def test_nothing_stays_behind_and_the_same_process_is_refused_too(self, tmp_path):
        with hold(str(tmp_path), "one") as lease:
            lease.check()
            with pytest.raises(LeaseError), hold(str(tmp_path), "two"):
                pass
        assert list(tmp_path.iterdir()) == []
        with hold(str(tmp_path), "three"):
            pass

    def test_nothing_is_written_through_a_link_in_place_of_the_lease(self, tmp_path):
        precious = tmp_path / "precious"
        precious.write_text("mine")
        folder = tmp_path / "run"
        folder.mkdir()
        lock = folder / LEASE_FILE
        for target in (precious, tmp_path / "new"):
            lock.symlink_to(target)
            held = hold(str(folder), "a test")
            with pytest.raises(StorageError, match=f"is a link to {target}.*Remove the link"), held:
                pass
            lock.unlink()
        held = hold(str(folder), "a test")
        os.link(precious, lock)
        with pytest.raises(StorageError, match=r"one of 2 names.*copy in its place"), held:
            pass
        lock.unlink()
        assert precious.read_text() == "mine"
        assert not (tmp_path / "new").exists()


class TestObjectStore:
    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch) -> None:
        monkeypatch.setattr(leases, "_SETTLE_S", 0.05)

    @pytest.fixture
    def folder(self, request) -> str:
        fsspec.filesystem("memory").store.clear()
        return "memory://set"

    def test_a_second_writer_is_refused_until_the_first_is_done(self, folder):
        with hold(folder, "one") as lease:
            lease.check()
            with pytest.raises(LeaseError, match="one"), hold(folder, "two"):
                pass
        with hold(folder, "two"):
            pass
        assert not fsspec.filesystem("memory").exists(f"/set/{LEASE_OBJECT}")

    def test_a_lease_that_nobody_renews_is_taken_over_and_its_holder_notices(
        self, folder, monkeypatch
    ):
        with hold(folder, "paused") as paused:
            monkeypatch.setattr(leases, "_EXPIRY_S", 0.0)
            time.sleep(0.01)
            with hold(folder, "next") as taker:
                with pytest.raises(LeaseLostError, match="next"):
                    paused.check()
                taker.check()

    def test_a_holder_that_was_paused_does_not_bring_its_lease_back(self, folder, monkeypatch):
        monkeypatch.setattr(leases, "_RENEW_EVERY_S", 0.05)
        with hold(folder, "paused") as paused:
            monkeypatch.setattr(leases, "_EXPIRY_S", 0.0)
            with hold(folder, "next") as taker:
                time.sleep(0.3)
                taker.check()
                with pytest.raises(LeaseLostError):
                    paused.check()

    def test_a_holder_whose_clock_is_behind_keeps_its_lease(self, folder, monkeypatch):
        monkeypatch.setattr(leases, "_RENEW_EVERY_S", 0.05)
        monkeypatch.setattr(leases, "_WATCH_S", 0.5)
        with monkeypatch.context() as there:
            there.setattr(leases, "_system", lambda: "another machine")
            first = hold(folder, "behind", Behind())
            lease = first.__enter__()
        with pytest.raises(LeaseError, match="behind"), hold(folder, "next"):
            pass
        lease.check()
        first.__exit__(None, None, None)

    def test_a_holder_elsewhere_that_renews_no_more_is_followed(self, folder, monkeypatch):
        monkeypatch.setattr(leases, "_WATCH_S", 0.2)
        left = {"token": "x", "renewed": time.time() - 3600, "system": "another machine"}
        store = fsspec.filesystem("memory")
        store.pipe_file(f"/set/{LEASE_OBJECT}", json.dumps(left).encode())
        with hold(folder, "next") as lease:
            lease.check()
            assert json.loads(store.cat_file(f"/set/{LEASE_OBJECT}"))["token"] != "x"

    @pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
    def test_a_clock_that_jumps_takes_no_lease_from_a_holder_here(
        self, folder, monkeypatch, jump_s
    ):
        with hold(folder, "steady") as lease:
            now_s = time.time
            monkeypatch.setattr(time, "time", lambda: now_s() + jump_s)
            with pytest.raises(LeaseError, match="steady"), hold(folder, "next"):
                pass
            lease.check()

    def test_a_holder_elsewhere_whose_clock_was_ahead_is_followed(self, folder, monkeypatch):
        monkeypatch.setattr(leases, "_WATCH_S", 0.2)
        left = {"token": "x", "renewed": time.time() + 3600, "system": "another machine"}
        fsspec.filesystem("memory").pipe_file(f"/set/{LEASE_OBJECT}", json.dumps(left).encode())
        with hold(folder, "next") as lease:
            lease.check()

    def test_a_lease_is_renewed_again_after_an_outage_longer_than_its_expiry(
        self, folder, monkeypatch
    ):
        monkeypatch.setattr(leases, "_RENEW_EVERY_S", 0.05)
        monkeypatch.setattr(leases, "_EXPIRY_S", 0.3)
        store = Failing()
        with hold(folder, "long", store) as lease:
            store.fails = True
            time.sleep(0.6)
            store.fails = False
            time.sleep(0.5)
            # Nobody has taken it, so it is as good as before: a second writer is refused.
            with pytest.raises(LeaseError, match="long"), hold(folder, "next"):
                pass
            lease.check()


class Behind(MemoryFileSystem):
    """Writes as a machine does whose clock is an hour behind."""

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        content = json.loads(value)
        content["renewed"] -= 3600
        super().pipe_file(path, json.dumps(content).encode(), **options)


class Failing(MemoryFileSystem):
    """A store that answers nothing for a while."""

    fails = False

    def cat_file(self, path: str, **options: Any) -> bytes:
        if self.fails:
            raise OSError("no answer")
        return super().cat_file(path, **options)


WANTS = """
import sys
from cluster.errors import LeaseError
from cluster.stores import open_store
from cluster.lease import hold
open_store(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    with hold(sys.argv[1], "a test"):
        print("held", flush=True)
        sys.stdin.readline()
except LeaseError as error:
    print(error, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rclone", "moto"])
def test_of_two_processes_one_gets_an_address_and_a_killed_holder_is_followed(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "rclone":
        use_server(request.getfixturevalue("server").environment, monkeypatch)
    else:
        request.getfixturevalue("s3_bucket")
    place = "s3://runs/two-writers"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", WANTS, place],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        assert [read_line(each) for each in both] == ["ready", "ready"]
        for each in both:
            go_on(each)
        told = {read_line(each): each for each in both}
        holder = told.pop("held")
        ((sentence, loser),) = told.items()
        assert loser.wait(30) == 0
        assert f"writing to {place}: it is being written to by " in sentence
        assert f"process {holder.pid} " in sentence
        with pytest.raises(LeaseError, match="a test"), hold(place, "a third one"):
            pass
        holder.kill()
        holder.wait()
        # Its lease is there, and young.
        with hold(place, "the next one") as lease:
            lease.check()
            expire_as_of_another_machine(place, monkeypatch)
            with hold(place, "one on another machine"), pytest.raises(LeaseLostError):
                lease.check()
    finally:
        for each in both:
            each.kill()
            each.communicate()


def expire_as_of_another_machine(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the lease on a place one that a lost machine has not renewed for two minutes."""
    files, path = open_store(place)
    lease = json.loads(files.cat_file(f"{path}/{LEASE_OBJECT}"))
    lost = {**lease, "system": "another machine", "renewed": time.time() - 120.0}
    files.pipe_file(f"{path}/{LEASE_OBJECT}", json.dumps(lost).encode())
    monkeypatch.setattr(leases, "_WATCH_S", 0.5)


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.slow
def test_a_store_that_accepts_and_never_answers_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(leases, "_ANSWER_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = S3FileSystem(
            key="a-key",
            secret="a-secret",
            endpoint_url=f"http://127.0.0.1:{silent.getsockname()[1]}",
            skip_instance_cache=True,
        )
        started = time.monotonic()
        with pytest.raises(StorageError, match=r"no answer about .*_lease\.json in 1 s"):  # noqa: SIM117
            with hold("s3://bucket/set", "a test", store):
                pass
        assert time.monotonic() - started < 30.0


def test_a_folder_that_was_made_for_a_lease_and_stayed_empty_goes_with_it(tmp_path):
    with hold(str(tmp_path / "new"), "a test"):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with hold(str(tmp_path / "old"), "a test"):
        pass
    assert (tmp_path / "old").is_dir()
    with hold(str(tmp_path / "used"), "a test"):
        (tmp_path / "used" / "result").write_text("kept")
    assert (tmp_path / "used" / "result").read_text() == "kept"


def test_a_lease_tells_the_command_of_its_holder_without_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sgmd", "distill", "output=s3://ME:planted0key@bucket/x"])
    with hold(str(tmp_path), "a test"):
        said = (tmp_path / LEASE_FILE).read_text()
    assert "output=s3://***@bucket/x" in said
    assert "planted" not in said
