"""A command inside a job: run, run again where it fails, reported on.

    python -m pipelines.submitting.in_job --retries=3 --report=RUN -- distill mine.yaml ...

    run -> exit code 0                         the report is written
        -> exit code 2 or 128 + n              a wrong request, or a stop that was asked for
        -> exit code 1, or killed by a signal  after a pause, again, going on where it was

It is part of the job, so nobody needs to stay connected. The lease of the run's folder keeps two
attempts apart: a killed one holds that of an object store until it runs out, hence the pause.
"""

import argparse
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import FrameType

from pipelines.submitting.request import RESUMED_BY

_FAILED = 1
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Attempts:
    """Attempts of one command.

    Args:
        argv: The command and its arguments, as `sgmd` takes them.
        retries: Times that it is run again.
        pause_s: Seconds before it is.
    """

    def __init__(self, argv: Sequence[str], retries: int, pause_s: float) -> None:
        self._argv = list(argv)
        self._retries = retries
        self._pause_s = pause_s
        self._stop = threading.Event()
        self._received = 0
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Runs the command until it ends well or for good; returns its exit code."""
        for number in _STOPS:
            signal.signal(number, self._pass_on)
        code = self._run_once(self._argv)
        for attempt in range(1, self._retries + 1):
            if not _is_worth_another(code) or self._stop.is_set():
                break
            _say(
                f"{_in_words(code)}; attempt {attempt + 1} of {self._retries + 1} in "
                f"{self._pause_s:g} s"
            )
            if self._stop.wait(self._pause_s):
                break
            code = self._run_once(resumed(self._argv))
        return code if code >= 0 else 128 - code

    def _run_once(self, argv: Sequence[str]) -> int:
        with subprocess.Popen(_sgmd(argv)) as self._process:
            if self._received:
                # It came before there was a process to hand it to.
                self._process.send_signal(self._received)
            return self._process.wait()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Hands a signal on; a run that gets it from elsewhere as well counts it once."""
        self._received = number
        self._stop.set()
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


def resumed(argv: Sequence[str]) -> list[str]:
    """The command that goes on where another one was."""
    options = RESUMED_BY.get(argv[0], ())
    given = {word.partition("=")[0] for word in argv}
    return [*argv] if given.intersection(options) else [*argv, *options]


def _sgmd(argv: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "pipelines.cli", *argv]


def _is_worth_another(code: int) -> bool:
    return code == _FAILED or code < 0


def _in_words(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _say(words: str) -> None:
    sys.stderr.write(f"{words}\n")
    sys.stderr.flush()


def run_in_job(words: Sequence[str] | None = None) -> int:
    """Reads the command line, runs the command, and reports on it."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.submitting.in_job")
    parser.add_argument("--retries", type=int, default=0, help="times to run it again if it fails")
    parser.add_argument("--pause", type=float, default=5.0, help="seconds before that")
    parser.add_argument("--report", help="run to write the report of, once it is done")
    parser.add_argument("argv", nargs="+", help="a command of sgmd and its arguments, after --")
    given = parser.parse_args(words)
    code = Attempts(given.argv, given.retries, given.pause).run()
    if code == 0 and given.report:
        # The run is done and whole; that it could not be drawn is not a failure of it.
        subprocess.run(_sgmd(["report", given.report]), check=False)
    return code


if __name__ == "__main__":
    sys.exit(run_in_job())
