"""A log hides no whole line, whatever stands between its lines."""

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import StorageError
from cluster.logs import append_line, read_lines

FIELDS = {"iteration": int, "losses": dict}


def line(iteration: int) -> dict[str, object]:
    return {"iteration": iteration, "losses": {"é": 0.5}}


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (b"\0\0\0\0", "only NULs"),
        (b'{"iteration": 1, "los', "no JSON"),
        (b"", "empty"),
        (b"[1]", "no object"),
        (b"{}", "no iteration"),
        (b'{"iteration": "one", "losses": {}}', "iteration = 'one'"),
        (b'{"iteration": 1, "losses": null}', "losses = None"),
        (b"\xff\xfe", "no JSON"),
    ],
)
def test_a_broken_line_is_named_and_the_others_are_read(tmp_path, broken, reason):
    path, said = tmp_path / "log", list[str]()
    append_line(path, line(0))
    with path.open("ab") as file:
        file.write(broken + b"\n")
    append_line(path, line(2))
    assert read_lines(path, FIELDS, said.append) == [line(0), line(2)]
    assert len(said) == 1
    assert f"{path}: 1 broken line(s) left out (line 2: {reason}" in said[0]


@pytest.mark.parametrize(
    ("put", "kind"),
    [
        (Path.mkdir, "a folder"),
        (os.mkfifo, "a named pipe"),
        (lambda path: path.symlink_to("nowhere"), "a link that leads nowhere"),
        (lambda path: path.symlink_to(path.name), "a link that leads nowhere"),
    ],
)
def test_what_is_no_file_is_no_log_and_is_not_waited_for(
    tmp_path: Path, put: Callable[[Path], None], kind: str
):
    assert read_lines(tmp_path / "log", FIELDS) == []
    put(tmp_path / "log")
    with pytest.raises(StorageError, match=f"reading {tmp_path}/log: {kind}. Expected a file"):
        read_lines(tmp_path / "log", FIELDS)


def test_the_end_of_a_torn_line_does_not_take_the_next_one_with_it(tmp_path):
    path, said = tmp_path / "log", list[str]()
    append_line(path, line(0))
    with path.open("ab") as file:
        file.write(b'{"iteration": 1')
    assert read_lines(path, FIELDS, said.append) == [line(0)]
    assert said == []
    append_line(path, line(1))
    assert read_lines(path, FIELDS, said.append) == [line(0), line(1)]


def test_a_full_disk_takes_the_line_back_and_says_so(tmp_path):
    path = tmp_path / "log"
    append_line(path, line(0))
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"adding a line to .*room on the disk.*Free space"):
            append_line(path, line(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    append_line(path, line(1))
    assert [json.loads(text) for text in path.read_text().splitlines()] == [line(0), line(1)]
