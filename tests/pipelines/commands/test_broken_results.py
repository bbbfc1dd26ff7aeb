"""`sgmd report` and `sgmd plan --measured` on files that are not what they should be."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from tests.helpers.runs import finish_run, start_run


def sgmd(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_a_report_of_whole_files_says_where_it_is_and_nothing_else(tmp_path: Path) -> None:
    done = sgmd("report", finish_run(tmp_path / "run"))
    assert done.exit_code == 0
    assert done.stdout == f"{tmp_path}/run/report.html\n"


@pytest.mark.slow
def test_lines_that_a_report_leaves_out_are_counted_and_said(tmp_path: Path) -> None:
    run = start_run(tmp_path / "run", 5)
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"iteration": 5, "los\n[1]\n')
    done = sgmd("report", run)
    assert done.exit_code == 0
    assert f"{run}: metrics.jsonl: 2 lines left out, torn or wrong (6, 7)." in done.stdout
    assert json.loads(sgmd("report", run, "--json").stdout)["unreadable"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "ranking.json"])
def test_a_report_without_a_file_of_which_nothing_can_be_read_ends_with_1(
    tmp_path: Path, name: str
) -> None:
    whole, run = finish_run(tmp_path / "whole"), finish_run(tmp_path / "run")
    (run / name).write_bytes(bytes(range(256)) * 20)
    done = sgmd("report", run, whole)
    assert done.exit_code == 1
    assert (tmp_path / "comparison.html").exists()
    assert f"The page lacks what nothing could be read of: {run / name}\n" in done.stdout
    assert f"{whole}:" not in done.stdout
    found = json.loads(sgmd("report", run, "--json").stdout)
    assert found["unreadable"] == [str(run / name)]
    assert len(found["broken"][str(run)]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("is_empty", [True, False])
def test_a_report_of_a_run_whose_log_is_lost_ends_with_1_and_says_what_came_of_iterations(
    tmp_path: Path, is_empty: bool
) -> None:
    run = finish_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    if is_empty:
        (run / "metrics.jsonl").touch()
    done = sgmd("report", run)
    assert done.exit_code == 1
    state = "has no iteration" if is_empty else "is not there"
    assert f"metrics.jsonl {state}, but summary.json and validation.jsonl come from" in done.stdout


def test_a_report_of_a_run_that_has_only_been_started_lacks_nothing_and_says_so(
    tmp_path: Path,
) -> None:
    run = start_run(tmp_path / "run", 0)
    done = sgmd("report", run)
    assert done.exit_code == 0
    path, told = done.stdout.split("\n", 1)
    assert path == f"{run}/report.html"
    assert told.startswith(f"{run}: nothing yet: no iteration has been finished.")
    assert f"--resume {run}" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("", "a file that is not JSON (line 1, column 1)"),
        ("{}", "JSON without 'runs'"),
        ("[]", "JSON of another shape"),
        ("[" * 100_000, "JSON of another shape"),
        ('{"runs": []}', "JSON whose 'runs' are empty"),
        ('{"runs": [{"stages": []}]}', "JSON of another shape"),
        ('{"runs": [{"stages": {}}], "machine": {"device": "x"}}', "JSON without 'shape'"),
        (b"\xff\xfe", "bytes that are not UTF-8 text, at 0"),
        (None, "no such file"),
    ],
)
def test_times_that_are_no_benchmarks_are_refused_in_one_sentence(
    tmp_path: Path, content: str | bytes | None, found: str
) -> None:
    path = tmp_path / "gpu.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    done = sgmd("plan", "wan21-1.3b", "--model", "1.3b", "--measured", path)
    assert done.exit_code == 2
    assert done.stdout == ""
    said = " ".join(done.stderr.split())
    assert f"While taking stage times from {path}: {found}." in said
    assert "Error:" not in said.removeprefix("ConfigError:")


def test_a_run_without_a_whole_line_gives_no_times(tmp_path: Path) -> None:
    run = start_run(tmp_path / "run", 0)
    (run / "metrics.jsonl").write_bytes(b"\xff" * 100)
    done = sgmd("plan", "wan21-1.3b", "--model", "1.3b", "--measured", run)
    assert done.exit_code == 2
    assert "no whole line in metrics.jsonl" in " ".join(done.stderr.split())
