"""Logs in parts: whatever request was the last one, a reader gets the log before it or after it."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.run import log_parts
from pipelines.run.log_parts import PARTS, LogParts, parts_in_order

LOG = "/bucket/metrics.jsonl"


class Dying(MemoryFileSystem):
    """Takes so many changes, and fails from then on."""

    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    left = 10**9

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError("the writer was killed")

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        self._count()
        super().pipe_file(path, value, **options)

    def rm_file(self, path: str) -> None:
        self._count()
        super()._rm(path)


@pytest.fixture
def files() -> Dying:
    Dying.store.clear()
    return Dying(skip_instance_cache=True)


def read(files: Dying) -> bytes | None:
    """The log as a reader finds it."""
    folder = f"{LOG}{PARTS}"
    listed = files.ls(folder) if files.isdir(folder) else []
    sizes = {entry["name"].rpartition("/")[2]: entry["size"] for entry in listed}
    if parts := parts_in_order(sizes):
        return b"".join(files.cat_file(f"{folder}/{name}") for name in parts)
    return files.cat_file(LOG) if files.exists(LOG) else None


def write(log: LogParts, file: Path, files: Dying) -> list[bytes]:
    """A writer's day: lines come, a part of them is dropped, more come, the log is joined."""
    states = [b""]
    file.write_bytes(b"")
    for step in range(6):
        if step == 3:
            # A resume writes the log again.
            kept = file.with_name("draft")
            kept.write_bytes(b"0 again\n")
            kept.replace(file)
        else:
            with file.open("ab") as opened:
                opened.write(f"{step}\n".encode())
        states.append(file.read_bytes())
        log.send(file)
    log.join(file)
    return states


def test_a_kill_at_any_request_leaves_the_log_before_it_or_after_it(tmp_path, files, monkeypatch):
    monkeypatch.setattr(log_parts, "_MAX_PARTS", 2)
    states = write(LogParts(files, LOG), tmp_path / "log", files)
    assert read(files) == states[-1]
    total = 10**9 - files.left
    assert total > 12
    assert not files.isdir(f"{LOG}{PARTS}")
    for left in range(1, total):
        Dying.store.clear()
        files.left = left
        with pytest.raises(OSError, match="was killed"):
            write(LogParts(files, LOG), tmp_path / "log", files)
        now = (tmp_path / "log").read_bytes()
        before = states[max(0, states.index(now) - 1)]
        assert read(files) in (before, now), left
        # The next writer goes on from what it finds.
        files.left = 10**9
        log = LogParts(files, LOG)
        (tmp_path / "log").write_bytes(b"9\n")
        log.send(tmp_path / "log")
        assert read(files) == b"9\n", left
        log.join(tmp_path / "log")
        assert read(files) == b"9\n"


def test_a_line_without_its_end_is_left_for_later(tmp_path, files):
    log, file = LogParts(files, LOG), tmp_path / "log"
    file.write_bytes(b"one\ntw")
    assert not log.send(file)
    assert read(files) == b"one\n"
    with file.open("ab") as opened:
        opened.write(b"o\n")
    assert log.send(file)
    assert read(files) == b"one\ntwo\n"
    assert log.send(file)


def test_a_log_that_was_written_anew_is_sent_whole_though_its_inode_is_the_same(tmp_path, files):
    log, file = LogParts(files, LOG), tmp_path / "log"
    file.write_bytes(b"1\n2\n3\n")
    assert log.send(file)
    inode = file.stat().st_ino
    # As after two rewinds between two sends: the file of before is free, and its inode is taken.
    file.write_bytes(b"1\n9\n8\n7\n")
    assert file.stat().st_ino == inode
    assert log.send(file)
    assert read(files) == b"1\n9\n8\n7\n"
    with file.open("ab") as opened:
        opened.write(b"6\n")
    assert log.send(file)
    assert read(files) == b"1\n9\n8\n7\n6\n"
    assert len(files.ls(f"{LOG}{PARTS}")) == 2


def test_a_log_that_was_empty_at_first_is_replaced_and_begun_anew(tmp_path, files):
    log, file = LogParts(files, LOG), tmp_path / "log"
    for content in (b"", b"1\n", b"2\n"):
        file.write_bytes(content)
        assert log.send(file)
        assert read(files) == content


def test_parts_that_do_not_follow_one_another_are_not_read():
    sizes = {"000000-000000000000": 5, "000000-000000000009": 3, "000001-000000000004": 2, "x": 1}
    assert parts_in_order(sizes) == ["000000-000000000000"]
    assert parts_in_order({"000001-000000000004": 2}) == []
