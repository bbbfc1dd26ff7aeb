"""Failures of a run and what was done about them: events.jsonl, terminal, tracker and report.

Events are history: a resume or a rewind of the run deletes none, although the iterations around
them are made again.
"""

import threading

from pipelines.run.folder import RunFolder, append_jsonl
from pipelines.run.observer import RunObserver
from pipelines.run.records import RunEvent


class EventLog:
    """Writes the events of a run and passes them to its observer; callable from any thread.

    Args:
        folder: The run's files.
        observer: Receives each event; may be replaced.
    """

    def __init__(self, folder: RunFolder, observer: RunObserver) -> None:
        self.observer = observer
        self._folder = folder
        self._lock = threading.Lock()

    def add(self, event: RunEvent) -> None:
        """Adds an event to events.jsonl, then passes it to the observer.

        Raises:
            StorageError: The disk is full or cannot be written to.
        """
        with self._lock:
            append_jsonl(self._folder.events, event.to_json())
            self.observer.event(event)
