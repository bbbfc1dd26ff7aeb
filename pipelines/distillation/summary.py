"""Summary of a finished run: summary.json."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipelines.config.recipe import DistillConfig
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.run.origin import command_line
from pipelines.run.places import shared_place
from pipelines.run.ranking import Ranked
from pipelines.run.revision import git_revision, versions


def summarise(
    config: DistillConfig,
    folder: RunFolder,
    quarantined: Mapping[str, Any],
    ranking: Sequence[Ranked],
) -> dict[str, Any]:
    """Gathers the final figures of a run from what it has written down.

    Args:
        config: The run's settings.
        folder: Where it is written down.
        quarantined: Rows that were left out, by reason.
        ranking: Its checkpoints, the best first.
    """
    records = read_jsonl(folder.metrics)
    validations = read_jsonl(folder.validation)
    seconds = [record["seconds"]["total"] for record in records]
    waited = [record["data_wait_s"] for record in records]
    return {
        "name": config.name,
        "run_folder": str(folder),
        "generator": shared_place(folder.generator),
        "iterations": records[-1]["iteration"] + 1 if records else 0,
        "samples_seen": records[-1]["samples_seen"] if records else 0,
        "seconds": sum(seconds),
        "seconds_per_iteration": statistics.median(seconds) if seconds else None,
        "quarantined": quarantined,
        "data_wait_share": sum(waited) / sum(seconds) if seconds else None,
        "losses": records[-1]["losses"] if records else {},
        # Iterations of each size, where a recipe has several.
        "buckets": dict(Counter(record["bucket"] for record in records if "bucket" in record)),
        "validation": validations[-1]["figures"] if validations else {},
        "best": [asdict(entry) for entry in ranking],
        "alarms": len(read_jsonl(folder.alarms)),
        "topology": config.topology.mode,
        "max_staleness_iterations": config.topology.max_staleness_iterations,
        "iterations_skipped": sum(bool(record.get("skipped")) for record in records),
        "stale_calls": sum(record.get("stale_calls", 0) for record in records),
        "seed": config.seed,
        "config_digest": config.digest,
        "git_revision": git_revision(),
        "command": command_line(),
        "versions": versions(),
    }
