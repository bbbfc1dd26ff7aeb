"""A command that is asked to stop ends as a stop, wherever the signal finds it."""

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.commands.stops import CommandStops, take_stops
from pipelines.run.stopping import STOP_SIGNALS, StopNow, StopRequests
from tests.e2e.processes import ROOT
from tests.helpers.forked_python import forked_python

SWALLOWING = """
import signal
try:
    signal.raise_signal(signal.SIGTERM)
    import {part}
except BaseException:
    broken = True
else:
    broken = False
"""

# As a command does: an import within a function of a module of commands.
LOADING = (
    "import pipelines.commands.stops as here, sys; print('result'); "
    "exec(compile('import signalling', here.__file__, 'exec'))"
)

# A process that the command has not ended, as where it was broken off.
LEFT = "multiprocessing.get_context('fork').Process(target=time.sleep, args=(600,)).start(); "


@pytest.fixture
def kept_signals() -> Iterator[None]:
    # What runs in the background of a shell, or below `nohup`, was started to ignore some.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    yield
    sys.setprofile(None)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def swallowing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A library that is sent SIGTERM as it is imported, and takes any error for a missing part."""
    (tmp_path / "a_part_of_it.py").write_text("values = [each for each in range(9)]\n")
    (tmp_path / "swallowing.py").write_text(SWALLOWING.format(part="a_part_of_it"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "swallowing", raising=False)
    monkeypatch.delitem(sys.modules, "a_part_of_it", raising=False)
    return "swallowing"


@pytest.mark.usefixtures("kept_signals")
def test_a_signal_is_raised_where_the_command_is():
    stops = take_stops()
    stops.is_working = True
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGHUP)
    assert stops.received == signal.SIGHUP


@pytest.mark.usefixtures("kept_signals")
def test_a_signal_during_an_import_waits_until_the_library_is_whole(swallowing: str):
    stops = take_stops()
    stops.is_working = True
    with pytest.raises(KeyboardInterrupt):
        importlib.import_module(swallowing)
    assert stops.received == signal.SIGTERM
    assert not sys.modules[swallowing].broken
    assert sys.getprofile() is None


@pytest.mark.usefixtures("kept_signals")
def test_a_run_that_is_stopped_during_an_import_stops_after_it(swallowing: str):
    stops = StopRequests()
    signal.signal(signal.SIGTERM, stops.handle)
    with pytest.raises(StopNow):
        importlib.import_module(swallowing)
    assert not sys.modules[swallowing].broken


def test_a_run_does_not_train_after_a_stop_that_a_library_has_swallowed():
    stops = StopRequests()
    with pytest.raises(StopNow):
        stops.handle(signal.SIGTERM, None)
    with pytest.raises(StopNow), stops.finishing_iterations():
        pytest.fail("trained")


def test_what_ends_a_command_after_a_stop_is_the_stop():
    command = ["plan", "no-such-recipe.yaml"]
    assert CliRunner().invoke(app, command).exit_code == 2
    stops = CommandStops()
    stops.received = signal.SIGTERM
    ended = CliRunner().invoke(app, command, obj=stops)
    assert ended.exit_code == 143
    assert ended.stderr.startswith("Interrupted: sgmd plan was stopped by SIGTERM.\n")
    with_traceback = CliRunner().invoke(app, ["--debug", *command], obj=stops)
    assert with_traceback.exit_code == 143
    assert "Traceback" in with_traceback.stderr


@pytest.mark.usefixtures("forked_libraries")
@pytest.mark.slow
def test_words_that_a_library_ends_the_process_with_are_shown():
    program = (
        "import sys; from pipelines import cli; "
        "cli.app = lambda **_: sys.exit('no such device'); cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (1, "no such device\n")


@pytest.mark.parametrize(
    ("state", "code", "said"),
    [
        ("pass", 130, "Stopped by SIGINT: nothing has begun."),
        (f"stops.is_working = True; {LOADING}", 130, "Stopped by SIGINT.\n"),
        ("stops.exit_code = 2", 2, "result"),
        ("stops.is_working = True; stops.received = 15", 130, "SIGINT again: ended at once."),
    ],
    ids=["while it loads", "while a command loads", "once it has ended", "a second time"],
)
def test_where_nothing_is_left_to_clean_a_signal_ends_the_process_at_once(
    state: str, code: int, said: str, tmp_path: Path
):
    (tmp_path / "signalling.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    lines = (
        "import os, signal",
        "signal.signal(signal.SIGINT, signal.default_int_handler)",
        "from pipelines.commands.stops import take_stops",
        "stops = take_stops()",
        f"{state}; print('result')",
        "os.kill(os.getpid(), signal.SIGINT)",
        "print('went on')",
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    assert "result" in done.stdout
    assert "went on" not in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("forked_libraries")
@pytest.mark.slow
@pytest.mark.parametrize("streams", ["2>/dev/full", "2>&1 >/dev/null | true"])
def test_an_error_that_nobody_can_be_told_keeps_its_exit_code(streams: str):
    done = subprocess.run(
        [
            *("bash", "-o", "pipefail", "-c"),
            f'"{sys.executable}" -m pipelines.cli recipes show nothing {streams}',
        ],
        cwd=ROOT,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2


@pytest.mark.parametrize("wanted", ["", "--help", "--version", "plan --help"])
@pytest.mark.slow
def test_help_that_a_full_disk_does_not_take_is_an_error_in_words(wanted: str):
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -m pipelines.cli {wanted} >/dev/full'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("forked_libraries")
@pytest.mark.slow
def test_an_error_of_the_system_keeps_its_traceback_where_it_is_asked_for():
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -m pipelines.cli --debug recipes schema >/dev/full'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "No space left on device" in done.stderr


@pytest.mark.usefixtures("forked_libraries")
@pytest.mark.slow
def test_a_terminal_that_says_it_has_no_width_gets_the_usual_one():
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "recipes", "list"],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "tiny" in done.stdout


@pytest.mark.parametrize(
    ("streams", "code", "said"),
    [
        ("", 0, ""),
        (">&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        ("| head -c 1", 0, "["),
        (">/dev/full", 1, "No space left on device"),
    ],
    ids=["usual", "no output", "no streams", "a reader that has enough", "a full disk"],
)
@pytest.mark.slow
def test_a_command_ends_by_its_own_code_and_runs_what_is_registered(
    streams: str, code: int, said: str, tmp_path: Path
):
    # What is forked has streams, open or closed, that its server had.
    python = sys.executable if "<&-" in streams else forked_python()
    ended = tmp_path / "ended"
    program = (
        "import atexit, json, multiprocessing, pathlib, sys, threading, time; "
        "from pipelines.cli import main; "
        f"{'' if streams else LEFT}"
        "slow = threading.Thread(target=lambda: time.sleep(1)); slow.start(); "
        "over = lambda: 'a thread runs' if slow.is_alive() else 'all'; "
        f"atexit.register(lambda: pathlib.Path({str(ended)!r}).write_text(over())); "
        "sys.argv[1:] = ['recipes', 'list', '--json']; main()"
    )
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'"{python}" -c "{program}" {streams}'],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert ended.read_text() == "all"
