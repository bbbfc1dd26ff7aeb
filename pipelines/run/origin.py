"""Origin of a run: the command line that started it."""

import os
import shlex
import sys
from pathlib import Path

from cluster.redaction import without_secrets

COMMAND_VARIABLE = "SGMD_COMMAND"
"""Environment variable of submitted jobs: the command line that has submitted them."""


def command_line() -> str:
    """The command line that started this process; of a job, the one that submitted it."""
    submitted = os.environ.get(COMMAND_VARIABLE)
    return submitted or without_secrets(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
