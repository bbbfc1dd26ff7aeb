"""Observers of a run: the terminal, the tracker and tests receive its events."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cluster.said import Said
from pipelines.run.alarms import Alarm
from pipelines.run.records import IterationRecord, RunEvent, ValidationRecord


class RunObserver:
    """Receives the events of a run in their order. Every method does nothing unless overridden."""

    def note(self, text: str) -> None:
        """Receives one line about the progress of the run, such as that its state is loaded."""

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
        for name in vars(RunObserver):
            if not name.startswith("_"):
                setattr(self, name, partial(_pass_on, tuple(observers), name))


def _pass_on(observers: Sequence[RunObserver], name: str, *event: object) -> None:
    for observer in observers:
        getattr(observer, name)(*event)
