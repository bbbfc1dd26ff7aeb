"""Ends of the processes that tests run in side by side."""

import os
import subprocess
from pathlib import Path

from tests.helpers.forked_python import PYTHON

ROOT = Path(__file__).parents[1]
ENDING = """
import os, sys, tests.conftest
from multiprocessing.util import get_temp_dir
from tests.helpers.ending import end_without_clearing

class Loud:
    def __del__(self):
        os.write(1, b"cleared ")

held = Loud()
if sys.argv[1] == "early":
    end_without_clearing()
os.write(1, get_temp_dir().encode() + b" ")
if not os.fork():
    sys.exit(3)
os.write(1, b"%d " % os.waitstatus_to_exitcode(os.wait()[1]))
sys.exit(4)
"""


def ended(how: str) -> tuple[list[str], int]:
    """Words of a process that has imported what all tests share, and its exit code."""
    # As the processes that a test side by side with others starts have it.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_XDIST_WORKER": "gw0"}
    command = [PYTHON, "-c", ENDING, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert not done.stderr
    return done.stdout.split(), done.returncode


def test_a_process_of_tests_calls_what_is_registered_and_clears_nothing():
    (folder, forked, *cleared), code = ended("early")
    assert (forked, cleared, code) == ("cleared", ["3"], 0)
    assert not Path(folder).exists()


def test_other_processes_end_as_usual():
    (folder, forked, *cleared), code = ended("usual")
    assert (forked, cleared, code) == ("cleared", ["3", "cleared"], 4)
    assert not Path(folder).exists()
