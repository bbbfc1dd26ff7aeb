"""Figures of a run on Ray's Prometheus endpoint, under the names of metrics.jsonl.

Labels of each: `run`, its name, and one that tells its values apart. docs/grafana.json is a
dashboard of them.
"""

from pathlib import Path

from cluster.ray.metrics import Exported, Metrics
from pipelines.run.alarms import Alarm
from pipelines.run.observer import RunObserver
from pipelines.run.records import IterationRecord, RunEvent, ValidationRecord

ITERATION = Exported("sgmd_iteration", "Generator updates made")
SECONDS = Exported("sgmd_iteration_seconds", "Wall-clock seconds of the last iteration")
STAGE = Exported("sgmd_stage_seconds", "Busy seconds of the last iteration, by role.stage", "stage")
BUSY = Exported("sgmd_busy_ranks", "Ranks busy on average, by role", "role")
WAIT = Exported(
    "sgmd_data_wait_seconds", "Seconds of the last iteration spent waiting for captions"
)
SAMPLES = Exported("sgmd_samples", "Captions taken from the stream in this process", counts=True)
REJECTED = Exported("sgmd_rejected", "Rows, row groups and shards left out", counts=True)
LOSS = Exported("sgmd_loss", "Loss terms, means over the samples", "loss")
NORM = Exported("sgmd_gradient_norm", "Gradient norm before clipping, by role", "role")
LAG = Exported("sgmd_lag", "Lag of the fake score, as last measured", "figure")
SKIPPED = Exported("sgmd_skipped_updates", "Updates skipped by the guards", counts=True)
VALIDATION = Exported("sgmd_validation", "Figures of the last validation", "figure")
EVENTS = Exported("sgmd_events", "Failures and what was done, by kind", "kind", counts=True)
LOST_SECONDS = Exported("sgmd_lost_seconds", "Seconds lost to failures", counts=True)
ALARMS = Exported("sgmd_alarms", "Limits that were crossed, by alarm", "alarm", counts=True)

FIGURES = (
    ITERATION,
    SECONDS,
    STAGE,
    BUSY,
    WAIT,
    SAMPLES,
    REJECTED,
    LOSS,
    NORM,
    LAG,
    SKIPPED,
    VALIDATION,
    EVENTS,
    LOST_SECONDS,
    ALARMS,
)
"""All figures, in the order of the docs and the dashboard."""


class RayMetrics(RunObserver):
    """Exports a run's figures; this process is connected to Ray.

    Args:
        run: Name of the run.
        samples_before: Captions that the run had taken before this process.
    """

    def __init__(self, run: str, samples_before: int = 0) -> None:
        self._metrics = Metrics(FIGURES, {"run": run})
        self._samples = samples_before

    def iteration(self, record: IterationRecord) -> None:
        """Exports losses, norms, lag and seconds."""
        metrics, whole_s = self._metrics, record.seconds_total
        metrics.set(ITERATION, record.iteration + 1)
        metrics.set(SECONDS, whole_s)
        metrics.set(WAIT, record.data_wait_s)
        busy_s: dict[str, float] = {}
        for stage, seconds in record.seconds.items():
            metrics.set(STAGE, seconds, stage)
            role = stage.partition(".")[0]
            busy_s[role] = busy_s.get(role, 0.0) + seconds
        for role, seconds in busy_s.items():
            metrics.set(BUSY, seconds / whole_s if whole_s else 0.0, role)
        for name, value in record.losses.items():
            metrics.set(LOSS, value, name)
        for role, value in record.grad_norms.items():
            metrics.set(NORM, value, role)
        for name, value in record.lag.items():
            metrics.set(LAG, value, name)
        # After a repair, iterations are made again: their captions count once.
        metrics.add(SAMPLES, record.samples_seen - self._samples)
        self._samples = max(self._samples, record.samples_seen)
        metrics.add(REJECTED, record.rejected)
        metrics.add(SKIPPED, len(record.skipped))

    def validation(self, record: ValidationRecord, samples: Path) -> None:
        """Exports the figures of a validation."""
        for name, value in record.figures.items():
            self._metrics.set(VALIDATION, value, name)

    def alarm(self, alarm: Alarm) -> None:
        """Counts it."""
        self._metrics.add(ALARMS, 1, alarm.name)

    def event(self, event: RunEvent) -> None:
        """Counts it, and adds up its lost seconds."""
        self._metrics.add(EVENTS, 1, event.kind)
        self._metrics.add(LOST_SECONDS, event.lost_s or 0.0)
