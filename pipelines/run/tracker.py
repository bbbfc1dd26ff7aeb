"""Weights & Biases, when the recipe asks for it. The run folder never depends on it."""

import secrets
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.storage import write_text
from pipelines.run.alarms import Alarm
from pipelines.run.observer import RunObserver
from pipelines.run.records import GOOD_NEWS, IterationRecord, RunEvent, ValidationRecord


class WandbObserver(RunObserver):
    """One W&B run.

    A validation runs beside the training and comes back late, perhaps two at once. W&B's own step
    only grows and drops what comes before it, so nothing is logged by it: curves are drawn over
    `iteration` and `validation/iteration`, figures like any other.
    """

    def __init__(self, run: Any) -> None:  # noqa: ANN401  (wandb's Run, imported on demand)
        self._run = run
        groups = ("losses/*", "grad_norms/*", "seconds/*", "lag/*", "learning_rates/*", "buckets/*")
        for name in (*groups, "samples_seen", "epoch"):
            run.define_metric(name, step_metric="iteration")
        run.define_metric("validation/*", step_metric="validation/iteration")
        run.define_metric("events/*", step_metric="events/iteration")
        self._events: Counter[str] = Counter()
        self._lost_s = 0.0

    def iteration(self, record: IterationRecord) -> None:
        """Logs its curves."""
        self._run.log({"iteration": record.iteration + 1, **record.curves})

    def validation(self, record: ValidationRecord, samples: Path) -> None:
        """Logs the figures, the contact sheet, and the same clips moving."""
        import wandb

        figures: dict[str, Any] = {
            f"validation/{name}": value for name, value in record.figures.items()
        }
        figures["validation/iteration"] = record.iteration
        sheet = samples / record.sheet
        # Of a run at an address, the store may have failed to bring it here.
        if sheet.exists():
            figures["validation/sheet"] = wandb.Image(str(sheet))
            clips = sheet.with_suffix(".gif")
            figures["validation/clips"] = wandb.Video(str(clips), format="gif")
        self._run.log(figures)

    def alarm(self, alarm: Alarm) -> None:
        """Raises it in W&B, too, which can send it on by mail."""
        self._run.alert(title=alarm.name, text=alarm.in_words(), level="WARN")

    def event(self, event: RunEvent) -> None:
        """Counts it by kind, adds its lost seconds up, and raises it as an alert."""
        self._events[event.kind] += 1
        self._lost_s += event.lost_s or 0.0
        figures: dict[str, float] = {
            f"events/{event.kind}": self._events[event.kind],
            "events/lost_s": self._lost_s,
        }
        if event.iteration is not None:
            figures["events/iteration"] = event.iteration
        self._run.log(figures)
        level = "INFO" if event.kind in GOOD_NEWS else "WARN"
        self._run.alert(title=event.kind, text=event.in_words(), level=level)


@contextmanager
def open_tracker(
    mode: str, project: str, name: str, folder: Path, config: Mapping[str, Any]
) -> Iterator[RunObserver]:
    """Opens the tracker that the recipe names.

    Args:
        mode: `off`, `offline` (writes to the run folder; needs no account) or `online` (the key
            comes from WANDB_API_KEY).
        project: W&B project.
        name: Name of the run.
        folder: Where W&B may write. A run that is resumed there goes on in W&B as the same run.
        config: The resolved configuration; it holds no secrets.
    """
    if mode == "off":
        yield RunObserver()
        return
    import wandb

    run = wandb.init(
        mode="offline" if mode == "offline" else "online",
        project=project,
        id=_run_id(folder / "wandb-id"),
        resume="allow",
        name=name,
        dir=str(folder),
        config=dict(config),
        settings=wandb.Settings(silent=True),
    )
    try:
        yield WandbObserver(run)
    finally:
        run.finish()


def _run_id(path: Path) -> str:
    """The name by which W&B knows a run again; made with its first part."""
    if not path.exists():
        write_text(str(path), secrets.token_hex(4))
    return path.read_text()
