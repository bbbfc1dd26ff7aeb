"""Progress of a training that runs in other processes, told through one file of JSON lines.

    worker 0  --append-->  RUN/events.jsonl  --follow-->  the process that called `pretrain`

The file outlives both, so a resumed run continues it.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event, Thread

from pipelines.pretraining.config import PretrainConfig

EVENTS_FILE = "events.jsonl"
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class PretrainEvent:
    """One line of progress.

    Attributes:
        stage: "vae", "denoiser" or "quality".
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


class EventWriter:
    """Appends progress of one stage to the run's event file.

    Args:
        config: The recipe.
        stage: Name of the stage.
        num_steps: Steps of the stage at most.
        is_silent: True on all workers but the first.
        every_s: Longest time between two steps that are written down, where steps end.
    """

    def __init__(
        self,
        config: PretrainConfig,
        stage: str,
        num_steps: int,
        *,
        is_silent: bool = False,
        every_s: float = 30.0,
    ) -> None:
        self._path = Path(config.run_dir) / EVENTS_FILE
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
        """A step is done; every `ray.report_every_steps`-th is written down.

        So is one that ends more than 30 seconds after the last one that was.
        """
        now, (then, last_step) = time.monotonic(), self._last
        is_due = not step % self._every_steps or step == self._num_steps
        if not is_due and now - then < self._every_s:
            return
        seconds = (now - then) / max(1, step - last_step)
        self._last = (now, step)
        self._append(PretrainEvent(self._stage, step, self._num_steps, seconds, dict(metrics)))

    def note(self, text: str) -> None:
        """Write down a sentence."""
        self._append(PretrainEvent(self._stage, note=text))

    def _append(self, event: PretrainEvent) -> None:
        if self._is_silent:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(event)) + "\n")


@contextmanager
def follow_events(path: Path, on_event: Callable[[PretrainEvent], None]) -> Iterator[None]:
    """Call `on_event` for every line that is appended to a file while the context is open."""
    finished = Event()
    start = path.stat().st_size if path.exists() else 0
    follower = Thread(target=_follow, args=(path, start, on_event, finished), daemon=True)
    follower.start()
    try:
        yield
    finally:
        finished.set()
        follower.join()


def _follow(
    path: Path, start: int, on_event: Callable[[PretrainEvent], None], finished: Event
) -> None:
    position, is_last_look = start, False
    while True:
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            position += len(whole)
            for line in whole.splitlines():
                on_event(PretrainEvent(**json.loads(line)))
        if is_last_look:
            return
        # After the end is announced, look once more for lines written just before it.
        is_last_look = finished.wait(_POLL_S)
