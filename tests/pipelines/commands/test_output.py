"""Results and progress at the widths of real terminals, and in logs."""

import io
import re
import sys
import time
import traceback

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.text import Text
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.commands.output import (
    CountLines,
    FittingTable,
    PrintableConsole,
    ProgressLines,
    pairs,
    show,
    working,
)
from pipelines.run.progress import BarAndFigures
from pipelines.sweeping.events import trial_error
from sgmd_core.errors import DataError


def test_a_log_gets_done_and_total_rate_and_time_left():
    log = io.StringIO()
    progress = ProgressLines(Console(file=log, width=120), every_s=0.0)
    for done in range(0, 5):
        progress("teacher, 50 steps", done, 4)
    lines = log.getvalue().splitlines()
    assert lines[0] == "teacher, 50 steps: 0/4"
    assert re.fullmatch(r"teacher, 50 steps: 2/4, [\d.e+]+/s, 0:00:\d\d left", lines[2])
    assert re.fullmatch(r"teacher, 50 steps: 4/4, [\d.e+]+/s", lines[-1])


def test_a_result_goes_to_standard_output_also_while_work_goes_on(capsys):
    with working() as console:
        sys.stdout.write("of a library\n")
        console.print("a note")
        show({"path": "x"}, True)
        show({}, False, "for a reader")
    printed = capsys.readouterr()
    assert printed.out == '{\n  "path": "x"\n}\nfor a reader\n'
    assert printed.err == "of a library\na note\n"


def test_text_of_foreign_data_gives_a_terminal_no_commands(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    foreign, shown = "a\x1b]0;pwn\x9cb", "a\\x1b]0;pwn\\x9cb"
    table = FittingTable(("name",), [[foreign]], num_kept=1)
    with working() as console:
        console.print(Text(foreign, style="bold red"), soft_wrap=True)
        console.print(foreign, highlight=False, markup=False)
        show({}, False, foreign, pairs({foreign: foreign}), table)
    printed = capsys.readouterr()
    assert (printed.err.count(shown), printed.out.count(shown)) == (2, 4)
    assert not re.search(r"[\x1b\x9c]", printed.out + printed.err)
    # The colours of the program itself are shown.
    console = PrintableConsole(file=(file := io.StringIO()), force_terminal=True)
    console.print(Text(foreign, style="red"))
    assert file.getvalue() == f"\x1b[31m{shown}\x1b[0m\n"


def test_lines_that_follow_closely_are_left_out_of_a_log_but_not_the_last_one():
    log = io.StringIO()
    progress = ProgressLines(Console(file=log, width=120), every_s=3600.0)
    for done in range(0, 101):
        progress("clips", done, 100)
    assert [line.split(",")[0] for line in log.getvalue().splitlines()] == [
        "clips: 0/100",
        "clips: 100/100",
    ]


def test_a_log_hears_of_a_long_work_while_it_does_nothing_but_work():
    log = io.StringIO()
    with ProgressLines(Console(file=log, width=120), still_every_s=0.05) as progress:
        progress("teacher, 50 steps", 16, 256)
        deadline = time.monotonic() + 60
        while log.getvalue().count("\n") < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    first, *still = log.getvalue().splitlines()
    assert first == "teacher, 50 steps: 16/256"
    assert still
    for line in still:
        assert re.fullmatch(
            r"teacher, 50 steps: 16/256, at work on the next for \d:\d\d:\d\d", line
        )


@pytest.mark.parametrize("is_line", [False, True], ids=["log", "terminal"])
def test_a_count_says_that_it_goes_on_while_a_single_clip_takes_long(is_line):
    log = io.StringIO()
    line: list[str] = []
    update = line.append if is_line else None
    with CountLines(Console(file=log, width=120), update, still_every_s=0.05) as count:
        count("7 clips, 0 bad")
        deadline = time.monotonic() + 60
        while len(line if is_line else log.getvalue().splitlines()) < 2:
            assert time.monotonic() < deadline, "not a line while nothing was heard"
            time.sleep(0.01)
    lines = line if is_line else log.getvalue().splitlines()
    still = [each for each in lines if "at work" in each]
    assert still
    for each in still:
        assert re.fullmatch(r"7 clips, 0 bad, at work on the next for \d:\d\d:\d\d", each)
    assert log.getvalue().splitlines()[-1] == "7 clips, 0 bad"


@pytest.mark.parametrize("columns", [80, 120])
def test_the_bar_of_a_run_stays_beside_long_figures(columns):
    console = Console(file=io.StringIO(), width=columns, force_terminal=True)
    bars = (
        TextColumn("{task.description}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    progress = BarAndFigures(*bars, console=console, auto_refresh=False)
    figures = "  iteration 7  " + "generator/loss 0.1234  " * 10
    progress.add_task("distill", total=100, completed=50, figures=figures, left="1:02:03 left")
    out = Console(file=io.StringIO(), width=columns)
    out.print(progress.get_renderable())
    assert isinstance(out.file, io.StringIO)
    lines = out.file.getvalue().splitlines()
    assert "━━━━━━━━━━" in lines[0]
    assert "50/100" in lines[0]
    assert "1:02:03 left" in lines[0]
    assert len(lines) == 2
    assert lines[1].startswith("  iteration 7")


def test_flags_are_shown_without_a_type_and_completion_can_be_installed():
    for arguments in (["distill", "--help"], ["recipes", "list", "--help"], ["--help"]):
        text = CliRunner().invoke(app, arguments).output
        assert "<bool>" not in text
    assert "--install-completion" in text
    assert CliRunner().invoke(app, ["recipes", "list", "--json"]).stdout.startswith("[")


def test_a_failed_trial_shows_its_error_and_not_the_last_note():
    error = DataError("reading shard-0.parquet", "a torn file", remedy="Download it again")
    error.add_note("raised on a worker\nof machine 3")
    told = "".join(traceback.format_exception(error))
    assert trial_error(RuntimeError(told)).startswith("DataError: While reading shard-0.parquet")


@pytest.mark.parametrize(("columns", "widest"), [("", 120), ("80", 80)])
def test_a_pipe_is_as_wide_as_its_environment_says_or_120_columns(
    monkeypatch, capsys, columns: str, widest: int
):
    monkeypatch.setenv("COLUMNS", columns)
    show({}, False, pairs({"words": "word " * 100}))
    lines = capsys.readouterr().out.splitlines()
    assert widest - 10 < max(map(len, lines)) <= widest
