"""Audits a run: reads its ledger and checks that every sample was used once.

RUN/config.yaml, shards.jsonl -> the plan, replayed (ids alone)
RUN/ledger/, quarantine.parquet -> what was used and what was left out   -> a verdict an epoch
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.checkpoints import Checkpoints
from cluster.errors import StorageError
from cluster.logs import ANY, is_kind
from cluster.storage import read_json
from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.data.making.caption_file import open_set
from pipelines.data.shards.columns import ColumnNames
from pipelines.data.shards.listing import sizes_of
from pipelines.data.shards.parquet import RowGroupReader
from pipelines.data.stream.catalogue import Catalogue
from pipelines.data.stream.ledger import Ledger
from pipelines.data.stream.plan import Cursor
from pipelines.data.stream.quarantine import QuarantineFile
from pipelines.data.stream.reconciliation import EpochReconciliation, due_rows, reconcile
from pipelines.distillation.training_sets import training_sets
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.run.opened_copy import working_copy
from pipelines.run.places import shared_place
from sgmd_core.errors import DataError
from workers.models.makers import Made, maker_on_their_word


@dataclass(frozen=True, slots=True)
class Audit:
    """Use that a run made of its data.

    Attributes:
        iterations: Iterations in the ledger.
        samples: Samples that they used.
        cursor: The row that comes next.
        epochs: A verdict for each epoch that was begun.
        quarantined: Entries of quarantine.parquet, in counts.
        iterations_follow: Whether the ledger holds every iteration once, in order.
        iterations_missing: Iterations at the end that metrics or checkpoints know, and the ledger
            does not.
        has_metrics: Whether there are metrics, which know iterations after the last checkpoint.
        text_encoder_named: Name of the text encoder that the run's embeddings gave, where its
            model folder had none to compare with; else empty.
        autoencoder_named: The same of the autoencoder, by the run's latents.
        further: The same of each set of `data.also`, whose epochs are its own.
    """

    iterations: int
    samples: int
    cursor: Cursor
    epochs: tuple[EpochReconciliation, ...]
    quarantined: dict[str, Any]
    iterations_follow: bool
    iterations_missing: int
    has_metrics: bool
    text_encoder_named: str = ""
    autoencoder_named: str = ""
    further: tuple["Audit", ...] = ()

    @property
    def is_clean(self) -> bool:
        """True if nothing was lost or repeated."""
        is_whole = self.iterations_follow and not self.iterations_missing
        is_clean = is_whole and all(epoch.is_clean for epoch in self.epochs)
        return is_clean and all(one.is_clean for one in self.further)

    @property
    def samples_of_all(self) -> int:
        """Samples that the iterations used, of all sets."""
        return self.samples + sum(one.samples for one in self.further)

    def to_json(self) -> dict[str, Any]:
        """As `sgmd ledger --json` prints it."""
        return {
            "clean": self.is_clean,
            "iterations": self.iterations,
            "iterations_follow": self.iterations_follow,
            "iterations_missing": self.iterations_missing,
            "has_metrics": self.has_metrics,
            "samples": self.samples,
            "cursor": self.cursor.to_json(),
            "epochs": [epoch.to_json() for epoch in self.epochs],
            "quarantined": self.quarantined,
            **({"text_encoder_named": self.text_encoder_named} if self.text_encoder_named else {}),
            **({"autoencoder_named": self.autoencoder_named} if self.autoencoder_named else {}),
            **({"also": [one.to_json() for one in self.further]} if self.further else {}),
        }


def audit(run: str | Path, train: str | None = None) -> Audit:
    """Judges a run, finished or not.

    Args:
        run: Its folder: a path or an address.
        train: Where its training data are now; None: where they were when it began.

    Raises:
        CheckpointError: There is no run.
        DataError: Its data cannot be read.
    """
    with working_copy(run, ("samples",)) as root:
        return _audit(RunFolder(root), train)


def _audit(folder: RunFolder, train: str | None) -> Audit:
    folder.require("checking the ledger of", "Check the path")
    config = load_recipe(str(folder.config))
    # First, or a run that goes on meanwhile would seem to have lost an iteration.
    made, has_metrics = _iterations_made(folder), folder.metrics.exists()
    first, *further = [
        replace(
            _audit_set(folder.of_set(number), config, one.url, one.columns, made),
            has_metrics=has_metrics,
        )
        for number, one in enumerate(training_sets(config, train))
    ]
    return replace(
        first,
        text_encoder_named=_named(folder, "embeddings"),
        autoencoder_named=_named(folder, "latents"),
        further=tuple(further),
    )


def _named(folder: RunFolder, made: Made) -> str:
    """Maker that data name themselves; empty where weights confirm it, or none is named."""
    try:
        began = read_json(str(folder.identity))
    except StorageError:
        return ""  # Resuming refuses it; the ledger does not need it.
    model: Any = began.get("model") if isinstance(began, dict) else None
    return maker_on_their_word(model, made) if is_kind(model, {ANY: str}) else ""


def _audit_set(
    folder: RunFolder, config: DistillConfig, url: str, columns: ColumnNames, made: int
) -> Audit:
    """Judges the use of one set of captions, whose books are in `folder`."""
    entries = list(Ledger(folder.ledger).entries())
    quarantine = QuarantineFile(folder.quarantine)
    end = entries[-1].cursor if entries else Cursor()
    data = config.data
    place = open_set(url, data.s3, columns)
    listed = read_jsonl(folder.shards)
    shards = {path for line in listed for path, *_ in line.get("shards", ())}
    if shards and not sizes_of(place.filesystem, place.root, shards):
        raise DataError(
            f"checking the ledger of {folder} against {url}",
            f"none of the {len(shards)} shards of the run, such as {min(shards)}",
            "the data that the run was trained on",
            "Say where they are now with --data",
        )
    chapter_shards = data.shuffle.chapter_shards
    catalogue = Catalogue(place.filesystem, place.root, chapter_shards, data.s3, listed, place.only)
    names = catalogue.settle_names(place.names)
    reader = RowGroupReader(place.filesystem, place.root, data.s3, names)
    due = due_rows(catalogue, reader, config.seed, data.shuffle, end, quarantine.rejects)
    iterations = [entry.iteration for entry in entries]
    return Audit(
        iterations=len(entries),
        samples=sum(len(entry.sample_ids) for entry in entries),
        cursor=end,
        epochs=tuple(reconcile(due, entries)),
        quarantined=quarantine.counts(),
        iterations_follow=iterations == list(range(len(entries))),
        iterations_missing=max(0, made - max(iterations, default=-1) - 1),
        has_metrics=True,
    )


def _iterations_made(folder: RunFolder) -> int:
    """Iterations that surely ended, whatever the ledger says."""
    recorded = max((line["iteration"] for line in read_jsonl(folder.metrics)), default=0)
    # A kill may come after an iteration's metrics and before its line of the ledger.
    # One that a kill cut short proves nothing: a resume goes back before it.
    step = Checkpoints(shared_place(folder.checkpoints)).latest()
    return max(recorded, step or 0)
