"""TensorBoard's files in the run folder, when the recipe asks for them.

    RUN/tensorboard/            losses, norms, seconds, validations and their contact sheets
    RUN/tensorboard/events/     failures, what was done about them, and alarms, as text

A run that goes on from an earlier iteration makes some again. The files say so, and TensorBoard
then shows the new ones alone. Events are apart from that: what failed stays to be seen.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipelines.run.alarms import Alarm
from pipelines.run.observer import RunObserver
from pipelines.run.records import IterationRecord, RunEvent, ValidationRecord

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

_log = logging.getLogger(__name__)
_FLUSH_S = 10
_FILE_VERSION = "brain.Event:2"


class TensorBoardObserver(RunObserver):
    """Writes what a run reports.

    A step is the number of iterations that are done.

    Args:
        figures: Writer of figures and images.
        events: Writer of texts.
    """

    def __init__(self, figures: "SummaryWriter", events: "SummaryWriter") -> None:
        self._figures = figures
        self._events = events
        self._last_step: int | None = None

    def iteration(self, record: IterationRecord) -> None:
        """Writes its curves, and how long it waited for captions."""
        step = record.iteration + 1
        if self._last_step is None or step <= self._last_step:
            self._begin_at(step)
        self._last_step = step
        for name, value in {"seconds/data_wait": record.data_wait_s, **record.curves}.items():
            self._figures.add_scalar(name, value, step)

    def validation(self, record: ValidationRecord, samples: Path) -> None:
        """Writes the figures and the contact sheet."""
        for name, value in record.figures.items():
            self._figures.add_scalar(f"validation/{name}", value, record.iteration)
        sheet = samples / record.sheet
        # Of a run at an address, the store may have failed to bring it here.
        if sheet.exists():
            with Image.open(sheet) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._figures.add_image("validation/sheet", pixels, record.iteration, dataformats="HWC")

    def alarm(self, alarm: Alarm) -> None:
        """Writes it as text."""
        self._events.add_text("alarms", alarm.in_words(), alarm.iteration)

    def event(self, event: RunEvent) -> None:
        """Writes it as text."""
        self._events.add_text(f"events/{event.kind}", event.in_words(), event.iteration or 0)

    def _begin_at(self, step: int) -> None:
        """Hides what the files have of this step and later ones."""
        from tensorboardX.proto import event_pb2

        proto: Any = event_pb2
        writer: Any = self._figures.file_writer
        start = proto.SessionLog(status=proto.SessionLog.START)
        writer.add_event(proto.Event(step=step, file_version=_FILE_VERSION))
        writer.add_event(proto.Event(step=step, session_log=start))


@contextmanager
def open_tensorboard(enabled: bool, folder: Path) -> Iterator[RunObserver]:
    """Opens the files, or nothing.

    Args:
        enabled: As the recipe says.
        folder: The run's folder; its new files stand beside those of earlier parts of the run.
    """
    if not enabled:
        yield RunObserver()
        return
    from tensorboardX import SummaryWriter

    root = folder / "tensorboard"
    # The name of a file has its second; a part that begins in the same one has its own file, too.
    suffix = f".{time.time_ns() % 10**9:09d}"
    with ExitStack() as stack:
        writers: list[SummaryWriter] = []
        for path in (root, root / "events"):
            writer = SummaryWriter(str(path), flush_secs=_FLUSH_S, filename_suffix=suffix)
            stack.callback(_close, writer)
            writers.append(writer)
        yield TensorBoardObserver(*writers)


def _close(writer: "SummaryWriter") -> None:
    """Closes files; a disk that takes no more of them is no error of the run."""
    try:
        writer.close()
    except OSError as error:
        _log.warning("the end of %s was not written: %s", writer.logdir, error)
        files: Any = writer.file_writer
        events = files.event_writer
        # Its thread ends all the same, and nothing is tried again as the process ends.
        events.flush = lambda: None
        with suppress(OSError):
            events.close()
        events.close = lambda: None
