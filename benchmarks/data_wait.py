"""Measures how long the roles of `sgmd distill tiny` wait for captions that come from S3."""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from data_sets import BUCKET, serve

from pipelines.shapes import write_shards

_ITERATIONS = 60


def measure_wait(
    scratch: Path,
    rounds: int,
    before: Callable[[], AbstractContextManager[object]] = nullcontext,
    settings: Sequence[str] = (),
) -> dict[str, Any]:
    """Whole runs of the command, Ray and networks started again for each.

    Args:
        scratch: Folder of the shards and runs.
        rounds: Runs.
        before: Stands before the server while they run.
        settings: Of the recipe.
    """
    write_shards(str(scratch / BUCKET / "train"), num_clips=4096, shard_size=256, seed=0)
    runs = []
    with serve(scratch), before():
        for number in range(rounds):
            command = [
                *(sys.executable, "-m", "pipelines.cli", "distill", "tiny", "--json"),
                *(f"data.train=s3://{BUCKET}/train", f"output={scratch}", f"name=wait{number}"),
                *(f"iterations={_ITERATIONS}", "validation.every=0", *settings),
            ]
            printed = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
            summary = json.loads(printed)
            metrics = (scratch / f"wait{number}" / "metrics.jsonl").read_text().splitlines()
            lines = [json.loads(line) for line in metrics]
            waits = [line["data_wait_s"] for line in lines]
            totals = [line["seconds"]["total"] for line in lines]
            runs.append(
                {
                    "first_batch_s": waits[0],
                    "share_of_all": summary["data_wait_share"],
                    "share_after_first": sum(waits[1:]) / sum(totals[1:]),
                    "longest_after_first_s": max(waits[1:]),
                    "seconds_per_iteration": statistics.median(totals),
                }
            )
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {"iterations": _ITERATIONS, **medians, "each": runs}
