"""The log of a run as JSON lines: log.jsonl, with run, role, rank and iteration on every line.

    notes, alarms, events, validations of the run   -> role controller
    loggers of this project in this process         -> role controller, and on the terminal
    loggers of this project in the ranks            -> their role and rank, and on the terminal

The log is history: a resume adds to it. What an iteration comes to is in metrics.jsonl.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.errors import StorageError
from cluster.redaction import without_secrets
from cluster.said import OWN_LOGGERS, Said
from pipelines.run.alarms import Alarm
from pipelines.run.folder import append_jsonl
from pipelines.run.observer import RunObserver
from pipelines.run.origin import command_line
from pipelines.run.progress import describe_validation
from pipelines.run.records import GOOD_NEWS, IterationRecord, RunEvent, ValidationRecord
from pipelines.run.revision import git_revision

_CONTROLLER = "controller"


class RunLog(RunObserver):
    """Writes what happens in a run; callable from any thread.

    Lines are kept until the run has a folder: a request that is refused writes nothing.

    Args:
        path: The file; lines are added to those of before.
        run: Name of the run.
        warn: Called with one sentence where the file cannot be written to any more.
    """

    def __init__(self, path: Path, run: str, warn: Callable[[str], None]) -> None:
        self._path = path
        self._run = run
        self._warn = warn
        self._lock = threading.Lock()
        self._iteration: int | None = None
        self._is_broken = False
        self._early: list[dict[str, Any]] | None = []

    def open(self) -> None:
        """Writes from here on, and what has been kept; the run has its folder."""
        self.write("INFO", "started", command=command_line(), git_revision=git_revision())
        with self._lock:
            early, self._early = self._early or [], None
            for line in early:
                self._append(line)

    def write(
        self,
        level: str,
        message: str,
        *,
        role: str = _CONTROLLER,
        rank: int = 0,
        iteration: int | None = None,
        time_s: float | None = None,
        **more: Any,  # noqa: ANN401 - any JSON
    ) -> None:
        """Adds a line.

        Args:
            level: Such as INFO or WARNING.
            message: The words.
            role: Role that says it.
            rank: Rank of it.
            iteration: Iteration that it was in; None: that of the run.
            time_s: Time of day in seconds; None: now.
            more: Further fields.
        """
        now = datetime.now(UTC) if time_s is None else datetime.fromtimestamp(time_s, UTC)
        line = {
            "time": now.isoformat(timespec="milliseconds"),
            "level": level,
            "run": self._run,
            "role": role,
            "rank": rank,
            "iteration": self._iteration if iteration is None else iteration,
            "message": without_secrets(message),
            **more,
        }
        with self._lock:
            if self._early is not None:
                self._early.append(line)
            else:
                self._append(line)

    def _append(self, line: dict[str, Any]) -> None:
        if self._is_broken:
            return
        try:
            append_jsonl(self._path, line)
        except StorageError as error:
            # The run can do without; its figures and events have files of their own.
            self._is_broken = True
            self._warn(f"{self._path.name} ends here: {error.found}")

    def said(self, said: Said) -> None:
        """Writes what a rank has logged."""
        self.write(
            said.level,
            said.message,
            role=said.group,
            rank=said.rank,
            iteration=said.iteration,
            time_s=said.time_s,
        )

    def note(self, text: str) -> None:
        """Writes it."""
        self.write("INFO", text)

    def iteration(self, record: IterationRecord) -> None:
        """Remembers where the run is."""
        self._iteration = record.iteration + 1

    def validation(self, record: ValidationRecord, samples: Path) -> None:
        """Writes its leading figures."""
        self.write("INFO", f"validation: {describe_validation(record)}", iteration=record.iteration)

    def alarm(self, alarm: Alarm) -> None:
        """Writes it."""
        self.write("WARNING", alarm.in_words())

    def event(self, event: RunEvent) -> None:
        """Writes it, as of the role and rank that it is about."""
        level = "INFO" if event.kind in GOOD_NEWS else "WARNING"
        self.write(
            level,
            event.in_words(),
            role=event.role or _CONTROLLER,
            rank=event.rank or 0,
            iteration=event.iteration,
            kind=event.kind,
        )

    def warning(self, text: str) -> None:
        """Writes it."""
        self.write("WARNING", text)


class _LoggersOfThisProcess(logging.Handler):
    """Passes on what this process logs, to the file and to the terminal."""

    def __init__(self, log: RunLog, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._log = log
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Takes in one line."""
        message = without_secrets(record.getMessage())
        self._log.write(record.levelname, message, logger=record.name)
        self._say(message)


@contextmanager
def hearing_loggers(log: RunLog, say: Callable[[str], None]) -> Iterator[None]:
    """Writes the log lines of this project in this process.

    Args:
        log: The run's log.
        say: Called with each line, too; it would go to standard error otherwise.
    """
    handler = _LoggersOfThisProcess(log, say)
    loggers = [logging.getLogger(name) for name in OWN_LOGGERS]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
