"""Words that the processes of a run log, each with where it was said.

    a rank        logger.warning -> its own log file, with a prefix such as `[fake_score 1 @120]`
                                 -> the last few, in its progress report
    controller    the watch reads the reports -> each line once

Log lines of this project are kept, from WARNING on; libraries keep to the log file of the rank.
"""

import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from cluster.redaction import without_secrets

OWN_LOGGERS = ("cluster", "pipelines", "sgmd_core", "workers")
"""Packages whose log lines are kept."""
_KEPT = 20
_LONGEST = 500


@dataclass(frozen=True, slots=True)
class Said:
    """A line that a rank has logged.

    Attributes:
        number: Count of the lines of its process.
        time_s: Time of day in seconds.
        level: Such as WARNING.
        group: Group of the call that the process was in; its pool between two calls.
        rank: Rank there.
        iteration: Iteration that the call was part of; None: of none.
        message: The words, without secrets.
    """

    number: int
    time_s: float
    level: str
    group: str
    rank: int
    iteration: int | None
    message: str

    @property
    def prefix(self) -> str:
        """Place of the line, for its head."""
        at = "" if self.iteration is None else f" @{self.iteration}"
        return f"[{self.group} {self.rank}{at}]"

    @property
    def line(self) -> str:
        """The line as people read it."""
        return f"{self.prefix} {self.message}"


class SaidHandler(logging.Handler):
    """Writes what is logged to standard error, with its place, and keeps the last lines.

    Args:
        place: Returns group, rank and iteration of the call that the process is in.
    """

    def __init__(self, place: Callable[[], tuple[str, int, int | None]]) -> None:
        super().__init__(logging.WARNING)
        self._place = place
        self._kept: deque[Said] = deque(maxlen=_KEPT)
        self._number = 0

    def listen(self) -> None:
        """Receives the log lines of this project from here on."""
        for name in OWN_LOGGERS:
            logging.getLogger(name).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a log line, shortened and without secrets, and writes it to standard error."""
        self._number += 1
        message = without_secrets(record.getMessage())[:_LONGEST]
        said = Said(self._number, time.time(), record.levelname, *self._place(), message)
        self._kept.append(said)
        sys.stderr.write(f"{said.line}\n")

    def recent(self) -> list[dict[str, Any]]:
        """The last lines, as a report holds them."""
        return [asdict(said) for said in list(self._kept)]


class Hearing:
    """Passes on every line of the reports once.

    Args:
        on_said: Receives each line.
    """

    def __init__(self, on_said: Callable[[Said], None]) -> None:
        self._on_said = on_said
        self._received: dict[str, int] = {}

    def hear(self, process: str, said: list[dict[str, Any]]) -> None:
        """Takes in the lines of a report.

        Args:
            process: Names the process, and no other one after it.
            said: As `SaidHandler.recent` returns them.
        """
        for line in said:
            one = Said(**line)
            if one.number > self._received.get(process, 0):
                self._received[process] = one.number
                self._on_said(one)
