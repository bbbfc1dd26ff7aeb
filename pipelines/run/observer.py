"""Observers of a run: the terminal, the tracker and tests receive its events."""

from collections.abc import Sequence
from pathlib import Path

from cluster.said import Said
from pipelines.run.alarms import Alarm
from pipelines.run.records import IterationRecord, RunEvent, ValidationRecord


class RunObserver:
    """Receives the events of a run in their order. Every method does nothing unless overridden."""

    def note(self, text: str) -> None:
        """Receives one line about a phase: starting, loading, saving."""

    def iteration(self, record: IterationRecord) -> None:
        """Receives the record of an iteration that is committed."""

    def validation(self, record: ValidationRecord, samples: Path) -> None:
        """Receives a validation; its contact sheet lies in the folder `samples`."""

    def alarm(self, alarm: Alarm) -> None:
        """Receives a figure that has crossed its limit."""

    def event(self, event: RunEvent) -> None:
        """Receives a failure, or what was done about one; perhaps from another thread."""

    def warning(self, text: str) -> None:
        """Receives one line about a failure that the run can do without."""

    def said(self, said: Said) -> None:
        """Receives a line that a rank has logged; perhaps from another thread."""


class Observers(RunObserver):
    """Passes every event on to several observers, in their order."""

    def __init__(self, observers: Sequence[RunObserver]) -> None:
        self._observers = tuple(observers)

    def note(self, text: str) -> None:
        """Passes a sentence to every observer, in order."""
        for observer in self._observers:
            observer.note(text)

    def iteration(self, record: IterationRecord) -> None:
        """Passes the record of an iteration to every observer."""
        for observer in self._observers:
            observer.iteration(record)

    def validation(self, record: ValidationRecord, samples: Path) -> None:
        """Passes a validation and its clips to every observer."""
        for observer in self._observers:
            observer.validation(record, samples)

    def alarm(self, alarm: Alarm) -> None:
        """Passes an alarm to every observer."""
        for observer in self._observers:
            observer.alarm(alarm)

    def event(self, event: RunEvent) -> None:
        """Passes a failure or its repair to every observer."""
        for observer in self._observers:
            observer.event(event)

    def warning(self, text: str) -> None:
        """Passes a warning to every observer."""
        for observer in self._observers:
            observer.warning(text)

    def said(self, said: Said) -> None:
        """Passes a log line of a process to every observer."""
        for observer in self._observers:
            observer.said(said)
