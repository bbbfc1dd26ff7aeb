"""Progress of a training that runs in other processes.

    worker 0  --mailbox-->  the process that called `pretrain`  --append-->  RUN/events.jsonl

One process writes the file, wherever it lies; a resumed run continues it.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock

from pipelines.pretraining.config import PretrainConfig
from pipelines.run.folder import append_jsonl
from pipelines.run.records import RunEvent

EVENTS_FILE = "events.jsonl"


@dataclass(frozen=True, slots=True)
class PretrainEvent:
    """One line of progress.

    Attributes:
        stage: "vae", "denoiser", "quality" or "store".
        step: Steps done in this stage.
        num_steps: Steps of this stage at most.
        seconds_per_step: Mean since the last line; 0 for notes.
        metrics: Losses and scores.
        note: A sentence instead of metrics.
    """

    stage: str
    step: int = 0
    num_steps: int = 0
    seconds_per_step: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


class PretrainEvents:
    """Events of a run: writes them down and tells them, in the process that called `pretrain`.

    Callable from any thread.

    Args:
        path: The file.
        on_event: Called with every event.
    """

    def __init__(self, path: Path, on_event: Callable[[PretrainEvent], None]) -> None:
        self._path = path
        self._on_event = on_event
        self._lock = Lock()

    def add(self, event: PretrainEvent) -> None:
        """Adds an event."""
        with self._lock:
            append_jsonl(self._path, asdict(event))
            self._on_event(event)

    def add_outage(self, event: RunEvent) -> None:
        """Adds what the publisher of a run at an address has to say."""
        self.add(PretrainEvent("store", note=f"{event.cause}; {event.action}"))


class EventWriter:
    """Tells the progress of one stage.

    Args:
        config: The recipe.
        stage: Name of the stage.
        num_steps: Steps of the stage at most.
        send: Takes every event.
        is_silent: True on all workers but the first.
        every_s: Longest time between two steps that are reported, where steps end.
    """

    def __init__(
        self,
        config: PretrainConfig,
        stage: str,
        num_steps: int,
        send: Callable[[PretrainEvent], None],
        *,
        is_silent: bool = False,
        every_s: float = 30.0,
    ) -> None:
        self._send = send
        self._every_steps = config.ray.report_every_steps
        self._stage = stage
        self._num_steps = num_steps
        self._is_silent = is_silent
        self._every_s = every_s
        self._last = (time.monotonic(), 0)

    def start(self, step: int) -> None:
        """The stage starts, or continues, after so many steps; names the process to look at."""
        self._last = (time.monotonic(), step)
        self.note(f"{self._stage} starts at step {step} in process {os.getpid()}")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done; every `ray.report_every_steps`-th is reported.

        So is one that ends more than 30 seconds after the last one that was.
        """
        now, (then, last_step) = time.monotonic(), self._last
        is_due = not step % self._every_steps or step == self._num_steps
        if not is_due and now - then < self._every_s:
            return
        seconds = (now - then) / max(1, step - last_step)
        self._last = (now, step)
        self._tell(PretrainEvent(self._stage, step, self._num_steps, seconds, dict(metrics)))

    def note(self, text: str) -> None:
        """Tells a sentence."""
        self._tell(PretrainEvent(self._stage, note=text))

    def _tell(self, event: PretrainEvent) -> None:
        if not self._is_silent:
            self._send(event)
