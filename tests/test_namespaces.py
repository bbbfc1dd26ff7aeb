"""A machine of the tests ends with the process that has started it."""

import subprocess
import sys

import pytest

_STARTED = """
import os
import sys
from tests.helpers.namespaces import end_with_parent

seen, held = os.pipe()
if sys.argv[1] == "ended":
    os.close(held)
end_with_parent(seen)
print("at work")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has namespaces")
@pytest.mark.parametrize(("parent", "said"), [("at work", "at work\n"), ("ended", "")])
def test_process_1_ends_whose_parent_ended_before_it_could_be_told(parent: str, said: str) -> None:
    started = subprocess.run(
        [sys.executable, "-c", _STARTED, parent],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert started.stdout == said, started.stderr
