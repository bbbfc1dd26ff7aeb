"""Records that a run writes, line by line."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from cluster.redaction import without_secrets
from pipelines.config.figures import HEADLINE_FIGURES
from pipelines.config.methods import leading_losses

EventKind = Literal[
    "worker_died",
    "worker_frozen",
    "node_died",
    "recovered",
    "restarted",
    "stopped",
    "skipped_update",
    "checkpoint_fallback",
    "gave_up",
    "storage_lost",
    "storage_back",
    "replanned",
]
"""Names of the events, as events.jsonl, W&B and the report use them."""

GOOD_NEWS: frozenset[EventKind] = frozenset({"recovered", "restarted", "storage_back", "replanned"})
"""Events that end a failure."""


@dataclass(frozen=True, slots=True)
class IterationRecord:
    """One line of metrics.jsonl.

    Attributes:
        iteration: Iterations before this one.
        losses: Loss terms, means over the samples; those that are finite.
        grad_norms: Global gradient norm by role, before clipping, of the updates that were made.
        seconds: Busy seconds by `role.stage`; stages of different roles overlap. Where iterations
            overlap, of the calls reported since the iteration before.
        seconds_total: Wall-clock seconds of the iteration.
        data_wait_s: Of these, seconds spent waiting for captions.
        samples_seen: Captions taken from the stream so far.
        epoch: Passes over the data, as a fraction; only whole ones as long as the folder has not
            been listed to its end.
        cursor: The row of the data that comes next; `pipelines.data.stream.plan.Cursor`.
        rejected: Rows, row groups and shards that were newly left out on the way.
        exit_steps: The rollout step that learnt, one per micro-batch.
        stale_calls: Calls that did not wait for all updates of the iteration before to end; 0
            unless the recipe allows it.
        skipped: Updates that were skipped: roles, `non_finite` or `spike`, the reason, samples.
        lag: Lag of the fake score, where it was measured before this iteration:
            `pipelines.distillation.lag`.
        learning_rates: By role, of the update that was made; not what the lag's governor leaves.
        bucket: Size of its clips, such as `480x832x81`; empty where there is one size.
    """

    iteration: int
    losses: Mapping[str, float]
    grad_norms: Mapping[str, float]
    seconds: Mapping[str, float]
    seconds_total: float
    data_wait_s: float
    samples_seen: int
    epoch: float
    cursor: Mapping[str, int]
    rejected: int
    exit_steps: tuple[int, ...]
    stale_calls: int = 0
    skipped: tuple[Mapping[str, Any], ...] = ()
    lag: Mapping[str, float] = field(default_factory=dict)
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    bucket: str = ""

    @property
    def headline_losses(self) -> dict[str, float]:
        """Leading terms of the objective's losses."""
        return {name: self.losses[name] for name in leading_losses() if name in self.losses}

    @property
    def curves(self) -> dict[str, float]:
        """Figures that trackers draw over iterations, under the names of metrics.jsonl.

        Of several sizes of clips, each has leading losses and seconds of its own besides.
        """
        groups = {
            "losses": self.losses,
            "grad_norms": self.grad_norms,
            "seconds": {**self.seconds, "total": self.seconds_total},
            "lag": self.lag,
            "learning_rates": self.learning_rates,
        }
        if self.bucket:
            of_size = {**self.headline_losses, "seconds": self.seconds_total}
            groups[f"buckets/{self.bucket}"] = of_size
        found = {"samples_seen": self.samples_seen, "epoch": self.epoch}
        return found | {
            f"{group}/{name}": value
            for group, figures in groups.items()
            for name, value in figures.items()
        }

    def to_json(self) -> dict[str, Any]:
        """As metrics.jsonl holds it."""
        record = asdict(self)
        record["seconds"] = {"total": record.pop("seconds_total"), **record["seconds"]}
        for name in ("skipped", "lag", "learning_rates", "bucket"):
            if not record[name]:
                del record[name]
        return record


@dataclass(frozen=True, slots=True)
class ValidationRecord:
    """One line of validation.jsonl.

    Attributes:
        iteration: Updates the validated weights had seen.
        figures: Measured on the generator's clips; their names are explained in
            `workers.validation_evaluator`.
        seconds: How long it took, off the critical path.
        sheet: File name of the contact sheet under samples/.
        intervals: Ends of the 95 % intervals of those figures that have one.
        seconds_per_clip: Sampling one clip, beside the training: compare it within a run only.
        influences: Influence of each clip on the figures that rank; see `pipelines.run.ranking`.
    """

    iteration: int
    figures: Mapping[str, float]
    seconds: float
    sheet: str
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    seconds_per_clip: float | None = None
    influences: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def headline_figures(self) -> dict[str, float]:
        """The figures that fit on one line, of those that were measured."""
        return {name: self.figures[name] for name in HEADLINE_FIGURES if name in self.figures}

    def to_json(self) -> dict[str, Any]:
        """As validation.jsonl holds it."""
        return asdict(self)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEvent:
    """One line of events.jsonl.

    Attributes:
        kind: One of `EventKind`.
        cause: One sentence about what happened.
        action: One sentence about what was done; empty where nothing was.
        role: Role or helper of the process: "generator", "feed"; empty where it is about none.
        rank: Its rank.
        node: Its machine.
        iteration: Updates of the generator made before; None where the run has not begun.
        last_lines: The last log lines of the failing process, secrets blotted out.
        lost_s: Seconds lost; None where they are not known (yet).
        time: ISO 8601, UTC.
    """

    kind: EventKind
    cause: str
    action: str = ""
    role: str = ""
    rank: int | None = None
    node: str = ""
    iteration: int | None = None
    last_lines: tuple[str, ...] = ()
    lost_s: float | None = None
    time: str = field(default_factory=_now)

    def __post_init__(self) -> None:
        """Blots secrets out of every text that may hold one."""
        for name in ("cause", "action"):
            object.__setattr__(self, name, without_secrets(getattr(self, name)))
        lines = tuple(without_secrets(line) for line in self.last_lines)
        object.__setattr__(self, "last_lines", lines)

    def to_json(self) -> dict[str, Any]:
        """As events.jsonl holds it."""
        return asdict(self)

    @property
    def place(self) -> str:
        """Role, rank and machine in words; empty where the event is about no process."""
        role = self.role if self.rank is None else f"{self.role} rank {self.rank}"
        return f"{role} on {self.node}" if role and self.node else role or self.node

    def in_words(self) -> str:
        """One line for a terminal."""
        where = [self.place] if self.place else []
        where += [f"iteration {self.iteration}"] if self.iteration is not None else []
        head = self.kind.replace("_", " ") + (f" ({', '.join(where)})" if where else "")
        action = self.action[:1].upper() + self.action[1:]
        said = " ".join(part.rstrip(".") + "." for part in (self.cause, action) if part)
        lost = f" {self.lost_s:.1f} s lost." if self.lost_s is not None else ""
        return f"{head}: {said}{lost}"
